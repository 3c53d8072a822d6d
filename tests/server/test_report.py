import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulator import Federation, entries
from urna.models.pretrain import pretrain
from urna.protocol.errors import RunError
from urna.protocol.plan import Plan, parse_plan
from urna.server.journal import JOURNAL_FILE, Journal, Json, begin
from urna.server.progress import describe
from urna.server.report import Report
from urna.server.report_page import HTML_FILE, JSON_FILE, headline, render, write_report
from urna.server.report_reading import read_report

PLAN = """
name = "digits"
[task]
num_classes = 10
[privacy]
epsilon = 3.0
delta = 1e-5
noise = "shared"
[federation]
min_sites = 4
num_records = 1797
[federation.virtual]
dataset = "digits"
num_sites = 5
[runoff]
num_rounds = 1
[final]
num_rounds = 3
sample_rate = 0.25
learning_rate = 0.05
[evaluation]
num_curve_points = 1
[[candidates]]
name = "pixels"
[[candidates]]
name = "rff"
[[candidates]]
name = "cnn"
"""
GAUSSIAN = '{"GaussianDpEvent":{"noise_multiplier":3.5}}'
HOSTILE = '</title></svg><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{1}$ {{ 7 * 7 }} & "quoted"'


def a_round(stage: str, epsilon: float, **facts: Any) -> Json:
    partition = "heldout" if stage == "evaluation" else "tuning"
    sites = ["site-1", "site-2", "site-3", "site-4"]
    base = {"cohort": sites, "survivors": sites, "dropped": {}, "opened": True, "seconds": 0.5}
    cost = {"partition": partition, "event": GAUSSIAN, "count": 1, "noise_multiplier": 3.5, "epsilon": epsilon}
    return base | {"stage": stage} | cost | facts


def counts(names: list[str], accuracy: list[float], *, detail: bool = False) -> Json:
    confusion = (np.eye(10) * 33 + np.linspace(-4, 4, 100).reshape(10, 10)).tolist() if detail else None
    stderr = [0.015] * len(names)
    values = {"num_records": 340.0, "accuracy": accuracy, "accuracy_stderr": stderr}
    return {"candidates": names, "confusion": confusion, "confusion_noise_std": 4.0} | values


def statement(total: float) -> Json:
    return {"epsilon": total, "delta": 1e-5, "epsilon_by_stage": {"ballot": 1.0, "final": total - 0.4}, "rows": []}


def judged(name: str, *reasons: str) -> Json:
    return {"name": name, "trainable_parameters": 650, "noise_to_signal": 0.2, "reasons": list(reasons)}


def standing(name: str, score: float) -> Json:
    return {"name": name, "score": score, "stderr": 0.01}


def facts_of_a_run() -> dict[str, Json]:
    """A finished run by hand, in the order of a real one: an undecided ballot, a runoff, a lost round, a refusal."""
    members = {f"site-{number}": {"num_records": 300 + number, "urna_version": "0.1.0"} for number in (1, 2, 3, 4)}
    standings = [standing("rff", 0.02), standing("cnn", 0.015), standing("pixels", -0.05)]
    return {
        "start/1": {"versions": {"urna": "0.1.0", "torch": "2.13.0"}},
        "models": {"cnn": "ab" * 32},
        "ask/hello": {"body": '{"campaign": "run-7"}', "signature": ""},
        "hello": {"members": members, "others": {"site-5": "refused: budget: 0.2 of 3 are left; cohort: too small"}},
        "shortlist": {
            "candidates": [judged("cnn"), judged("rff"), judged("pixels"), judged("vit", "licence X is not accepted")]
        },
        "round/ballot/1": a_round("ballot", 1.0, attempt=1),
        "ballot": {"opened": True, "standings": standings, "contenders": ["rff", "cnn"], "undecided": True},
        "schedule": {"finalists": ["rff", "cnn"], "runoff_rounds": 1, "num_releases": 3, "noise_multiplier": 2.8},
        "round/runoff/rff/1": a_round("runoff", 1.4, candidate="rff", index=1, of=2),
        "round/runoff/cnn/1": a_round(
            "runoff", 1.7, candidate="cnn", index=1, of=2, opened=False, dropped={"site-4": "silent"}
        ),
        "round/evaluation/runoff/1": a_round("evaluation", 0.9, candidates=["rff", "cnn"], purpose="runoff", attempt=1),
        "counts/runoff": counts(["rff", "cnn"], [0.86, 0.9]),
        "decision": {"winner": "cnn", "by": "runoff", "undecided": True},
        "start/2": {"versions": {"urna": "0.1.0", "torch": "2.13.1"}},
        "round/final/2": a_round("final", 2.5, candidate="cnn", index=2, of=2),
        "round/evaluation/curve-2/1": a_round("evaluation", 1.5, candidates=["cnn"], purpose="curve-2", attempt=1),
        "counts/curve-2": counts(["cnn"], [0.93]),
        "model": {"candidate": "cnn", "steps": 2},
        "round/evaluation/final/1": a_round("evaluation", 2.2, candidates=["cnn"], purpose="final", attempt=1),
        "counts/final": counts(["cnn"], [0.955], detail=True),
        **{f"reply/close/{site}": {"body": "{}", "signature": "00"} for site in ("site-1", "site-2", "site-3")},
        "statements": {"site-1": statement(2.5), "site-2": statement(2.4), "site-3": statement(2.3)},
        "finished": {"winner": "cnn"},
    }


