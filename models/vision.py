"""Small image backbones and their one input adapter.

Every backbone maps float32 (n, 1, 8, 8) in [0, 1] to float32 (n, feature_dim). None holds batch normalisation, dropout
or a position table without a batch axis: an example's features never depend on its neighbours, in any tuning mode.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from urna.models.catalogue import spec
from urna.protocol.errors import ModelError

SIDE = 8  # height and width, in pixels, of what every backbone reads
PATCH = 4  # side of a patch of `PatchClusters`


def adapt(images: NDArray[np.floating]) -> torch.Tensor:
    """Bring square grey images to the backbones' input: area average per cell, record by record.

    Args:
        images: (n, H, H) with any H >= 1 and values in [0, 1]; n may be 0.

    Returns:
        float32 (n, 1, 8, 8) in [0, 1], contiguous.

    Raises:
        ModelError: not floating point, not square, not finite, or outside [0, 1].
    """
    if not np.issubdtype(images.dtype, np.floating):
        raise ModelError(f"images must be floating point in [0, 1], found {images.dtype}: divide by the largest grey value")
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.shape[1] == 0:
        raise ModelError(f"images must be (n, H, H), square and grey, found shape {images.shape}: crop or pad them first")
    # written so that NaN fails too
    if images.size and not (images.min() >= 0.0 and images.max() <= 1.0):
        raise ModelError(
            f"images must lie in [0, 1], found {images.min():g} to {images.max():g}: divide by the largest grey value"
        )
    batch = torch.from_numpy(np.array(images, np.float32, order="C")).unsqueeze(1)  # (n, 1, H, H)
    if not len(images):  # torch does not pool an empty batch
        return batch.new_zeros((0, 1, SIDE, SIDE))
    return functional.adaptive_avg_pool2d(batch, SIDE).contiguous()


class Pixels(nn.Module):
    """The grey values as they are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Flatten: (n, 1, 8, 8) -> (n, 64)."""
        return images.flatten(1)


class RandomFourier(nn.Module):
    """Random Fourier features of a Gaussian kernel: sqrt(2/d) cos(W x + b) (Rahimi and Recht 2007, algorithm 1)."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.frequencies = nn.Linear(SIDE * SIDE, feature_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, feature_dim), each in [-sqrt(2/d), sqrt(2/d)]."""
        projected: torch.Tensor = self.frequencies(images.flatten(1))
        return math.sqrt(2.0 / projected.shape[1]) * torch.cos(projected)


class Components(nn.Module):
    """Principal components of public images, softly whitened: a linear map."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(SIDE * SIDE, feature_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, feature_dim)."""
        projected: torch.Tensor = self.project(images.flatten(1))
        return projected


class PatchClusters(nn.Module):
    """How near each 4x4 patch is to k centres of public patches, averaged per quadrant (Coates, Lee, Ng 2011, "triangle")."""

    def __init__(self, clusters: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(clusters, PATCH * PATCH))

    @staticmethod
    def patches(images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, 25, 16), each of mean 0 and about unit contrast."""
        raw = functional.unfold(images, PATCH).transpose(1, 2)
        centred = raw - raw.mean(-1, keepdim=True)
        patches: torch.Tensor = centred / (centred.std(-1, keepdim=True) + 0.1)
        return patches

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, 4 * clusters)."""
        distances = torch.cdist(self.patches(images), self.centres)  # (n, 25, k)
        near = functional.relu(distances.mean(-1, keepdim=True) - distances)
        maps = near.transpose(1, 2).reshape(len(images), -1, SIDE - PATCH + 1, SIDE - PATCH + 1)
        return functional.adaptive_avg_pool2d(maps, 2).flatten(1)


