"""Every candidate that this installation knows: what it is, before anything is opened or computed.

A candidate is named in a plan, allowed by a site's policy and pinned by the hash of its artefact. Here are the public
facts that those three need: of the built-in candidates a table, of the installed ones what `urna models add` wrote into
the cache. No deep-learning library is imported, so that `urna plan check` stays instant.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from urna.models.candidate_file import CANDIDATE_FILE, CandidateFile, read_candidate
from urna.protocol.errors import ModelError


@dataclass(frozen=True)
class CandidateSpec:
    """The public facts of one pretrained model.

    Args:
        name: What a plan calls it, and the name of its artefact's folder.
        family: The kind of architecture; a shortlist keeps families apart.
        modality: The kind of record that it reads: image, text, audio, series, ...
        tasks: The kinds of task that its features may serve.
        input_shape: Of one adapted record: channels, height and width of an image; empty where length varies, as of texts.
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
    input_shape: tuple[int, ...]
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


def cache_root() -> Path:
    """Return the folder that holds one folder per candidate; it need not exist yet."""
    if configured := os.environ.get("URNA_CACHE_DIR"):
        return Path(configured) / "models"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "urna" / "models"
    return Path.home() / ".cache" / "urna" / "models"


def is_installed(name: str, root: Path | None = None) -> bool:
    """Whether a candidate of this name was installed; never one of the catalogue, whatever lies in the cache."""
    fits = bool(name) and name not in CATALOGUE and "/" not in name and "\0" not in name and not name.startswith(".")
    return fits and ((root or cache_root()) / name / CANDIDATE_FILE).is_file()


def installed(root: Path | None = None) -> tuple[str, ...]:
    """The names of all installed candidates, in order; whether each can be read is for `spec` to say."""
    folder = root or cache_root()
    if not folder.is_dir():
        return ()
    return tuple(sorted(path.name for path in folder.iterdir() if is_installed(path.name, folder)))


def known(root: Path | None = None) -> tuple[str, ...]:
    """The names of all candidates: the built-in ones, then the installed ones."""
    return (*CATALOGUE, *installed(root))


def spec(name: str, root: Path | None = None) -> CandidateSpec:
    """Return the facts of a candidate; a built-in one comes first.

    Args:
        name: What a plan calls it.
        root: Folder of artefacts, for installed ones; None is `cache_root()`.

    Raises:
        ModelError: there is no candidate of this name, or its candidate.json is malformed.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    if is_installed(name, root):
        return spec_of(read_candidate(name, (root or cache_root()) / name)[0])
    names = known(root)
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ModelError(f"no candidate is called {name!r}: {hint}known are {', '.join(names)}")


def spec_of(file: CandidateFile) -> CandidateSpec:
    """The facts that a candidate.json states."""
    return CandidateSpec(
        name=file.name,
        family=file.family,
        modality=file.modality,
        tasks=file.tasks,
        input_shape=file.input_shape,
        feature_dim=file.feature_dim,
        num_parameters=file.num_parameters,
        licence=file.licence,
        pretrained_on=file.pretrained_on,
        summary=file.summary,
    )