def recorded(run_dir: Path, facts: dict[str, Json], plan: Plan | None = None) -> Path:
    begin(run_dir, plan or parse_plan(PLAN), engine="memory")
    journal = Journal.open_for_writing(run_dir)
    for key, value in facts.items():
        journal.record(key, value)
    journal.close()
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return recorded(tmp_path / "run-7", facts_of_a_run())


class Page(HTMLParser):
    """Collects what matters of a page: tags, attributes, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_report_is_a_view_of_the_journal_alone(run_dir: Path) -> None:
    page = write_report(run_dir)
    first = (page.read_bytes(), (run_dir / JSON_FILE).read_bytes())
    bare = run_dir.parent / "elsewhere"
    bare.mkdir()
    (bare / JOURNAL_FILE).write_bytes((run_dir / JOURNAL_FILE).read_bytes())
    write_report(bare)
    assert ((bare / HTML_FILE).read_bytes(), (bare / JSON_FILE).read_bytes()) == first


def test_report_json_holds_the_answer_and_its_uncertainty(run_dir: Path) -> None:
    write_report(run_dir)
    report = json.loads((run_dir / JSON_FILE).read_text())
    assert report["winner"] == "cnn"
    assert (report["decided_by"], report["undecided"]) == ("runoff", True)
    assert (report["accuracy"], report["accuracy_stderr"]) == (0.955, 0.015)
    assert 0.9 < report["macro_f1"] < 1
    assert 0 < report["macro_f1_stderr"] < 0.1
    assert len(report["per_class"]) == 10
    assert 0.05 < report["baseline_majority_accuracy"] < 0.2
    assert [(one["name"], one["rank"], one["contender"], one["shortlisted"]) for one in report["ranking"]] == [
        ("rff", 1, True, True),
        ("cnn", 2, True, True),
        ("pixels", 3, False, True),
        ("vit", None, False, False),
    ]
    assert report["ranking"][3]["reasons"] == ["licence X is not accepted"]
    assert report["learning_curve"] == [
        {"round": 2, "accuracy": 0.93, "stderr": 0.015},
        {"round": 3, "accuracy": 0.955, "stderr": 0.015},
    ]
    assert (report["resumed"], report["versions"]["torch"], report["run_id"]) == (1, "2.13.1", "run-7")
    assert report["noise"]["max_colluding_sites"] == report["plan"]["privacy"]["max_colluding_sites"]


def test_report_epsilon_is_the_statements(run_dir: Path) -> None:
    spent = read_report(run_dir).epsilon_spent
    assert spent.max == 2.5
    assert spent.sites["site-2"].stages == {"ballot": 1.0, "final": 2.0}
    assert spent.missing == ("site-4",)
    page = Page(write_report(run_dir).read_text()).text
    assert "at epsilon 2.50 of 3.00" in page
    assert "Stages do not add up to the total" in page
    assert "No statement came from site-4: count the planned epsilon there." in page


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (("site-1", "site-2", "site-3"), "when it came; the signed bytes of all are kept in the journal"),
        (("site-2",), "when it came; the signed bytes of 1 of 3 are kept in the journal"),
        ((), "Each signature was checked when it came. No statement came from site-4"),
    ],
)
def test_report_says_whose_signed_statements_can_be_checked_again(tmp_path: Path, kept: tuple[str, ...], words: str) -> None:
    facts = facts_of_a_run()
    for site in {"site-1", "site-2", "site-3"} - set(kept):
        del facts[f"reply/close/{site}"]
    report = read_report(recorded(tmp_path / "run-7", facts))
    assert report.epsilon_spent.kept == kept
    assert words in Page(render(report)).text


def test_report_names_refusals_dropouts_and_lost_rounds(run_dir: Path) -> None:
    report = read_report(run_dir)
    assert [(one.site, one.reasons) for one in report.refused] == [
        ("site-5", ("budget: 0.2 of 3 are left", "cohort: too small"))
    ]
    assert [(one.round, one.site, one.why) for one in report.dropouts] == [("runoff/cnn/1", "site-4", "silent")]
    assert [one.lost for one in report.left if one.what == "clipped gradients of cnn"] == [1, 0]
    text = Page(render(report)).text
    assert "7 rounds were asked, 1 was lost" in text
    assert "runoff/cnn/1 site-4 silent" in text


def test_what_left_the_sites_is_counted_in_numbers(run_dir: Path) -> None:
    left = [(one.stage, one.what, one.numbers, one.times) for one in read_report(run_dir).left]
    assert left == [
        ("ballot", "votes over the candidates", 3, 1),
        ("runoff", "clipped gradients of rff", 650, 1),
        ("runoff", "clipped gradients of cnn", 650, 1),
        ("evaluation", "counts: right answers of the finalists", 3, 1),
        ("final", "clipped gradients of cnn", 650, 1),
        ("evaluation", "counts: right answers so far", 2, 1),
        ("evaluation", "counts: right answers and the confusion matrix", 102, 1),
    ]


def test_a_runoff_too_close_to_call_says_so(run_dir: Path) -> None:
    text = Page(write_report(run_dir).read_text()).text
    assert "The ballot was undecided: its noise cannot tell rff and cnn apart." in text
    assert "The best two are only 1.9 standard errors apart: rff may be as good." in text


@pytest.mark.parametrize("length", range(len(facts_of_a_run()) + 1))
def test_report_of_a_run_cut_anywhere_can_be_drawn(tmp_path: Path, length: int) -> None:
    run_dir = recorded(tmp_path / "run-7", dict(list(facts_of_a_run().items())[:length]))
    report = read_report(run_dir)
    assert report.finished == (length == len(facts_of_a_run()))
    assert ("Not finished: running or stopped at stage" in Page(render(report)).text) is not report.finished


@pytest.mark.parametrize(
    ("last", "stage"),
    [
        ("start/1", "hello"),
        ("hello", "hello"),
        ("shortlist", "shortlist"),
        ("round/ballot/1", "ballot"),
        ("round/runoff/cnn/1", "runoff"),
        ("round/final/2", "final"),
        ("model", "final"),
        ("counts/final", "evaluation"),
        ("statements", "close"),
    ],
)
def test_report_of_an_unfinished_run_says_so(tmp_path: Path, last: str, stage: str) -> None:
    facts = facts_of_a_run()
    kept = list(facts)[: list(facts).index(last) + 1]
    report = read_report(recorded(tmp_path / "run-7", {key: facts[key] for key in kept}))
    assert report.state == f"running or stopped at stage {stage}"
    assert headline(report) == f"Not finished: running or stopped at stage {stage}."
    assert "urna resume" in Page(render(report)).text


def test_final_counts_that_were_lost_are_not_made_up(tmp_path: Path) -> None:
    facts = facts_of_a_run()
    del facts["counts/final"]
    report = read_report(recorded(tmp_path / "run-7", facts))
    assert report.accuracy is None
    assert report.per_class == ()
    assert (
        headline(report)
        == "Fine-tune cnn; how good it is is not known, for the final counts were lost, at epsilon 2.50 of 3.00."
    )


def tuned(**changes: Any) -> Json:
    """What a campaign of another mode than "head" records after its shortlist."""
    fine = {"size": 1234, "reason": "", "engine": "hooks", "share_trained": 1.0, "notes": [], "fallbacks": []}
    cnn = fine | {
        "engine": "vmap",
        "share_trained": 0.875,
        "notes": ["batch norm 1 became group norm"],
        "fallbacks": ["book-keeping cannot serve this model: a layer of no known kind"],
    }
    return {"mode": "full", "candidates": {"rff": fine, "cnn": cnn | changes}}


def with_tuning(value: Json) -> dict[str, Json]:
    """The run by hand, with one more entry at its place."""
    facts: dict[str, Json] = {}
    for key, one in facts_of_a_run().items():
        facts |= {key: one} | ({"tuning": value} if key == "shortlist" else {})
    return facts


def test_engine_repairs_and_fallbacks_of_the_winner_are_said_in_report_page_and_log(tmp_path: Path) -> None:
    run_dir = recorded(
        tmp_path / "run-7", with_tuning(tuned()), parse_plan(PLAN.replace("[final]", '[final]\ntuning = "full"'))
    )
    page = Page(write_report(run_dir).read_text()).text
    for words in (
        "cnn, mode full: 1,234 numbers were trained, 87.5% of what the mode trains.",
        "Engine of per-example gradients: vmap, by the operator's preflight.",
        "Repair: batch norm 1 became group norm.",
        "Fallback: book-keeping cannot serve this model: a layer of no known kind.",
    ):
        assert words in page
    found = json.loads((run_dir / JSON_FILE).read_text())["preparation"]
    assert found == {"mode": "full", "numbers": 1234} | {
        key: value for key, value in tuned()["candidates"]["cnn"].items() if key not in ("size", "reason")
    }
    lines = describe(entries(run_dir), parse_plan(PLAN)).lines
    assert "preflight: rff is trained by hooks" in lines
    assert "preflight: cnn is trained by vmap; book-keeping cannot serve this model: a layer of no known kind" in lines


def test_a_head_has_no_engine_to_speak_of(run_dir: Path) -> None:
    assert read_report(run_dir).preparation is None
    assert "preflight" not in Page(write_report(run_dir).read_text()).text


@pytest.mark.parametrize("last", ["shortlist", "tuning", "round/ballot/1", "decision"])
def test_before_the_decision_there_is_no_winners_engine(tmp_path: Path, last: str) -> None:
    facts = with_tuning(tuned())
    kept = list(facts)[: list(facts).index(last) + 1]
    report = read_report(recorded(tmp_path / "run-7", {key: facts[key] for key in kept}))
    assert (report.preparation is not None) == (last == "decision")
    assert headline(report).startswith("Not finished: running or stopped at stage ")
    assert last != "tuning" or report.state.endswith("stage shortlist")
    assert "Not finished" in Page(render(report)).text


def test_hostile_reasons_of_a_preflight_are_escaped(tmp_path: Path) -> None:
    """Notes and fallbacks quote names of modules, which come from a model's own files."""
    value = tuned(notes=[HOSTILE], fallbacks=[HOSTILE], engine=HOSTILE)
    page = Page(render(read_report(recorded(tmp_path / "run-7", with_tuning(value)))))
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("alert(1)") == 3


