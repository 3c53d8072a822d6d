"""The example of docs/secure-sum-for-flower.md on Flower's simulation engine and on a real SuperLink with three SuperNodes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import UserConfig

from tests.e2e.superlink import NAME, LoopbackFederation, federation
from urna.client.mean_site import ROUNDS_FILE
from urna.protocol.identity import SITES_DIR, create_consortium

ROOT = Path(__file__).parents[2]
APP = ROOT / "examples" / "secure_quickstart"
SITES = ("site-1", "site-2", "site-3")
CONFIG: UserConfig = {"num-server-rounds": 2, "fraction-evaluate": 1.0, "local-epochs": 2, "learning-rate": 0.05}
DEADLINE_SECONDS = 280
State = dict[str, torch.Tensor]


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Accuracy of a state of the example's model on all test parts."""
    monkeypatch.syspath_prepend(str(APP))
    from secure_quickstart import task  # type: ignore[import-not-found]

    def measured(state: State) -> float:
        net = task.Net()
        net.load_state_dict(state)
        return float(np.mean([task.test(net, task.load_data(part, len(SITES))[1])[1] for part in range(len(SITES))]))

    yield measured
    for name in [name for name in sys.modules if name.startswith("secure_quickstart")]:
        del sys.modules[name]


def simulated(kind: str, folder: Path) -> State:
    """The final model of the example, secure or plain."""
    output = folder / kind
    output.mkdir()
    config = output / "config.json"
    config.write_text(json.dumps(CONFIG | {"consortium-dir": str(folder), "output-dir": str(output)}), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.quickstart_simulation", kind, str(config)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(APP), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS / 2,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return dict(torch.load(output / "final_model.pt", weights_only=True))


def test_on_the_simulation_engine_the_model_is_the_plain_one(tmp_path: Path, accuracy) -> None:  # type: ignore[no-untyped-def]
    create_consortium(tmp_path, SITES)
    state, reference = simulated("secure", tmp_path), simulated("plain", tmp_path)
    assert state.keys() == reference.keys()
    for name in state:
        # Flower's mean of three equal counters can be 27.999..., which a model reads as 27
        tolerance = 2.5 if name.endswith("num_batches_tracked") else 1e-3
        assert torch.allclose(state[name].double(), reference[name].double(), rtol=0, atol=tolerance), name
    assert accuracy(state) > 0.8


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackFederation, Path]]:
    folder = tmp_path_factory.mktemp("consortium")
    create_consortium(folder, SITES)
    with federation(tmp_path_factory.mktemp("link")) as link:
        for number, site in enumerate(SITES):
            link.join(site, folder / SITES_DIR / site, f"partition-id={number} num-partitions={len(SITES)}")
        yield link, folder


def test_on_a_real_superlink_with_three_supernodes(deployed: tuple[LoopbackFederation, Path], accuracy) -> None:  # type: ignore[no-untyped-def]
    """One round: greet, then upload and unmask of train and of evaluate, so that one audit crosses, too."""
    link, folder = deployed
    config = CONFIG | {"num-server-rounds": 1, "consortium-dir": str(folder), "output-dir": str(folder)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    (folder / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    started = time.monotonic()
    link.flwr("run", str(APP), NAME, "--run-config", str(folder / "run.toml"))
    status = "pending"
    while not status.startswith("finished") and time.monotonic() - started < DEADLINE_SECONDS:
        time.sleep(1)
        (run,) = json.loads(link.flwr("ls", NAME, "--format", "json"))["runs"]
        status = run["status"]
    logs = "".join(link.log(member)[-1500:] for member in ("superexec", *SITES))
    assert status == "finished:completed", logs
    print(f"a round of train and evaluate with three SuperNodes: {time.monotonic() - started:.1f} s")
    assert accuracy(torch.load(folder / "final_model.pt", weights_only=True)) > 0.5
    for site in SITES:
        assert (folder / SITES_DIR / site / ROUNDS_FILE).stat().st_mode & 0o777 == 0o600
        assert (folder / SITES_DIR / site / "site.log").read_text("utf-8") == ""
