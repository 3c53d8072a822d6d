"""Whole campaigns in memory on texts, with a tiny BERT that was installed: head, LoRA and full; then predictions."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import folders
from tests.simulator import Federation, entries
from urna.client.site import open_site
from urna.client.vault import create_keys
from urna.models.installed import install
from urna.models.sizes import trained_size_of
from urna.protocol.errors import BadInputError, ModelError
from urna.protocol.identity import OPERATOR, OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, Roster, create_identity
from urna.protocol.plan import Plan
from urna.server.artefact import BACKBONE_DIR, MODEL_DIR, load_model, write_model
from urna.server.inputs import read_texts
from urna.server.journal import begin
from urna.server.prose import plan_in_words
from urna.server.report_reading import read_report

NUM_SITES, NUM_RECORDS = 3, 60  # of each
POLICY = "epsilon_total = 8\nepsilon_per_campaign = 8\ndelta = 1e-4\nmin_cohort = 3\n"


def a_plan(tuning: str, noise: str = "shared", names: tuple[str, ...] = ("tiny",), **final: object) -> Plan:
    return Plan.model_validate(
        {
            "name": "notes",
            "task": {"modality": "text", "num_classes": 2},
            "candidates": [{"name": name} for name in names],
            "privacy": {"epsilon": 8.0, "delta": 1e-4, "noise": noise},
            "federation": {"min_sites": NUM_SITES, "num_records": NUM_SITES * NUM_RECORDS},
            "shortlist": {"max_noise_to_signal": 1000.0},
            "runoff": {"num_rounds": 1},
            "final": {"tuning": tuning, "lora_rank": 2, "num_rounds": 2, "sample_rate": 0.3, "learning_rate": 0.01} | final,
            "evaluation": {"num_curve_points": 0},
        }
    )


CAMPAIGNS = {
    "head": a_plan("head", names=("tiny", "tiny2")),
    "lora-shared": a_plan("lora"),
    "full-local": a_plan("full", "local", local_steps=2, local_optimizer="adam", local_learning_rate=1e-3),
}


class TextFederation(Federation):
    """Sites whose records are texts of a few words."""

    def __post_init__(self) -> None:
        begin(self.run_dir, self.plan, engine="memory")
        operator = create_identity(OPERATOR, self.run_dir / OPERATOR_KEY_FILE)
        keys = {}
        for number in range(1, NUM_SITES + 1):
            folder, name = self.run_dir / SITES_DIR / f"site-{number}", f"site-{number}"
            keys[name] = create_keys(folder, name).public_key_hex
            write_texts(folder / "records.csv", name, seed=number)
            (folder / "site.toml").write_text(site_toml(name), encoding="utf-8")
        roster = Roster(operator=operator.public_key_hex, sites=keys).model_dump_json()
        for name in keys:
            (self.run_dir / SITES_DIR / name / ROSTER_FILE).write_text(roster, encoding="utf-8")
        (self.run_dir / ROSTER_FILE).write_text(roster, encoding="utf-8")
        self.sites = [open_site(self.run_dir / SITES_DIR / name) for name in keys]


def write_texts(path: Path, site: str, seed: int) -> None:
    """Of the dog, or of the cat; some are empty of both, and lengths differ."""
    generator = np.random.default_rng(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "text"])
        for number in range(NUM_RECORDS):
            label = number % 2
            words = [*generator.choice(folders.WORDS[7:], generator.integers(0, 8)), ("dog", "cat")[label]]
            writer.writerow([f"{site}-{number}", label, " ".join(generator.permutation(words))])


def site_toml(name: str) -> str:
    dataset = [
        'name = "notes"\nformat = "csv"\nmodality = "text"\npath = "records.csv"',
        f"num_records = {NUM_RECORDS}\nnum_classes = 2\nmax_characters = 200",
    ]
    return "\n".join([f'name = "{name}"', "[[dataset]]", *dataset, "[policy]", POLICY])


@pytest.fixture(scope="module", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two tiny BERTs, in a cache of their own."""
    root = tmp_path_factory.mktemp("cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("URNA_CACHE_DIR", str(root))
        for seed, name in enumerate(("tiny", "tiny2")):
            install(name, folders.bert(root / "published" / name, seed), folders.ABOUT)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(CAMPAIGNS))
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    found = TextFederation(tmp_path_factory.mktemp("runs") / "run-1", CAMPAIGNS[request.param], keeps_wire=False)
    found.run()
    write_model(found.run_dir)
    return found