def test_a_plan_without_a_confusion_matrix_has_a_report(tmp_path: Path) -> None:
    plan = parse_plan(PLAN.replace("num_curve_points = 1", "num_curve_points = 1\nconfusion = false"))
    facts = facts_of_a_run() | {"counts/final": counts(["cnn"], [0.955])}
    report = read_report(recorded(tmp_path / "run-7", facts, plan))
    assert (report.accuracy, report.macro_f1, report.confusion) == (0.955, None, None)
    assert [one.numbers for one in report.left][-1] == 2
    text = Page(render(report)).text
    assert "95.5 % ± 1.5" in text
    assert "macro F1" not in text


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    facts = facts_of_a_run()
    facts["hello"]["others"] = {HOSTILE: f"refused: {HOSTILE}"}
    facts["start/2"] = {"versions": {HOSTILE: HOSTILE}}
    facts["shortlist"]["candidates"][2] = judged(HOSTILE)
    facts["shortlist"]["candidates"][3] = judged("vit", HOSTILE)
    facts["ballot"]["standings"][2] = standing(HOSTILE, -0.05)
    facts["round/runoff/cnn/1"]["dropped"] = {HOSTILE: HOSTILE}
    facts["ask/hello"]["body"] = json.dumps({"campaign": HOSTILE})
    facts["statements"][HOSTILE] = statement(1.0)
    facts["models"] = {HOSTILE: HOSTILE}
    report = read_report(recorded(tmp_path / "run-7", facts))
    text = render(report.model_copy(update={"plan": report.plan | {"name": HOSTILE}, "state": HOSTILE}))
    page = Page(text)
    assert not {"script", "img", "iframe", "link", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("alert(1)") > 8  # it is there, as text
    assert "49" not in re.findall(r"frac{1}\$ (\S+)", page.text)


def test_the_page_needs_no_network_and_no_script(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text())
    assert "script" not in page.tags
    assert not {"src", "srcset", "action"} & {name for name, _ in page.attributes}
    references = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(value and value.startswith("#") for value in references)
    assert ("http-equiv", "Content-Security-Policy") in page.attributes


def test_every_figure_is_an_image_with_a_title_and_ids_of_its_own(run_dir: Path) -> None:
    page = Page(write_report(run_dir).read_text())
    assert page.tags.count("figure") == page.attributes.count(("role", "img")) == 3
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    labels = [value for name, value in page.attributes if name == "aria-labelledby"]
    assert labels == ["ranking-title", "curve-title", "spending-title"]
    assert "Ranking: rff +2.0, cnn +1.5, pixels -5.0" in page.text


def test_local_noise_is_explained_as_what_it_is(tmp_path: Path) -> None:
    plan = parse_plan(PLAN.replace('noise = "shared"', 'noise = "local"'))
    report = read_report(recorded(tmp_path / "run-7", facts_of_a_run(), plan))
    assert report.noise.kind == "local"
    assert report.left[1].what == "clipped changes of rff"
    text = Page(render(report)).text
    assert "The cost holds if the site itself adds its noise as agreed." in text
    assert "The noise is shared" not in text


def test_limits_name_what_made_this_run_an_experiment(run_dir: Path) -> None:
    limits = " ".join(read_report(run_dir).limits)
    for words in ("folders of one person (engine: memory)", "1 of 7 rounds were lost", "340 ± 6", "The unit is a record"):
        assert words in limits


def test_numbers_that_are_none_are_null_in_json(run_dir: Path) -> None:
    report = read_report(run_dir).model_copy(update={"accuracy": math.nan, "epsilon_planned": math.inf})
    assert json.loads(report.model_dump_json(), parse_constant=lambda name: pytest.fail(name))["accuracy"] is None


def test_writing_again_leaves_two_files_and_nothing_half_written(run_dir: Path) -> None:
    write_report(run_dir)
    write_report(run_dir)
    assert {path.name for path in run_dir.iterdir()} >= {JSON_FILE, HTML_FILE}
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"expected a run's folder \(with journal.sqlite\), found none"):
        write_report(tmp_path)


