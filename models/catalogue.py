"""Every candidate that the product knows: what it is, before anything is opened or computed.

A candidate is named in a plan, allowed by a site's policy and pinned by the hash of its artefact. This table holds the
public facts that those three need; it imports no deep-learning library, so that `urna plan check` stays instant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from urna.protocol.errors import ModelError


@dataclass(frozen=True)
class CandidateSpec:
    """The public facts of one pretrained model.

    Args:
        name: What a plan calls it, and the name of its artefact's folder.
        family: The kind of architecture; a shortlist keeps families apart.
        modality: The kind of record that its input adapter reads.
        tasks: The kinds of task that its features may serve.
        input_shape: Channels, height and width of one adapted record; values in [0, 1].
        feature_dim: Length of one record's frozen feature vector.
        num_parameters: Weights of the backbone, without the head that is tuned on it.
        licence: SPDX identifier of the weights.
        pretrained_on: The public data and the task behind the weights, in one clause.
        summary: What it is, in one sentence.
    """

    name: str
    family: str
    modality: str
    tasks: tuple[str, ...]
    input_shape: tuple[int, int, int]
    feature_dim: int
    num_parameters: int
    licence: str
    pretrained_on: str
    summary: str


def _image_classifier(
    name: str, family: str, feature_dim: int, num_parameters: int, pretrained_on: str, summary: str
) -> CandidateSpec:
    return CandidateSpec(
        name=name,
        family=family,
        modality="image",
        tasks=("classification",),
        input_shape=(1, 8, 8),
        feature_dim=feature_dim,
        num_parameters=num_parameters,
        licence="Apache-2.0",
        pretrained_on=pretrained_on,
        summary=summary,
    )


_CHARACTERS = "characters rendered with the fonts that matplotlib ships"

_SPECS = (
    _image_classifier(
        "pixels",
        "classical",
        64,
        0,
        f"nothing but the mean of {_CHARACTERS}",
        "The 64 grey values themselves: the baseline that a backbone has to beat.",
    ),
    _image_classifier(
        "rff",
        "classical",
        512,
        33_280,
        f"nothing but the bandwidth and mean of {_CHARACTERS}",
        "512 random Fourier features of the grey values, which approximate a Gaussian kernel machine.",
    ),
    _image_classifier(
        "pca",
        "classical",
        32,
        2_080,
        f"the principal components of {_CHARACTERS}",
        "The 32 leading principal components, softly whitened.",
    ),
    _image_classifier(
        "kmeans",
        "classical",
        192,
        768,
        f"clusters of 4x4 patches of {_CHARACTERS}",
        "How near patches are to 48 cluster centres, averaged per quadrant.",
    ),
    _image_classifier(
        "mlp",
        "perceptron",
        64,
        16_576,
        f"recognition of {_CHARACTERS}, in 47 classes",
        "A perceptron with two layers that was taught to read print.",
    ),
    _image_classifier(
        "autoencoder",
        "autoencoder",
        48,
        14_512,
        f"reconstruction of {_CHARACTERS}, from noisy copies",
        "The 48-number code of a denoising autoencoder with one hidden layer.",
    ),
    _image_classifier(
        "cnn",
        "convolutional",
        64,
        31_024,
        f"recognition of {_CHARACTERS}, in 47 classes",
        "A three-layer convolutional network that was taught to read print.",
    ),
    _image_classifier(
        "cnn_random",
        "convolutional",
        64,
        31_024,
        f"nothing (random weights) but the mean of {_CHARACTERS}",
        "The same convolutional network, untrained: what the architecture alone is worth.",
    ),
    _image_classifier(
        "conv_gru",
        "convolutional-recurrent",
        64,
        37_408,
        f"recognition of {_CHARACTERS}, in 47 classes",
        "A convolution followed by a GRU over the rows.",
    ),
    _image_classifier(
        "lstm",
        "recurrent",
        96,
        22_272,
        f"recognition of {_CHARACTERS}, in 47 classes",
        "A bidirectional LSTM that reads an image row by row.",
    ),
    _image_classifier(
        "vit",
        "transformer",
        48,
        39_024,
        f"recognition of {_CHARACTERS}, in 47 classes",
        "A two-layer vision transformer over sixteen 2x2 patches.",
    ),
)

CATALOGUE: Mapping[str, CandidateSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def spec(name: str) -> CandidateSpec:
    """Return the facts of a candidate.

    Raises:
        ModelError: the catalogue knows no candidate of this name.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = get_close_matches(name, CATALOGUE, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ModelError(f"no candidate is called {name!r}: {hint}known are {', '.join(CATALOGUE)}")
