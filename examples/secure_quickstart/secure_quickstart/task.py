"""Model, data, training and test: as in Flower's quickstart; nothing here knows of a secure sum."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

Batches = DataLoader[tuple[torch.Tensor, ...]]


class Net(nn.Module):
    """A small perceptron for 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)  # has an integer counter in its state
        self.output = nn.Linear(32, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (n, 10) of pixels (n, 64)."""
        return self.output(functional.relu(self.norm(self.hidden(pixels))))


def load_data(partition_id: int, num_partitions: int) -> tuple[Batches, Batches]:
    """A partition's part of the digits: four fifths to train, one to test."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.data[partition_id::num_partitions]).float() / 16
    labels = torch.from_numpy(digits.target[partition_id::num_partitions]).long()
    cut = len(labels) * 4 // 5
    generator = torch.Generator().manual_seed(partition_id)
    train = DataLoader(
        TensorDataset(pixels[:cut], labels[:cut]), batch_size=32, shuffle=True, generator=generator, drop_last=True
    )
    return train, DataLoader(TensorDataset(pixels[cut:], labels[cut:]), batch_size=128)


def train(net: Net, batches: Batches, epochs: int, lr: float) -> float:
    """Train; return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for pixels, labels in batches:
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(pixels), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(batches))


def test(net: Net, batches: Batches) -> tuple[float, float]:
    """Mean loss and accuracy."""
    net.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for pixels, labels in batches:
            logits = net(pixels)
            loss += functional.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(dim=1) == labels).sum())
            count += len(labels)
    return loss / count, right / count