def test_report_of_a_real_campaign_with_a_site_that_drops_out(tmp_path: Path) -> None:
    for name in ("pixels", "rff", "cnn"):
        pretrain(name)
    federation = Federation(tmp_path / "run-1", parse_plan(PLAN))
    federation.faults["site-5"] = lambda route, reply: None if route == "query.ballot" else reply
    federation.run()
    report = read_report(tmp_path / "run-1")
    assert isinstance(report, Report)
    assert report.finished
    assert report.epsilon_spent.missing == ()
    assert report.epsilon_spent.kept == tuple(report.epsilon_spent.sites)
    assert report.epsilon_spent.max is not None
    assert report.epsilon_spent.max <= report.epsilon_planned + 1e-9
    assert ("ballot/1", "site-5", "silent") in [(one.round, one.site, one.why) for one in report.dropouts]
    text = Page(write_report(tmp_path / "run-1").read_text()).text
    assert "none was lost" in text  # the others' sum opened
    assert "ballot/1 site-5 silent" in text
    lines = describe(entries(tmp_path / "run-1"), parse_plan(PLAN)).lines
    assert "ballot/1: site-5 dropped out (silent); the sum of 4 opened, the campaign goes on" in lines
    assert not [line for line in lines if "lost" in line]


def test_a_round_lost_without_a_dropout_is_told_as_such(tmp_path: Path) -> None:
    """Every upload came, too few unmasked."""
    facts = facts_of_a_run()
    facts["round/runoff/cnn/1"]["dropped"] = {}
    run_dir = recorded(tmp_path / "run-7", facts)
    text = Page(write_report(run_dir).read_text()).text
    assert "7 rounds were asked, 1 was lost" in text
    assert "Every site answered every round it was asked." not in text
    lines = describe(entries(run_dir), parse_plan(PLAN)).lines
    assert "runoff/cnn/1: too few sites unmasked; the round is lost, the campaign goes on" in lines
