"""What a site computes for a request: its records, their frozen features, and the integers that go into a sum.

Everything here happens after the ledger has the release, and nothing of it leaves but through `noisy_sum` or `noisy_total`.
Records, features and the last model that was prepared for training stay in memory between requests, as long as the process
lives; features lie in the site's folder, too, encrypted (`feature_cache`).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from urna.client import ballot, evaluation, training
from urna.client.compute import Compute
from urna.client.dataset import DatasetConfig, load_records
from urna.client.feature_cache import FeatureCache, data_version
from urna.client.local_log import Event, write
from urna.client.records import Records, buckets, split
from urna.client.sketch import Sketch, sketch_of
from urna.models.catalogue import spec
from urna.models.loading import Backbone, by_length, load_backbone
from urna.models.preflight import check_head
from urna.models.sizes import trained_size_of
from urna.models.tuning import normalise_for_head
from urna.privacy.counts import CountLayout
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers
from urna.privacy.release import check_fits, check_total_fits, noisy_sum
from urna.protocol.errors import ProtocolError
from urna.protocol.messages import BallotRequest, Envelope, EvaluateRequest, Summed, TrainRequest
from urna.protocol.plan import Name, Plan

if TYPE_CHECKING:
    from urna.models.prepared import Prepared
    from urna.models.tunable import Batch

HEAD_LIMIT = 1e4  # of a vector's numbers: no record's gradient can overflow at such a head
FEATURES_DIR = "features"  # in the site's folder
PREPROCESSING = "2"  # raise it when an adapter changes what the same records become
Features = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Ready:
    """A candidate that was prepared for training, and what for: weights, mode, rank, classes."""

    key: tuple[str, str, int, int]
    backbone: Backbone
    prepared: "Prepared"


@dataclass
class Workbench:
    """One data set of a site, open.

    Args:
        folder: the site's.
        dataset: where the records are.
        data_key: of their split and buckets.
        compute: what models are fine-tuned with here.
        log: of the site, which stays here; says how models were prepared.
    """

    folder: Path
    dataset: DatasetConfig
    data_key: bytes
    compute: Compute = field(default_factory=Compute)
    log: logging.Logger | None = None
    _records: Records | None = None
    _sketch: Sketch | None = None
    _split: dict[float, tuple[Records, Records]] = field(default_factory=dict)
    _features: dict[tuple[str, float], tuple[Features, Features]] = field(default_factory=dict)
    _versions: dict[float, tuple[str, str]] = field(default_factory=dict)
    _ready: Ready | None = None

    def records(self) -> Records:
        """All of them, read once.

        Raises:
            SiteConfigError: they are not as declared.
        """
        if self._records is None:
            self._records = load_records(self.folder, self.dataset, self.data_key)
        return self._records

    def sketch(self) -> Sketch:
        """What the ledger knows them by."""
        if self._sketch is None:
            self._sketch = sketch_of(self.records(), self.data_key)
        return self._sketch

    def split(self, fraction: float) -> tuple[Records, Records]:
        """Tuning and held-out records."""
        if fraction not in self._split:
            self._split[fraction] = split(self.records(), self.data_key, fraction)
        return self._split[fraction]

    def summand(self, envelope: Envelope, request: Summed, plan: Plan, models: Mapping[str, str], site: str) -> Integers:
        """The site's summand, in grid units, its share of the noise included.

        Args:
            envelope: brings the vectors.
            request: what is asked, and at which noise.
            plan: the campaign's.
            models: the hash of every candidate, as the hello fixed it.
            site: this one's name in the cohort.
        """
        grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
        parties = plan.noise_parties(len(request.cohort))
        fraction, multiplier = plan.evaluation.holdout_fraction, request.noise_multiplier
        match request:
            case BallotRequest():
                tuning, count = self.split(fraction)[0], plan.num_buckets(self.dataset.num_records)
                features = [self._both(name, fraction, models)[0] for name in request.candidates]
                rows = ballot.votes(features, tuning.labels, buckets(tuning, self.data_key, count), count)
                return noisy_sum(rows, plan.ballot.clip, multiplier, grid, num_noise_parties=parties, sensitivity_clips=2)
            case TrainRequest():
                return self._train(envelope, request, plan, models, grid, parties, site)
            case EvaluateRequest():
                rows = training.unit_means(self._count_rows(envelope, request, plan, models), self.split(fraction)[1].groups)
                return noisy_sum(rows, 1.0, multiplier, grid, num_noise_parties=parties)
        raise ProtocolError(f"no work is known for a {type(request).__name__}")

    def ready(self, request: Summed, plan: Plan, models: Mapping[str, str]) -> None:
        """Read all weights that a request needs, and check the models that it trains: before anything is reserved.

        Raises:
            ModelError: a file is not what its hash says, no engine is right for a model, or memory is not enough.
        """
        match request:
            case BallotRequest() | EvaluateRequest():
                names: tuple[str, ...] = request.candidates
            case TrainRequest():
                names = (request.candidate,)
            case _:
                return
        if isinstance(request, TrainRequest) and plan.final.tuning == "head":
            check_head(spec(request.candidate).feature_dim, plan.task.num_classes, seed=0)
        trains = plan.final.tuning != "head" and not isinstance(request, BallotRequest)
        for name in names:
            if trains:
                self._prepare(name, plan, models)
            elif (models[name], plan.evaluation.holdout_fraction) not in self._features:
                load_backbone(name, expected_sha256=models[name])

    def _train(
        self,
        envelope: Envelope,
        request: TrainRequest,
        plan: Plan,
        models: Mapping[str, str],
        grid: Grid,
        parties: int,
        site: str,
    ) -> Integers:
        vector = head_of(envelope, "vector", request.candidate, plan)
        data = self._tuned(request.candidate, plan, models)
        if plan.privacy.noise == "shared":
            return training.shared_step(data, vector, plan, request.noise_multiplier, grid, parties)
        declared = {member.site: member.num_records for member in request.cohort}
        batch = plan.final.sample_rate * declared[site] * (1 - plan.evaluation.holdout_fraction)
        change: Floats = training.local_steps(data, vector, plan, request.noise_multiplier, batch, request.index)
        return grid.quantise(change * (declared[site] / sum(declared.values())))

    def _tuned(self, candidate: str, plan: Plan, models: Mapping[str, str]) -> training.Tuned:
        """The tuning records, ready for the plan's mode."""
        fraction = plan.evaluation.holdout_fraction
        tuning = self.split(fraction)[0]
        if plan.final.tuning == "head":
            features = normalise_for_head(self._both(candidate, fraction, models)[0])
            return training.TuningSet(features, tuning.labels, tuning.groups)
        ready = self._prepare(candidate, plan, models)
        lengths = ready.backbone.lengths(tuning.model_inputs)
        return training.ModelSet(ready.prepared, partial(batch_of, ready.backbone, tuning), tuning.groups, lengths)

    def _count_rows(self, envelope: Envelope, request: EvaluateRequest, plan: Plan, models: Mapping[str, str]) -> Floats:
        """One row for each held-out record."""
        fraction = plan.evaluation.holdout_fraction
        layout = CountLayout(len(request.candidates), plan.task.num_classes if request.detail else 0)
        vectors = [head_of(envelope, name, one, plan) for name, one in heads_of(request).items()]
        labels = self.split(fraction)[1].labels
        if plan.final.tuning == "head":
            features = [normalise_for_head(self._both(name, fraction, models)[1]) for name in request.candidates]
            return evaluation.count_rows(features, vectors, labels, layout)
        pairs = zip(request.candidates, vectors, strict=True)
        return evaluation.rows_of([self._logits(name, one, plan, models) for name, one in pairs], labels, layout)

    def _logits(
        self, candidate: str, vector: npt.NDArray[np.float32], plan: Plan, models: Mapping[str, str]
    ) -> npt.NDArray[np.float32]:
        """Of the held-out records (n, num_classes), by a model that was tuned itself."""
        from urna.models.prepared import logits

        ready = self._prepare(candidate, plan, models)
        ready.prepared.tunable.load(vector)
        held = self.split(plan.evaluation.holdout_fraction)[1]
        result = np.zeros((len(held), plan.task.num_classes), np.float32)
        for at, length in by_length(ready.backbone.lengths(held.model_inputs), ready.prepared.parts.size):
            result[at] = logits(ready.prepared, batch_of(ready.backbone, held, at, length))
        return result

    def _prepare(self, candidate: str, plan: Plan, models: Mapping[str, str]) -> Ready:
        """A candidate that can be trained, checked once; one at a time is kept.

        Raises:
            ModelError: it cannot be.
        """
        from urna.models.prepared import prepare

        final, classes = plan.final, plan.task.num_classes
        assert final.tuning != "head"
        key = (models[candidate], final.tuning, final.lora_rank, classes)
        if self._ready is None or self._ready.key != key:
            self._ready = None  # its memory first
            backbone = load_backbone(candidate, expected_sha256=models[candidate])
            prepared = prepare(
                backbone,
                classes,
                final.tuning,
                lora_rank=final.lora_rank,
                device=self.compute.device,
                precision=self.compute.precision,
                micro_batch=self.compute.micro_batch,
            )
            self._ready = Ready(key, backbone, prepared)
            self._say(candidate, plan, prepared)
        return self._ready

    def _say(self, candidate: str, plan: Plan, prepared: "Prepared") -> None:
        if self.log is None:
            return
        tunable = prepared.tunable
        facts = [f"{candidate} for {plan.final.tuning}: engine {prepared.engine.name}, {tunable.size} numbers"]
        if tunable.share_trained < 1:
            facts.append(f"{tunable.share_trained:.1%} of the mode's weights")
        write(self.log, Event.MODEL_PREPARED, "; ".join((*facts, *tunable.notes, *prepared.fallbacks)))

    def _both(self, candidate: str, fraction: float, models: Mapping[str, str]) -> tuple[Features, Features]:
        """Frozen features of the tuning and held-out records, computed once."""
        key = (models[candidate], fraction)
        if key not in self._features:
            backbone = load_backbone(candidate, expected_sha256=models[candidate])
            parts = zip(self.split(fraction), self._version(fraction), strict=True)
            tuning, held = (self._kept(backbone, records, version) for records, version in parts)
            self._features[key] = (tuning, held)
        return self._features[key]

    def _kept(self, backbone: Backbone, records: Records, version: str) -> Features:
        cache = FeatureCache(self.folder / FEATURES_DIR, self.data_key, log=self.log)
        compute = partial(backbone.features, records.model_inputs, self.compute.device)
        return cache.features((backbone.sha256, version, PREPROCESSING), compute)

    def _version(self, fraction: float) -> tuple[str, str]:
        """What tells the tuning and the held-out records from all others."""
        if fraction not in self._versions:
            tuning, held = self.split(fraction)
            self._versions[fraction] = (data_version(tuning, self.data_key), data_version(held, self.data_key))
        return self._versions[fraction]