class Encoder(nn.Module):
    """One hidden layer, 64 -> hidden -> code: half an autoencoder, or a perceptron's lower part."""

    def __init__(self, hidden: int, feature_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(SIDE * SIDE, hidden)
        self.code = nn.Linear(hidden, feature_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, feature_dim)."""
        code: torch.Tensor = self.code(functional.gelu(self.hidden(images.flatten(1))))
        return code


class ConvNet(nn.Module):
    """Three 3x3 convolutions with pooling 8 -> 4 -> 2, then a linear layer."""

    def __init__(self, channels: int, feature_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * channels, 3 * channels, 3, padding=1)
        self.project = nn.Linear(3 * channels * 4, feature_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, feature_dim)."""
        maps = functional.gelu(self.conv1(images))  # (n, c, 8, 8)
        maps = functional.max_pool2d(functional.gelu(self.conv2(maps)), 2)  # (n, 2c, 4, 4)
        maps = functional.max_pool2d(functional.gelu(self.conv3(maps)), 2)  # (n, 3c, 2, 2)
        return functional.gelu(self.project(maps.flatten(1)))


class ConvGRU(nn.Module):
    """One 3x3 convolution, then a GRU over the rows; features are its last state."""

    def __init__(self, channels: int, feature_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.gru = nn.GRU(channels * SIDE, feature_dim, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, feature_dim), each in [-1, 1]."""
        maps = functional.gelu(self.conv(images))  # (n, c, 8 rows, 8)
        rows = maps.transpose(1, 2).flatten(2)  # (n, 8 rows, 8c)
        _, last = self.gru(rows)  # (1, n, feature_dim)
        return last[0]  # type: ignore[no-any-return]  # torch leaves nn.GRU.forward untyped


class RowLSTM(nn.Module):
    """A bidirectional LSTM over the eight rows; features are the two last states."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SIDE, hidden, batch_first=True, bidirectional=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, 2 * hidden), each in [-1, 1]."""
        _, (last, _) = self.lstm(images.squeeze(1))  # (2, n, hidden)
        return last.transpose(0, 1).flatten(1)  # type: ignore[no-any-return]  # torch leaves nn.LSTM.forward untyped


class Block(nn.Module):
    """Pre-norm transformer block, of plain linear layers so that per-example gradients exist for each of them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, t, width) -> (n, t, width)."""
        n, t, width = tokens.shape
        heads = self.qkv(self.norm1(tokens)).view(n, t, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (n, num_heads, t, width / num_heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        update: torch.Tensor = self.down(functional.gelu(self.up(self.norm2(tokens))))
        return tokens + update


class VisionTransformer(nn.Module):
    """A vision transformer over 2x2 patches; features are the mean token after the last norm."""

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.position = nn.Embedding((SIDE // 2) ** 2, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, width)."""
        patches = functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)  # (n, 16, 4)
        index = torch.arange(patches.shape[1], device=images.device)
        # expanded to (n, 16): without a batch axis the table's per-example gradients would be silently wrong
        tokens = self.patch(patches) + self.position(index.expand(len(patches), -1))
        for block in self.blocks:
            tokens = block(tokens)
        features: torch.Tensor = self.norm(tokens).mean(1)
        return features


ARCHITECTURES: Mapping[str, tuple[Callable[..., nn.Module], Mapping[str, int]]] = MappingProxyType(
    {
        "pixels": (Pixels, {}),
        "rff": (RandomFourier, {"feature_dim": 512}),
        "pca": (Components, {"feature_dim": 32}),
        "kmeans": (PatchClusters, {"clusters": 48}),
        "mlp": (Encoder, {"hidden": 128, "feature_dim": 64}),
        "autoencoder": (Encoder, {"hidden": 128, "feature_dim": 48}),
        "cnn": (ConvNet, {"channels": 16, "feature_dim": 64}),
        "cnn_random": (ConvNet, {"channels": 16, "feature_dim": 64}),
        "conv_gru": (ConvGRU, {"channels": 16, "feature_dim": 64}),
        "lstm": (RowLSTM, {"hidden": 48}),
        "vit": (VisionTransformer, {"width": 48, "depth": 2, "num_heads": 4}),
    }
)


def build(name: str) -> nn.Module:
    """Make a candidate's backbone with fresh weights, drawn from torch's global generator.

    Raises:
        ModelError: the catalogue knows no candidate of this name.
    """
    module, config = ARCHITECTURES[spec(name).name]
    return module(**config)
