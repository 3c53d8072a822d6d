"""What privacy costs a training step: Urna's engines, Opacus' hooks and ghost clipping, against the same step without privacy.

    time_ratio      a physical batch forward, backward, clipped, summed and applied / the same without per-example clipping
    memory_ratio    peak memory above what the built model takes, likewise
    noise_seconds   of the noise that a logical batch gets once, however many physical ones it has (AES-CTR, one thread)
    time_ratio_256  both together, for a logical batch of 256: (256/B step + noise) / (256/B plain step)
    opacus_hooks, opacus_ghost   the same ratios of Opacus 1.6, without its noise; null with a reason where it cannot serve the
                    model, although it gets Urna's repairs (frozen statistics, position ids by example)

Each model, mode and method in a process of its own, one thread, CPU time (wall time on CUDA), medians of steps. The methods of
a case run one right after the other.

Head: features of the frozen backbone are computed in both steps, as without a cache; `cached_time_ratio` is of the head alone.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from urna.models.tunable import Batch, Tunable

ROOT = Path(__file__).resolve().parent.parent
MODELS, MODES, METHODS = ("bert", "vit", "resnet", "lstm"), ("full", "lora", "head"), ("plain", "urna", "hooks", "ghost")
BATCH, NUM_CLASSES, RANK, CLIP, LEARNING_RATE = 16, 10, 8, 1.0, 1e-3
NUM_STEPS, NUM_TURNS = 6, 1
LOGICAL_BATCH = 256
SECONDS_LIMIT = 900
CEILINGS = {  # (model, mode) -> largest time ratio that was asked for
    ("bert", "full"): 1.5,
    ("vit", "full"): 1.5,
    ("resnet", "full"): 1.9,
    ("lstm", "full"): 4.5,
    ("bert", "lora"): 1.3,
    ("vit", "lora"): 1.3,
    ("resnet", "lora"): 1.8,
    **{(model, "head"): 1.2 for model in MODELS},
}
MEMORY_CEILING = 2.2


@dataclass(frozen=True)
class Sizes:
    """The models of a run: small on a processor, the usual base sizes on CUDA."""

    width: int
    layers: int
    heads: int
    vit_width: int
    vit_heads: int
    image: int
    precision: Literal["float32", "bfloat16"]


SMALL = Sizes(384, 6, 12, 192, 3, 96, "float32")
BASE = Sizes(768, 12, 12, 768, 12, 224, "bfloat16")


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Time all cases; see the module's docstring."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = ("lstm",) if options.quick else MODELS
    cases = [_case(model, mode, device) for model in models for mode in MODES if (model, mode) != ("lstm", "lora")]
    worst = max(cases, key=lambda case: float(str(case["time_over_ceiling"])))
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, one thread",
        "precision": (BASE if device == "cuda" else SMALL).precision,
        "batch": BATCH,
        "logical_batch": LOGICAL_BATCH,
        "memory_ceiling": MEMORY_CEILING,
        "worst_time_over_ceiling": worst["time_over_ceiling"],
        "worst_memory_ratio": max(float(str(case["memory_ratio"])) for case in cases),
        "cases": cases,
        "seed": 0,
    }


def _case(model: str, mode: str, device: str) -> dict[str, object]:
    found: dict[str, list[dict[str, object]]] = {method: [] for method in METHODS}
    for _ in range(NUM_TURNS):
        for method in METHODS:
            if found[method] and "error" in found[method][-1]:
                continue
            found[method].append(_in_a_process(model, mode, method, device))
    plain, urna = found["plain"], found["urna"]
    if "error" in urna[-1]:
        raise SystemExit(f"{model} {mode}: {urna[-1]['error']}")
    step, plain_step = _median(urna, "seconds"), _median(plain, "seconds")
    noise, times = _median(urna, "noise_seconds"), LOGICAL_BATCH / BATCH
    ratio = step / plain_step
    case: dict[str, object] = {
        "model": model,
        "mode": mode,
        "engine": urna[-1]["engine"],
        "trained": urna[-1]["trained"],
        "share_trained": urna[-1]["share_trained"],
        "plain_seconds": round(plain_step, 4),
        "time_ratio": round(ratio, 3),
        "memory_ratio": round(_median(urna, "memory_mb") / _median(plain, "memory_mb"), 2),
        "memory_mb": round(_median(urna, "memory_mb"), 1),
        "noise_seconds": round(noise, 4),
        "time_ratio_256": round((times * step + noise) / (times * plain_step), 3),
        "ceiling": CEILINGS[model, mode],
        "time_over_ceiling": round(ratio / CEILINGS[model, mode], 3),
    }
    for method in ("hooks", "ghost"):
        case[f"opacus_{method}"] = _against(found[method], plain)
    if mode == "head":
        case["cached_time_ratio"] = round(_median(urna, "cached_seconds") / _median(plain, "cached_seconds"), 3)
    print(f"  {model:7} {mode:5} {json.dumps(case)}", flush=True)
    return case


def _against(records: list[dict[str, object]], plain: list[dict[str, object]]) -> dict[str, object]:
    if "error" in records[-1]:
        return {"time_ratio": None, "memory_ratio": None, "reason": records[-1]["error"]}
    return {
        "time_ratio": round(_median(records, "seconds") / _median(plain, "seconds"), 3),
        "memory_ratio": round(_median(records, "memory_mb") / _median(plain, "memory_mb"), 2),
    }


def _median(records: list[dict[str, object]], key: str) -> float:
    return statistics.median(float(str(one[key])) for one in records)


def _in_a_process(model: str, mode: str, method: str, device: str) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.dp_step", model, mode, method, device]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS_LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {SECONDS_LIMIT} seconds"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    record: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return record


# --- one process ---------------------------------------------------------------------------------------------------------


def build(model: str, device: str) -> "tuple[nn.Module, Batch]":
    """A classifier with random weights and a batch."""
    import torch
    import transformers
    from torch import nn

    from urna.models.huggingface import build_features
    from urna.models.tunable import LABELS, Classifier

    torch.manual_seed(0)
    sizes = BASE if device == "cuda" else SMALL
    inputs: dict[str, torch.Tensor]
    if model == "bert":
        config: transformers.PreTrainedConfig = transformers.BertConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=4 * sizes.width,
        )
        inputs = {"input_ids": torch.randint(1, 30_000, (BATCH, 64)), "attention_mask": torch.ones(BATCH, 64, dtype=torch.long)}
        body: nn.Module = build_features(config)
    elif model == "vit":
        config = transformers.ViTConfig(
            hidden_size=sizes.vit_width, num_attention_heads=sizes.vit_heads, intermediate_size=4 * sizes.vit_width
        )
        inputs, body = {"pixel_values": torch.rand(BATCH, 3, 224, 224)}, build_features(config)
    elif model == "resnet":
        config = transformers.ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
        inputs, body = {"pixel_values": torch.rand(BATCH, 3, sizes.image, sizes.image)}, build_features(config)
    else:
        body, inputs = _LSTM(), {"input_ids": torch.randint(1, 5000, (BATCH, 64))}
    body.eval()
    with torch.no_grad():
        dim = body(**{name: one[:1] for name, one in inputs.items()}).shape[1]
    classifier = Classifier(body, torch.zeros(dim), torch.tensor(1.0), NUM_CLASSES).eval()
    nn.init.normal_(classifier.head.weight, std=0.1)  # with a zero head nothing would flow back
    return classifier, {**inputs, LABELS: torch.arange(BATCH) % NUM_CLASSES}


def _LSTM() -> "nn.Module":  # noqa: N802 - a class, but torch is imported late
    from torch import nn

    class Reader(nn.Module):
        """Words, an LSTM, the mean of its states."""

        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5000, 128)
            self.lstm = nn.LSTM(128, 128, batch_first=True)

        def forward(self, input_ids: "torch.Tensor") -> "torch.Tensor":
            mean: torch.Tensor = self.lstm(self.words(input_ids))[0].mean(1)
            return mean

    return Reader()


def run_one(model: str, mode: str, method: str, device: str) -> dict[str, object]:
    """Time one method of one case in this process."""
    import torch

    torch.set_num_threads(1)
    module, batch = build(model, device)
    module.to(device)
    batch = {name: one.to(device) for name, one in batch.items()}
    steps: dict[str, Callable[[], object]]
    facts: dict[str, object]
    if mode == "head":
        steps, facts = _head_steps(module, batch, private=method == "urna", opacus=method in ("hooks", "ghost"))
    else:
        steps, facts = _steps(module, batch, mode, method, device)
    record = {**facts, **_measured(steps["step"], device)}
    if "cached" in steps:
        record["cached_seconds"] = _measured(steps["cached"], device)["seconds"]
    if method == "urna":
        from urna.privacy.mechanisms import integer_noise

        trained = int(str(facts["trained"]))
        record["noise_seconds"] = _measured(lambda: integer_noise(trained, 2.0**20), "cpu", 3)["seconds"]
    return record


def _steps(
    module: "nn.Module", batch: "Batch", mode: str, method: str, device: str
) -> tuple[dict[str, Callable[[], object]], dict[str, object]]:
    import torch

    from urna.models.lora import add_lora
    from urna.models.repairs import repair
    from urna.models.tunable import Tunable, cross_entropy

    if mode == "lora":
        add_lora(module, RANK, 2.0 * RANK)
        for name, one in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one, std=0.01)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    if method == "plain":
        trained = [one for one in module.parameters() if one.requires_grad]
        optimizer = torch.optim.SGD(trained, LEARNING_RATE)

        def plain() -> None:
            optimizer.zero_grad()
            with autocast:
                loss = cross_entropy(module, batch).mean()
            torch.autograd.backward(loss)
            optimizer.step()

        return {"step": plain}, {}
    few = {name: one[:5] for name, one in batch.items()}
    repairs = repair(module, few, cross_entropy)
    tunable = Tunable(module, cross_entropy, repairs.notes, repairs.share_trained)
    if method != "urna":
        return {"step": _opacus_step(tunable, batch, method, autocast)}, {}
    from urna.models.engines import choose
    from urna.models.parts import micro_batches

    precision = (BASE if device == "cuda" else SMALL).precision
    chosen = choose(tunable, few, "lora" if mode == "lora" else "full", precision)
    blank = {name: one[:1] for name, one in batch.items()}
    parts = micro_batches(chosen.engine, tunable, blank, limit=BATCH, precision=chosen.precision)
    parts.settle()
    facts = {"engine": chosen.engine.name, "trained": tunable.size, "share_trained": round(tunable.share_trained, 4)}

    def private() -> None:
        total = parts.clipped_sum(batch, CLIP).total
        with torch.no_grad():
            for name, part in tunable.split(total).items():
                module.get_parameter(name).sub_(part, alpha=LEARNING_RATE / BATCH)

    return {"step": private}, facts


def _opacus_step(tunable: "Tunable", batch: "Batch", method: str, autocast: "torch.autocast") -> Callable[[], object]:
    """Opacus as its guide says, with its own clipping, without its noise."""
    import torch
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
    from opacus.layers import DPLSTM
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    from urna.models.recurrent import RecurrentTwin
    from urna.models.tunable import LABELS

    module = tunable.module
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RecurrentTwin):  # Urna's; Opacus has one of its own
                twin = DPLSTM(child.input_size, child.hidden_size, batch_first=True)
                twin.load_state_dict(child.state_dict())
                setattr(parent, name, twin)
    module.train()
    for part in module.modules():  # statistics stay frozen, and no dropout: the same work as in the other methods
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm | torch.nn.Dropout):
            part.eval()
            part.requires_grad_(False)  # Opacus refuses to train a layer that has buffers: it trains 0.04 % less of a ResNet
    inputs = {name: one for name, one in batch.items() if name != LABELS}
    sgd = torch.optim.SGD([one for one in module.parameters() if one.requires_grad], LEARNING_RATE)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": CLIP, "expected_batch_size": BATCH}
    if method == "hooks":
        sampled = GradSampleModule(module, batch_first=True, loss_reduction="sum", strict=False)
        optimizer = DPOptimizer(sgd, **settings)

        def hooks() -> None:
            optimizer.zero_grad()
            with autocast:
                loss = torch.nn.functional.cross_entropy(sampled(**inputs), batch[LABELS], reduction="sum")
            torch.autograd.backward(loss)
            optimizer.clip_and_accumulate()
            for one in optimizer.params:
                one.grad = one.summed_grad.view_as(one) / BATCH
            sgd.step()

        return hooks
    ghost_module = GradSampleModuleFastGradientClipping(
        module, batch_first=True, loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True, strict=False
    )
    ghost_optimizer = DPOptimizerFastGradientClipping(sgd, **settings)
    criterion = DPLossFastGradientClipping(ghost_module, ghost_optimizer, torch.nn.CrossEntropyLoss(reduction="mean"))

    def ghost() -> None:
        with autocast:
            loss = criterion(ghost_module(**inputs), batch[LABELS])
        loss.backward()
        for one in ghost_optimizer.params:
            one.grad = one.summed_grad.view_as(one) / BATCH if getattr(one, "summed_grad", None) is not None else one.grad
        sgd.step()
        ghost_optimizer.zero_grad()

    return ghost


def _head_steps(
    module: "nn.Module", batch: "Batch", *, private: bool, opacus: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, object]]:
    """Steps of a head on frozen features: as the sites take them, and by torch alone."""
    import numpy as np
    import torch
    from torch.nn import functional

    from urna.models.tunable import LABELS, Classifier
    from urna.models.tuning import normalise_for_head, per_example_gradients
    from urna.privacy.fixed_point import Grid

    if opacus:
        raise SystemExit("Urna's head step is Opacus' hooks on the head: there is nothing to compare")
    assert isinstance(module, Classifier)
    module.head.train()  # Opacus records in training mode only
    inputs, labels, head = {name: one for name, one in batch.items() if name != LABELS}, batch[LABELS], module.head

    def features() -> torch.Tensor:
        with torch.no_grad():
            return torch.from_numpy(normalise_for_head(module.backbone(**inputs).float().cpu().numpy())).to(labels.device)

    optimizer = torch.optim.SGD(head.parameters(), LEARNING_RATE)
    grid = Grid(-20, 1)

    def plain(known: torch.Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(head(known), labels))
        optimizer.step()

    def dp(known: torch.Tensor) -> None:
        rows = per_example_gradients(head, known, labels).cpu().numpy().astype(np.float64)
        total = grid.quantise_rows(rows, CLIP).sum(axis=0) * grid.step * (LEARNING_RATE / BATCH)
        size = head.weight.numel()
        change = torch.from_numpy(total.astype(np.float32)).to(labels.device)
        with torch.no_grad():
            head.weight.sub_(change[:size].view_as(head.weight))
            head.bias.sub_(change[size:])

    step, known = (dp if private else plain), features()
    size = head.weight.numel() + head.bias.numel()
    facts: dict[str, object] = {"engine": "cached", "trained": size, "share_trained": 1.0}
    return {"step": lambda: step(features()), "cached": lambda: step(known)}, facts


def _measured(step: Callable[[], object], device: str, num_steps: int = NUM_STEPS) -> dict[str, object]:
    """Median seconds of a step, and its peak memory above what is there before."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak()
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter() if device == "cuda" else time.process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() if device == "cuda" else time.process_time()) - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak()
    return {"seconds": statistics.median(seconds[1:]), "memory_mb": max(peak - before, 2**20) / 2**20}


def _reset_peak() -> int:
    """Give freed memory back and forget the peak; what this process takes now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    print(json.dumps(run_one(*sys.argv[1:5])))
