"""What the private choice is worth on the demo's task: accuracy of what is deployed, against the ways to do without.

    accuracy        the campaign of plans/digits.toml, deployed head on all held-out records
    oracle          the candidate with the best mean over the seeds, fine-tuned with the whole epsilon
    random          the mean candidate, fine-tuned with the whole epsilon
    fine_tune_all   every candidate fine-tuned, jointly accounted; the best by noisy held-out counts is deployed
    shared_minus_pooled   one candidate by secure sum with shared noise, less Opacus' own DPOptimizer on the pooled records at
                    the same epsilon; the shares bear a dropout and no colluder; `..._one_colluder`: one, too
    cost_ratio      CPU seconds of the campaign over those of fine-tuning every candidate the same way

Oracle, random and fine-tune-all are of the same federation: their noise, too, suffices when one site takes its share off.
True held-out accuracy is read with full knowledge, which only a benchmark has.
"""

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tests.simulator import Federation
from urna.models.loading import load_backbone
from urna.models.tuning import normalise_for_head, predict_logits, trainable_size
from urna.privacy.accounting import noise_multiplier_for
from urna.privacy.counts import CountLayout
from urna.privacy.mechanisms import poisson_sample, standard_normal
from urna.protocol.plan import CandidateEntry, Plan, load_plan
from urna.server.journal import Journal
from urna.strategies.budget import final_counts_noise_multiplier

PLAN = Path(__file__).resolve().parent.parent / "plans" / "digits.toml"
EPSILONS = (8.0, 3.0)
POOLED_EPSILONS = (8.0, 3.0, 1.0)
POOLED_CANDIDATE = "pixels"  # the anchor of the research table
Features = npt.NDArray[np.float32]


@dataclass
class Pool:
    """All sites' records of one federation: features of every candidate, tuning and held-out."""

    tuning: dict[str, Features]
    heldout: dict[str, Features]
    tuning_labels: npt.NDArray[np.int64]
    heldout_labels: npt.NDArray[np.int64]

    def accuracy(self, name: str, vector: Features) -> float:
        """True accuracy of a head on all held-out records."""
        return float(np.mean(predict_logits(vector, self.heldout[name]).argmax(axis=1) == self.heldout_labels))


def pool_of(federation: Federation) -> Pool:
    """Look into every site: only a benchmark may."""
    fraction = federation.plan.evaluation.holdout_fraction
    parts = [site.bench(site.config.dataset[0]).split(fraction) for site in federation.sites]
    images = [np.concatenate([part[at].images for part in parts]) for at in (0, 1)]
    labels = [np.concatenate([part[at].labels for part in parts]) for at in (0, 1)]
    features: list[dict[str, Features]] = [{}, {}]
    for entry in federation.plan.candidates:
        backbone = load_backbone(entry.name)
        for at in (0, 1):
            features[at][entry.name] = normalise_for_head(backbone.features(images[at]))
    return Pool(features[0], features[1], labels[0], labels[1])


def opacus_pooled(pool: Pool, name: str, plan: Plan, noise_multiplier: float, num_steps: int) -> Features:
    """Fine-tune a head on the pooled records with Opacus' DPOptimizer: the peer (torch's generator, seeded by ours)."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    features, labels = torch.from_numpy(pool.tuning[name]), torch.from_numpy(pool.tuning_labels)
    linear = torch.nn.Linear(features.shape[1], plan.task.num_classes)
    for parameter in linear.parameters():
        torch.nn.init.zeros_(parameter)
    module = GradSampleModule(linear, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.Adam(module.parameters(), lr=plan.final.learning_rate),
        noise_multiplier=noise_multiplier,
        max_grad_norm=plan.final.max_grad_norm,
        expected_batch_size=plan.expected_batch,
        loss_reduction="mean",
        generator=torch.Generator().manual_seed(int.from_bytes(np.frombuffer(standard_normal(1).tobytes(), np.uint8)[:4])),
    )
    for _ in range(num_steps):
        chosen = torch.from_numpy(poisson_sample(len(labels), plan.final.sample_rate))
        optimizer.zero_grad()
        outputs = module(features[chosen].requires_grad_())
        torch.autograd.backward(torch.nn.functional.cross_entropy(outputs, labels[chosen], reduction="sum"))
        optimizer.step()
    with torch.no_grad():
        return torch.cat([linear.weight.flatten(), linear.bias]).numpy()


def federated(plan: Plan, noise_multiplier: float) -> float:
    """The noise that a sum over all sites carries, when ``noise_multiplier`` of it is accounted."""
    assert plan.federation.virtual is not None
    num_sites = plan.federation.virtual.num_sites
    return noise_multiplier * math.sqrt(num_sites / plan.noise_parties(num_sites))


def with_epsilon(
    plan: Plan, epsilon: float, seed: int, names: tuple[str, ...] | None = None, colluding: int | None = None
) -> Plan:
    """The plan at another epsilon and partition, of some of its candidates, bearing another number of colluders."""
    document = plan.model_dump()
    if colluding is not None:
        document["privacy"]["max_colluding_sites"] = colluding
    document["privacy"]["epsilon"] = epsilon
    document["federation"]["virtual"]["seed"] = seed
    if names is not None:
        document["candidates"] = [CandidateEntry(name=name).model_dump() for name in names]
    return Plan.model_validate(document)


def run_federation(plan: Plan) -> tuple[Federation, str, Features, float]:
    """A campaign in memory: the federation, the winner, its head, CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder) / "run", plan)
        started = time.process_time()
        federation.run()
        cpu_seconds = time.process_time() - started
        journal = Journal.read(federation.run_dir)
        entry = journal.find("model")
        assert entry is not None
        vector = np.asarray(entry.arrays["vector"], dtype=np.float32)
        journal.close()
        for site in federation.sites:
            site.bench(site.config.dataset[0]).split(plan.evaluation.holdout_fraction)  # read before the folder goes
        return federation, entry.value["candidate"], vector, cpu_seconds


