"""What a site computes for a request: its records, their frozen features, and the integers that go into a sum.

Everything here happens after the ledger has the release, and nothing of it leaves but through `noisy_sum`. Records and features
stay in memory between requests, as long as the process lives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from urna.client import ballot, evaluation, training
from urna.client.dataset import DatasetConfig, load_records
from urna.client.records import Records, buckets, split
from urna.client.sketch import Sketch, sketch_of
from urna.models.catalogue import spec
from urna.models.loading import load_backbone
from urna.models.preflight import check_head
from urna.models.tuning import normalise_for_head, trainable_size
from urna.privacy.counts import CountLayout
from urna.privacy.fixed_point import Grid
from urna.privacy.mechanisms import Floats, Integers
from urna.privacy.release import check_fits, noisy_sum
from urna.protocol.errors import ProtocolError
from urna.protocol.messages import BallotRequest, Envelope, EvaluateRequest, Summed, TrainRequest
from urna.protocol.plan import Name, Plan

HEAD_LIMIT = 1e4  # of a head's numbers: no record's gradient can overflow at such a head
Features = npt.NDArray[np.float32]


@dataclass
class Workbench:
    """One data set of a site, open.

    Args:
        folder: the site's.
        dataset: where the records are.
        data_key: of their split and buckets.
    """

    folder: Path
    dataset: DatasetConfig
    data_key: bytes
    _records: Records | None = None
    _sketch: Sketch | None = None
    _split: dict[float, tuple[Records, Records]] = field(default_factory=dict)
    _features: dict[tuple[str, float], tuple[Features, Features]] = field(default_factory=dict)

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
            envelope: brings the heads.
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
                layout = CountLayout(len(request.candidates), plan.task.num_classes if request.detail else 0)
                features = [normalise_for_head(self._both(name, fraction, models)[1]) for name in request.candidates]
                vectors = [head_of(envelope, name, one, plan) for name, one in heads_of(request).items()]
                held = self.split(fraction)[1]
                rows = training.unit_means(evaluation.count_rows(features, vectors, held.labels, layout), held.groups)
                return noisy_sum(rows, 1.0, multiplier, grid, num_noise_parties=parties)
        raise ProtocolError(f"no work is known for a {type(request).__name__}")

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
        check_head(spec(request.candidate).feature_dim, plan.task.num_classes, seed=0)
        fraction = plan.evaluation.holdout_fraction
        tuning = self.split(fraction)[0]
        features = normalise_for_head(self._both(request.candidate, fraction, models)[0])
        data = training.TuningSet(features, tuning.labels, tuning.groups)
        vector = head_of(envelope, "vector", request.candidate, plan)
        if plan.privacy.noise == "shared":
            return training.shared_step(data, vector, plan, request.noise_multiplier, grid, parties)
        declared = {member.site: member.num_records for member in request.cohort}
        batch = plan.final.sample_rate * declared[site] * (1 - fraction)
        change: Floats = training.local_steps(data, vector, plan, request.noise_multiplier, batch)
        return grid.quantise(change * (declared[site] / sum(declared.values())))

    def _both(self, candidate: str, fraction: float, models: Mapping[str, str]) -> tuple[Features, Features]:
        """Frozen features of the tuning and held-out records, computed once."""
        key = (models[candidate], fraction)
        if key not in self._features:
            backbone = load_backbone(candidate, expected_sha256=models[candidate])
            tuning, held = self.split(fraction)
            self._features[key] = (backbone.features(tuning.images), backbone.features(held.images))
        return self._features[key]


def check_grid(request: Summed, plan: Plan) -> None:
    """Whether clip and noise fit the grid that is asked for: a sum of no records, before anything is reserved.

    Raises:
        ProtocolError: they do not.
    """
    grid = Grid(request.step_exp, len(request.cohort), request.ring_bits)
    parties, multiplier = plan.noise_parties(len(request.cohort)), request.noise_multiplier
    clip, size, sensitivity_clips = 1.0, 1, 1
    match request:
        case BallotRequest():
            clip, size, sensitivity_clips = plan.ballot.clip, len(request.candidates), 2
        case TrainRequest():
            clip = plan.final.max_grad_norm
            size = trainable_size(spec(request.candidate).feature_dim, plan.task.num_classes)
            if plan.privacy.noise == "local":
                grid, parties = training.local_grid(clip), 1
        case EvaluateRequest():
            size = CountLayout(len(request.candidates), plan.task.num_classes if request.detail else 0).size
    try:
        check_fits(size, clip, multiplier, grid, num_noise_parties=parties, sensitivity_clips=sensitivity_clips)
    except ValueError as error:
        raise ProtocolError(f"expected a grid that holds clip and noise, found another: {error}") from None


def heads_of(request: Summed) -> dict[str, Name]:
    """The arrays that a request brings: the name of each, and the candidate whose head it is."""
    match request:
        case TrainRequest():
            return {"vector": request.candidate}
        case EvaluateRequest():
            return {f"vector-{at}": name for at, name in enumerate(request.candidates)}
    return {}


def head_of(envelope: Envelope, array: str, candidate: str, plan: Plan) -> npt.NDArray[np.float32]:
    """A head that came with a request.

    Raises:
        ProtocolError: it is missing, of another shape or type, or has numbers that could overflow.
    """
    vector = envelope.arrays.get(array)
    size = trainable_size(spec(candidate).feature_dim, plan.task.num_classes)
    if vector is None or vector.shape != (size,) or vector.dtype != np.float32:
        raise ProtocolError(f"expected a float32 head ({size},) in array {array!r}")
    if not (np.abs(vector) <= HEAD_LIMIT).all():  # false for NaN too
        raise ProtocolError(f"expected a head of numbers up to {HEAD_LIMIT:g}, found larger ones or NaN")
    return np.asarray(vector, dtype=np.float32)
