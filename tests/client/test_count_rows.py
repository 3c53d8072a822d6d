import numpy as np
import numpy.typing as npt
import pytest

from urna.client.evaluation import count_rows
from urna.privacy.counts import CountLayout
from urna.protocol.errors import ModelError

CLASSES = 3


def a_data_set(
    num_models: int, num_records: int = 40
) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]], npt.NDArray[np.int64]]:
    generator = np.random.default_rng(5)
    dims = [4 + one for one in range(num_models)]
    features = [generator.normal(size=(num_records, dim)).astype(np.float32) for dim in dims]
    vectors = [generator.normal(size=(dim + 1) * CLASSES).astype(np.float32) for dim in dims]
    return features, vectors, generator.integers(0, CLASSES, num_records)


def predicted(features: npt.NDArray[np.float32], vector: npt.NDArray[np.float32]) -> list[int]:
    dim = features.shape[1]
    weight, bias = vector[: dim * CLASSES].reshape(CLASSES, dim), vector[dim * CLASSES :]
    return [int(np.argmax([float(w @ x + b) for w, b in zip(weight, bias, strict=True)])) for x in features]


@pytest.mark.parametrize(("num_models", "detail"), [(1, True), (1, False), (2, False), (3, True)])
def test_a_records_row_is_no_longer_than_one(num_models: int, detail: bool) -> None:
    layout = CountLayout(num_models, CLASSES if detail else 0)
    rows = count_rows(*a_data_set(num_models), layout)
    assert rows.shape == (40, layout.size)
    assert np.linalg.norm(rows, axis=1).max() <= 1 + 1e-12


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_rows_add_up_to_what_is_true(num_models: int) -> None:
    features, vectors, labels = a_data_set(num_models)
    layout = CountLayout(num_models, CLASSES)
    counts = layout.decode(count_rows(features, vectors, labels, layout).sum(axis=0), 1e-9, 40)
    predictions = [predicted(one, vector) for one, vector in zip(features, vectors, strict=True)]
    assert counts.num_records == pytest.approx(40)
    np.testing.assert_allclose(counts.accuracy, [np.mean(np.array(one) == labels) for one in predictions], atol=1e-9)
    confusion = np.zeros((CLASSES, CLASSES))
    for label, prediction in zip(labels, predictions[0], strict=True):
        confusion[label, prediction] += 1
    assert counts.confusion is not None
    np.testing.assert_allclose(counts.confusion, confusion, atol=1e-9)


def test_one_record_more_is_one_row_more() -> None:
    features, vectors, labels = a_data_set(2)
    layout = CountLayout(2)
    fewer = count_rows([one[:-1] for one in features], vectors, labels[:-1], layout)
    np.testing.assert_array_equal(count_rows(features, vectors, labels, layout)[:-1], fewer)


def test_a_site_without_held_out_records_has_no_rows() -> None:
    features, vectors, labels = a_data_set(1, num_records=0)
    assert count_rows(features, vectors, labels, CountLayout(1, CLASSES)).shape == (0, 1 + 1 + 9)


def test_a_head_of_another_candidate_is_refused() -> None:
    features, vectors, labels = a_data_set(1)
    with pytest.raises(ModelError, match="must have a multiple of 5 weights, found 14"):
        count_rows(features, [vectors[0][:-1]], labels, CountLayout(1))