def batch_of(backbone: Backbone, records: Records, at: npt.NDArray[np.int64], length: int) -> "Batch":
    """Some of the records as a model reads them, padded to this length, with their labels."""
    from torch import from_numpy

    from urna.models.tunable import LABELS

    inputs = records.model_inputs
    chosen = inputs[at] if isinstance(inputs, np.ndarray) else [inputs[one] for one in at]
    return {**backbone.batch(chosen, length), LABELS: from_numpy(records.labels[at])}


def check_grid(request: Summed, plan: Plan) -> None:
    """Whether clip and noise fit the grid that is asked for: a sum of no records, before anything is reserved.

    Raises:
        ProtocolError: they do not.
    """
    grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
    parties, multiplier = plan.noise_parties(len(request.cohort)), request.noise_multiplier
    clip, size, sensitivity_clips, by_engine = 1.0, 1, 1, False
    match request:
        case BallotRequest():
            clip, size, sensitivity_clips = plan.ballot.clip, len(request.candidates), 2
        case TrainRequest():
            clip = plan.final.max_grad_norm
            size = size_of(request.candidate, plan)
            if plan.privacy.noise == "local":
                grid, parties = training.local_grid(clip), 1
            by_engine = plan.final.tuning != "head"
        case EvaluateRequest():
            size = CountLayout(len(request.candidates), plan.task.num_classes if request.detail else 0).size
    try:
        if by_engine:
            check_total_fits(size, clip, multiplier, grid, num_noise_parties=parties)
        else:
            check_fits(size, clip, multiplier, grid, num_noise_parties=parties, sensitivity_clips=sensitivity_clips)
    except ValueError as error:
        raise ProtocolError(f"expected a grid that holds clip and noise, found another: {error}") from None


