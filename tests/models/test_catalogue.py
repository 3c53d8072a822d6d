import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import folders
from urna.models.catalogue import CATALOGUE, cache_root, installed, known, spec
from urna.models.installed import install
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


def test_an_installed_candidate_is_known_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("tiny", folders.bert(tmp_path / "source"), folders.ABOUT, root=tmp_path / "cache" / "models")
    with pytest.raises(ModelError, match="no candidate is called 'tiny'"):
        spec("tiny")
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "cache"))
    assert cache_root() == tmp_path / "cache" / "models"
    assert spec("tiny").modality == "text"
    assert known() == (*CATALOGUE, "tiny")
    with pytest.raises(ModelError, match="no candidate is called 'tinny': did you mean 'tiny'"):
        spec("tinny")


def test_an_installed_candidate_is_read_without_importing_torch_or_numpy(tmp_path: Path) -> None:
    install("tiny", folders.bert(tmp_path / "source"), folders.ABOUT, root=tmp_path / "cache")
    code = (
        "import sys, pathlib; from urna.models.catalogue import spec; "
        "assert spec('tiny', pathlib.Path(sys.argv[1])).feature_dim == 16; "
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], check=False).returncode == 0


def test_a_built_in_candidate_cannot_be_shadowed_by_what_lies_in_the_cache(tmp_path: Path) -> None:
    install("tiny", folders.bert(tmp_path / "source"), folders.ABOUT, root=tmp_path / "cache")
    shutil.copytree(tmp_path / "cache" / "tiny", tmp_path / "cache" / "cnn")
    assert spec("cnn", tmp_path / "cache") is CATALOGUE["cnn"]
    assert installed(tmp_path / "cache") == ("tiny",)
    assert known(tmp_path / "cache").count("cnn") == 1


@pytest.mark.parametrize("name", ["../tiny", "./tiny", "tiny/", "tiny/../tiny", "", ".", "..", "tiny\0"])
def test_a_path_to_an_installed_candidate_is_no_name(tmp_path: Path, name: str) -> None:
    install("tiny", folders.bert(tmp_path / "source"), folders.ABOUT, root=tmp_path / "cache")
    with pytest.raises(ModelError, match="no candidate is called"):
        spec(name, tmp_path / "cache")


def test_a_cache_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert installed(tmp_path / "nowhere") == ()
