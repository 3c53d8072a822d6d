"""The dashboard's structure; that its queries return data is asked of a real Prometheus in tests/e2e/test_prometheus.py."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from urna.server.metrics import SHOWN

yaml = pytest.importorskip("yaml")  # published without type information
GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "urna.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
METRICS = {shown.name for shown in SHOWN} | {
    "urna_round_seconds_sum",
    "urna_round_seconds_count",
    "urna_store_up",
    "urna_store_folders",
    "urna_store_read_seconds",
}
every_panel = pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])


def test_panel_ids_are_unique_and_given() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(isinstance(one, int) and one > 0 for one in ids)


@every_panel
def test_a_panel_says_what_it_shows_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]["value"] is None  # the base step


@every_panel
def test_a_panels_queries_have_their_own_names_and_the_chosen_data_source(panel: dict[str, Any]) -> None:
    names = [target["refId"] for target in panel["targets"]]
    assert names
    assert all(re.fullmatch("[A-Z]", name) for name in names)
    assert len(set(names)) == len(names)
    for one in (panel, *panel["targets"]):
        assert one["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


@every_panel
def test_a_panel_asks_for_metrics_that_the_monitor_shows(panel: dict[str, Any]) -> None:
    asked = {name for target in panel["targets"] for name in re.findall(r"\burna_\w+", target["expr"])}
    assert asked <= METRICS


def test_the_panels_of_a_run_ask_for_the_chosen_run_and_those_of_all_runs_do_not() -> None:
    (second,) = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"] if panel.get("repeat") == "run"]
    for panel in PANELS:
        for target in panel["targets"]:
            assert ('run=~"$run"' in target["expr"]) == (panel["gridPos"]["y"] > second), target["expr"]


def test_every_metric_of_a_run_is_on_the_dashboard_or_left_out_on_purpose() -> None:
    asked = {name for panel in PANELS for target in panel["targets"] for name in re.findall(r"\burna_\w+", target["expr"])}
    assert METRICS - asked == {"urna_run_starts_total", "urna_ballot_undecided"}


def test_no_panel_lies_on_another_or_outside_the_grid() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}

    taken = [cells(panel) for panel in DASHBOARD["panels"]]
    assert all(one.isdisjoint(other) for one, other in combinations(taken, 2))
    whole = set[tuple[int, int]]().union(*taken)
    height = max(y for _, y in whole) + 1
    assert whole == {(x, y) for x in range(24) for y in range(height)}  # no hole either


def test_the_variables_are_a_data_source_and_the_runs() -> None:
    source, run = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
    assert (run["name"], run["multi"], run["query"]["query"]) == ("run", True, "label_values(urna_run_info, run)")
    assert run["datasource"] == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}


def test_the_dashboard_is_not_bound_to_one_grafana() -> None:
    assert DASHBOARD["id"] is None
    assert DASHBOARD["schemaVersion"] == 39  # Grafana 11.0; a later one migrates it
    assert "__inputs" not in DASHBOARD


def test_the_provisioning_files_are_read_by_yaml_and_name_a_prometheus() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/urna.yml").read_text("utf-8"))["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/urna.yml").read_text("utf-8"))["providers"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    assert (provider["type"], provider["folder"]) == ("file", "Urna")