def test_a_campaign_on_texts_runs_to_its_end_within_its_budget(federation: Federation) -> None:
    report, final = read_report(federation.run_dir), federation.plan.final
    assert report.finished
    assert report.winner is not None
    assert report.epsilon_spent.max is not None
    assert report.epsilon_spent.max <= federation.plan.privacy.epsilon
    model = next(entry for entry in entries(federation.run_dir) if entry.key == "model")
    size = trained_size_of(report.winner, 2, final.tuning, final.lora_rank)
    assert model.arrays["vector"].shape == (size,)
    assert (model.arrays["vector"] == 0).sum() <= 3  # noise may come to 0 by chance


def test_the_folder_labels_texts_and_stands_alone(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URNA_CACHE_DIR", str(tmp_path / "empty"))
    model = load_model(federation.run_dir)
    assert model.config.modality == "text"
    assert (federation.run_dir / MODEL_DIR / BACKBONE_DIR / "tokenizer.json").is_file()
    texts = ("the dog runs", "", "a cat sleeps and she runs fast")
    labels, probabilities = model.predict(texts)
    assert labels.shape == (3,)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    alone = np.concatenate([model.predict((text,))[1] for text in texts])
    np.testing.assert_allclose(probabilities, alone, atol=1e-5)  # a text's label does not depend on its company
    assert model.predict(())[1].shape == (0, 2)
    with pytest.raises(ModelError, match="expected a sequence of texts"):
        model.predict(np.zeros((1, 8, 8)))
    assert "text-classification" in (federation.run_dir / MODEL_DIR / "README.md").read_text()
    assert "read_texts(" in (federation.run_dir / MODEL_DIR / "README.md").read_text()


def test_an_altered_backbone_of_a_folder_is_refused(federation: Federation, tmp_path: Path) -> None:
    shutil.copytree(federation.run_dir / MODEL_DIR, tmp_path / MODEL_DIR)
    path = tmp_path / MODEL_DIR / BACKBONE_DIR / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ModelError, match="must have sha256"):
        load_model(tmp_path)


def test_a_candidate_of_images_is_dropped_from_a_plan_of_texts() -> None:
    words = plan_in_words(a_plan("lora", names=("tiny", "cnn")))
    assert "dropped: reads image, not text" in words
    assert "low-rank factors (rank 2)" in words


# --- files of texts


def test_texts_are_read_from_csv_json_lines_and_plain_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,note\n1,"the dog, it runs"\n2,\n')
    (tmp_path / "b.jsonl").write_text('{"note": "the dog"}\n{"note": "a\\ncat", "id": 3}\n')
    (tmp_path / "c.txt").write_text("the dog\r\na cat")
    assert read_texts(tmp_path / "a.csv", "note") == ("the dog, it runs", "")
    assert read_texts(tmp_path / "b.jsonl", "note") == ("the dog", "a\ncat")
    assert read_texts(tmp_path / "c.txt") == ("the dog", "a cat")


BAD = {
    "no column": ("a.csv", b"id,note\n1,x\n", "expected a column 'text' in the first line"),
    "ragged": ("a.csv", b"id,text\n1\n", "line 2: expected 2 fields, found 1"),
    "no quote's end": ("a.csv", b'text\n"x', "expected texts in UTF-8, found Error"),
    "no UTF-8": ("a.txt", b"\xff\xfe", "expected texts in UTF-8, found UnicodeDecodeError"),
    "no JSON": ("a.jsonl", b"{", "line 1: expected a JSON object"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, "line 1: expected a JSON object"),
    "no object": ("a.jsonl", b"[1]", "line 1: expected a text under 'text'"),
    "no text": ("a.jsonl", b'{"text": 1}', "line 1: expected a text under 'text'"),
    "too long": ("a.txt", b"a" * 1_000_001, "line 1: a text has at most 1000000 characters, found 1000001"),
    "too long in a csv": ("a.csv", b"text\n" + b"a" * 1_000_001, "line 2: a text has at most 1000000 characters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_texts_are_one_line(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError, match=message) as caught:
        read_texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_too_many_texts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    monkeypatch.setattr("urna.server.inputs.ROWS_LIMIT", 2)
    with pytest.raises(BadInputError, match="at most 2 texts are read at once"):
        read_texts(tmp_path / "a.txt")
