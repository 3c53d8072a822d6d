"""Each guarantee of the secure sum is seen to break when the line that keeps it is changed."""

import pytest

from tests.privacy.secure_sum_cohort import mutant
from tests.privacy.secure_sum_properties import PROPERTIES
from urna.privacy import secure_sum

MUTANTS = {
    "edge masks all of one sign": ("sums are exact", "(peer < self._site for peer in peers)", "(False for peer in peers)"),
    "edge mask sign swapped": (
        "sums are exact",
        "(peer < self._site for peer in peers)",
        "(peer > self._site for peer in peers)",
    ),
    "self mask left out": (
        "late uploads are hidden",
        "masked(fill, context.size, context.ring, keys),",
        "masked(fill, context.size, context.ring, keys[1:]),",
    ),
    "self mask left out of the scalars": (
        "sums are exact",
        "_masked_scalars(scalars, keys),",
        "_masked_scalars(scalars, keys[1:]),",
    ),
    "threshold not checked at unmask": (
        "small lists are refused",
        "        check_alive(context, alive, self._min_cohort)\n",
        "",
    ),
    "a second list answered": ("second lists are refused", 'kept.alive_sha256 not in ("", digest)', "False"),
    "what was answered is forgotten": ("second lists are refused", "replace(kept, alive_sha256=digest)", "kept"),
    "context not bound into edge seeds": ("contexts are bound", 'b"mask" + context.digest', 'b"mask"'),
    "request left out of the context": ("contexts are bound", ", self.request_sha256]", "]"),
    "graph seed left out of the context": ("contexts are bound", "self.graph_seed.hex(), ", ""),
    "context not bound into pads": ("pads are bound", 'b"pad" + context.digest + label', 'b"pad" + label'),
    "opened seeds not checked": (
        "forged answers open nothing",
        "return self._context.check_of(whose, seed.tobytes()) == check",
        "return len(seed) == SEED_BYTES or not whose",
    ),
    "shares not of the threshold": (
        "sums are exact",
        "shamir.split(seeds, quorum.threshold, quorum.num_holders)",
        "shamir.split(seeds, quorum.threshold + 1, quorum.num_holders)",
    ),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_protocol_has_the_property(name: str) -> None:
    assert PROPERTIES[name](secure_sum)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mutant_is_found(name: str) -> None:
    """Each guarantee is seen to break when the line that keeps it is changed."""
    by, old, new = MUTANTS[name]
    with mutant((old, new)) as protocol:
        assert not PROPERTIES[by](protocol)


def test_a_mutant_that_changes_nothing_has_every_property() -> None:
    with mutant(("SUBSETS_TRIED = 2_000", "SUBSETS_TRIED = 1_999")) as protocol:
        assert all(check(protocol) for check in PROPERTIES.values())


def test_a_mutant_of_a_line_that_is_not_there_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match=r"expected 'no such line' once in secure_sum\.py, found it 0 times"),
        mutant(("no such line", "")),
    ):
        pass