def fine_tune_all(pool: Pool, plan: Plan, names: list[str]) -> float:
    """Accuracy of the best of all by noisy held-out counts, every training step of every candidate accounted together."""
    privacy, final = plan.privacy, plan.final
    multiplier = noise_multiplier_for(privacy.epsilon, privacy.delta, final.num_rounds * len(names), final.sample_rate)
    heads = [opacus_pooled(pool, name, plan, federated(plan, multiplier), final.num_rounds) for name in names]
    layout = CountLayout(len(names))
    logits = [predict_logits(head, pool.heldout[name]) for head, name in zip(heads, names, strict=True)]
    rows = layout.rows(pool.heldout_labels, np.stack([one.argmax(axis=1) for one in logits], axis=1))
    noise = federated(plan, final_counts_noise_multiplier(plan, [], last_attempt=True))
    counts = layout.decode(rows.sum(axis=0) + noise * standard_normal(layout.size), noise, plan.num_heldout_records)
    best = int(counts.accuracy.argmax())
    return pool.accuracy(names[best], heads[best])


def measure(options: argparse.Namespace) -> dict[str, object]:
    """All numbers, means over the seeds."""
    torch.set_num_threads(1)
    base = load_plan(PLAN)
    names = [entry.name for entry in base.candidates]
    pooled = {f"{epsilon:g}": _shared_minus_pooled(base, epsilon, options.seeds, 0) for epsilon in POOLED_EPSILONS}
    bearing_one = {f"{epsilon:g}": _shared_minus_pooled(base, epsilon, options.seeds, 1) for epsilon in POOLED_EPSILONS}
    results = [_one_epsilon(base, epsilon, names, options.seeds) for epsilon in EPSILONS]
    return {
        "epsilon": list(EPSILONS),
        **{key: [one[key] for one in results] for key in results[0]},
        "shared_minus_pooled": pooled,
        "shared_minus_pooled_one_colluder": bearing_one,
        "seeds": options.seeds,
        "seed": list(range(options.seeds)),
        "plan": base.sha256,
    }


def _one_epsilon(base: Plan, epsilon: float, names: list[str], seeds: int) -> dict[str, object]:
    deployed, all_tuned, winners, cpu = [], [], [], []
    each: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(seeds):
        plan = with_epsilon(base, epsilon, seed)
        federation, winner, vector, seconds = run_federation(plan)
        pool = pool_of(federation)
        deployed.append(pool.accuracy(winner, vector))
        winners.append(winner)
        cpu.append(seconds)
        whole = noise_multiplier_for(epsilon, plan.privacy.delta, plan.final.num_rounds, plan.final.sample_rate)
        for name in names:
            head = opacus_pooled(pool, name, plan, federated(plan, whole), plan.final.num_rounds)
            assert head.size == trainable_size(pool.tuning[name].shape[1], plan.task.num_classes)
            each[name].append(pool.accuracy(name, head))
        all_tuned.append(fine_tune_all(pool, plan, names))
        print(f"epsilon {epsilon:g} seed {seed}: {winner} {deployed[-1]:.4f}, fine-tune-all {all_tuned[-1]:.4f}", flush=True)
    cost_all = sum(run_federation(with_epsilon(base, epsilon, 0, (name,)))[3] for name in names)
    means = {name: statistics.mean(values) for name, values in each.items()}
    return {
        "accuracy": round(statistics.mean(deployed), 4),
        "accuracy_stdev": round(statistics.stdev(deployed), 4) if seeds > 1 else None,
        "oracle": round(max(means.values()), 4),
        "random": round(statistics.mean(means.values()), 4),
        "fine_tune_all": round(statistics.mean(all_tuned), 4),
        "cost_ratio": round(statistics.mean(cpu) / cost_all, 3),
        "each": {name: round(mean, 4) for name, mean in means.items()},
        "winners": winners,
    }


def _shared_minus_pooled(base: Plan, epsilon: float, seeds: int, colluding: int) -> float:
    differences = []
    for seed in range(seeds):
        plan = with_epsilon(base, epsilon, seed, (POOLED_CANDIDATE,), colluding)
        federation, winner, vector, _ = run_federation(plan)
        pool = pool_of(federation)
        whole = noise_multiplier_for(epsilon, plan.privacy.delta, plan.final.num_rounds, plan.final.sample_rate)
        peer = opacus_pooled(pool, winner, plan, whole, plan.final.num_rounds)
        differences.append(pool.accuracy(winner, vector) - pool.accuracy(winner, peer))
    mean = statistics.mean(differences)
    print(f"epsilon {epsilon:g}, {colluding} colluders: shared - pooled {mean:+.4f}", flush=True)
    return round(statistics.mean(differences), 4)