def heads_of(request: Summed) -> dict[str, Name]:
    """The arrays that a request brings: the name of each, and the candidate whose vector it is."""
    match request:
        case TrainRequest():
            return {"vector": request.candidate}
        case EvaluateRequest():
            return {f"vector-{at}": name for at, name in enumerate(request.candidates)}
    return {}


def size_of(candidate: str, plan: Plan) -> int:
    """How many numbers the plan trains of a candidate.

    Raises:
        ModelError: it is not installed, or cannot be trained in the plan's mode.
    """
    return trained_size_of(candidate, plan.task.num_classes, plan.final.tuning, plan.final.lora_rank)


def head_of(envelope: Envelope, array: str, candidate: str, plan: Plan) -> npt.NDArray[np.float32]:
    """A vector that came with a request: a head, or an offset from the pretrained weights and a zero head.

    Raises:
        ProtocolError: it is missing, of another shape or type, or has numbers that could overflow.
    """
    vector = envelope.arrays.get(array)
    size = size_of(candidate, plan)
    if vector is None or vector.shape != (size,) or vector.dtype != np.float32:
        raise ProtocolError(f"expected a float32 head ({size},) in array {array!r}")
    if not (np.abs(vector) <= HEAD_LIMIT).all():  # false for NaN too
        raise ProtocolError(f"expected a head of numbers up to {HEAD_LIMIT:g}, found larger ones or NaN")
    return np.asarray(vector, dtype=np.float32)
