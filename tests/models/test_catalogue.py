import subprocess
import sys

import pytest

from urna.models.catalogue import CATALOGUE, spec
from urna.models.vision import ARCHITECTURES, build
from urna.protocol.errors import ModelError


def test_candidates_of_different_families_are_known() -> None:
    assert len(CATALOGUE) == 11
    families = {facts.family for facts in CATALOGUE.values()}
    assert families >= {"autoencoder", "convolutional", "convolutional-recurrent", "recurrent", "transformer", "classical"}
    assert set(ARCHITECTURES) == set(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_number_of_parameters_is_as_declared(name: str) -> None:
    assert sum(parameter.numel() for parameter in build(name).parameters()) == spec(name).num_parameters


def test_unknown_candidate_is_answered_with_the_closest_one() -> None:
    with pytest.raises(ModelError, match=r"no candidate is called 'conv-gru': did you mean 'conv_gru'\? known are pix"):
        spec("conv-gru")


@pytest.mark.parametrize("name", ["", "../cnn", "cnn/..", "bert-large"])
def test_a_name_that_is_a_path_or_unknown_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="known are pixels, rff"):
        spec(name)


def test_catalogue_is_read_without_importing_torch_or_numpy() -> None:
    code = "import sys, urna.models.catalogue; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_catalogue_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        CATALOGUE["cnn"] = spec("vit")  # type: ignore[index]
