"""What is trained on private records, as one flat vector.

Mode `head`: the backbone is frozen and a linear layer on its features is trained. The flat vector is the weight
(num_classes, feature_dim), row by row, then the bias (num_classes,).
"""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from urna.protocol.errors import ModelError

HEAD_FEATURE_NORM = 3.0  # norm of every non-zero record's features before the head


def trainable_size(feature_dim: int, num_classes: int) -> int:
    """Return the number p of trained weights of a linear head with bias."""
    return (feature_dim + 1) * num_classes


def zero_head(feature_dim: int, num_classes: int) -> nn.Linear:
    """Make the head that every fine-tune starts from: all zeros, so that sites start alike and no class is favoured."""
    return head_from_vector(np.zeros(trainable_size(feature_dim, num_classes), np.float32), feature_dim, num_classes)


def head_from_vector(vector: NDArray[np.float32], feature_dim: int, num_classes: int) -> nn.Linear:
    """Make the head whose flat vector is given.

    Args:
        vector: float32 (p,), p = (feature_dim + 1) * num_classes; it is copied.
        feature_dim: Length d of one record's features.
        num_classes: Number of outputs.

    Raises:
        ModelError: the vector has another length or type, or holds a value that is not finite.
    """
    expected = (trainable_size(feature_dim, num_classes),)
    if vector.shape != expected or vector.dtype != np.float32:
        raise ModelError(
            f"the vector of a {feature_dim}-to-{num_classes} head must be float32 {expected}, "
            f"found {vector.dtype} {vector.shape}: was it trained for another candidate?"
        )
    if not np.isfinite(vector).all():
        raise ModelError("the vector of a head must be finite, found NaN or infinity: the training diverged")
    flat = torch.from_numpy(vector.copy())
    linear = nn.Linear(feature_dim, num_classes, device="meta")  # no random draw for weights that are replaced at once
    linear.weight = nn.Parameter(flat[: feature_dim * num_classes].view(num_classes, feature_dim))
    linear.bias = nn.Parameter(flat[feature_dim * num_classes :])
    return linear


def vector_from_head(head: nn.Linear) -> NDArray[np.float32]:
    """Return a head's flat vector, float32 (p,): the inverse of `head_from_vector`."""
    return np.concatenate([head.weight.detach().numpy().ravel(), head.bias.detach().numpy()])


def normalise_for_head(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each record's centred features to norm `HEAD_FEATURE_NORM`; a zero vector stays zero.

    Bounded features bound a record's logits and gradient before clipping, so that one clipping threshold and one
    learning rate, public constants, fit every candidate: nothing here is fitted to private records.

    Args:
        features: float32 (n, d), as `Backbone.features` gives them.

    Returns:
        float32 (n, d), each row of norm 3 or 0.
    """
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    scale = np.divide(HEAD_FEATURE_NORM, norms, out=np.zeros_like(norms), where=norms > 0)
    normalised: NDArray[np.float32] = (features * scale).astype(np.float32)
    return normalised


def per_example_gradients(head: nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each record's own gradient of the cross-entropy, unclipped.

    Args:
        head: Left as it was; its weights are copied.
        features: float32 (b, d); b may be 0, as a Poisson sample may be.
        labels: int64 (b,) in 0..num_classes-1.

    Returns:
        float32 (b, p), in the order of the flat vector.
    """
    if not len(features):
        return features.new_zeros((0, trainable_size(head.in_features, head.out_features)))
    from opacus.grad_sample import GradSampleModule  # takes seconds to import

    sampled = GradSampleModule(copy.deepcopy(head), batch_first=True, loss_reduction="sum")
    # the loss stays outside the module and is summed: a mean would divide every gradient by the batch size
    logits = sampled(features.detach().requires_grad_())  # torch warns of backward hooks where no input needs a gradient
    torch.autograd.backward(functional.cross_entropy(logits, labels, reduction="none").sum())
    rows = [parameter.grad_sample.flatten(1) for parameter in sampled.parameters()]
    return torch.cat(rows, dim=1).detach()


def predict_logits(vector: NDArray[np.float32], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logits of the head with this flat vector.

    Args:
        vector: float32 (p,).
        features: float32 (n, d), normalised as for training.

    Returns:
        float32 (n, num_classes).

    Raises:
        ModelError: p is not a multiple of d + 1.
    """
    feature_dim = features.shape[1]
    num_classes, remainder = divmod(vector.size, feature_dim + 1)
    if remainder or not num_classes:
        raise ModelError(
            f"a head on {feature_dim} features must have a multiple of {feature_dim + 1} weights, "
            f"found {vector.size}: was it trained for another candidate?"
        )
    linear = head_from_vector(vector, feature_dim, num_classes)
    with torch.no_grad():
        logits: NDArray[np.float32] = linear(torch.tensor(features)).numpy()
    return logits
