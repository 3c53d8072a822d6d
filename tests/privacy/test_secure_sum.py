"""Rounds of the secure sum: sums, dropouts, who may take part, and one vector and one list a round."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.privacy.secure_sum_cohort import (
    CAMPAIGN,
    ROUND,
    Cohort,
    changed_contexts,
    context_of,
    expected_total,
    fill_of,
    in_ring,
    key_of,
    member,
    seeds_of,
)
from tests.privacy.secure_sum_properties import second_lists_are_refused
from urna.privacy import secure_sum
from urna.privacy.fixed_point import Grid, Rounding
from urna.privacy.ring import Ring
from urna.privacy.secure_sum import ServerRole, SiteRole, check_cohort, opened_items
from urna.protocol.errors import NonFiniteError, ProtocolError, ReplayError
from urna.protocol.messages import Member
from urna.protocol.quorum import Quorum

BITS = [16, 24, 32]
FOUR = context_of(4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_the_server_opens_the_plain_sum(count: int, bits: int) -> None:
    cohort = Cohort(context_of(count, size=count + 1, ring_bits=bits))
    total, _ = cohort.round().total()
    assert total.tolist() == expected_total(cohort.context, cohort.context.names)


@pytest.mark.parametrize("bits", BITS)
def test_random_vectors_of_several_chunks_are_summed_in_the_ring(bits: int) -> None:
    size, rng = 150_000, np.random.default_rng(5)
    cohort = Cohort(context_of(4, size=size, ring_bits=bits))
    ring, server = cohort.context.ring, cohort.server()
    vectors = {name: rng.integers(0, 2**bits, size, dtype=np.uint64) for name in cohort.context.names}
    for name in cohort.context.names[1:]:
        server.add(name, cohort.upload(name, in_ring(ring, vectors[name])))
    cohort.ask(server, server.close())
    plain = sum((vectors[name] for name in cohort.context.names[1:]), np.zeros(size, np.uint64)) % np.uint64(2**bits)
    np.testing.assert_array_equal(server.total()[0], plain)


def test_an_empty_vector_with_scalars_is_summed() -> None:
    cohort = Cohort(context_of(3, size=0, num_scalars=2))
    total, scalars = cohort.round().total()
    assert total.tolist() == []
    assert scalars.tolist() == [15, 15]


@pytest.mark.parametrize("silent", list(itertools.combinations(range(7), 2)), ids=str)
def test_sites_that_never_upload_are_left_out(silent: tuple[int, ...]) -> None:
    cohort = Cohort(context_of(7))
    names = cohort.context.names
    server = cohort.round(silent=[names[at] for at in silent])
    assert server.total()[0].tolist() == expected_total(
        cohort.context, [name for at, name in enumerate(names) if at not in silent]
    )


@pytest.mark.parametrize("mute", list(itertools.combinations(range(7), 2)), ids=str)
def test_sites_that_leave_between_upload_and_unmask_are_still_counted(mute: tuple[int, ...]) -> None:
    cohort = Cohort(context_of(7))
    names = cohort.context.names
    server = cohort.round(mute=[names[at] for at in mute])
    assert server.is_open
    assert server.total()[0].tolist() == expected_total(cohort.context, names)


def test_sites_may_leave_at_both_points_of_one_round() -> None:
    cohort = Cohort(context_of(10))
    names = cohort.context.names
    server = cohort.round(silent=names[:2], mute=names[9:])
    assert server.answered == frozenset(names[2:9])
    assert server.total()[0].tolist() == expected_total(cohort.context, names[2:])


def test_the_sum_opens_with_the_last_answer_that_is_needed() -> None:
    """Sites that leave while they are asked: whoever answered counts, in whatever order."""
    cohort = Cohort(context_of(7))
    server = cohort.received()
    alive = server.close()
    for number, name in enumerate(reversed(alive), start=1):
        server.answer(name, cohort.roles[name].unmask(cohort.context, alive))
        assert server.is_open == (number >= cohort.context.quorum.threshold)
    assert server.total()[0].tolist() == expected_total(cohort.context, alive)


def test_one_answer_too_few_opens_nothing() -> None:
    cohort = Cohort(context_of(7))
    names = cohort.context.names
    server = cohort.round(mute=names[:3])
    assert len(server.answered) == cohort.context.quorum.threshold - 1
    assert not server.is_open
    with pytest.raises(RuntimeError, match="the sum opens with 5 answers, found 4"):
        server.total()


@pytest.mark.parametrize("count", [64, 200])
def test_a_sparse_graph_survives_the_loss_of_sites_at_both_exchanges(count: int) -> None:
    """Every ninth site never uploads; of the others three holders upload and never answer."""
    cohort = Cohort(context_of(count, size=count, num_scalars=1))
    assert not cohort.context.quorum.is_full
    names = cohort.context.names
    holders = [names[at] for at in cohort.context.graph.holders]
    spare = len(holders) - cohort.context.quorum.threshold - 3
    silent = [name for name in names[::9] if name not in holders[spare:]]
    mute = holders[-3:]
    server = cohort.round(silent, mute)
    alive = [name for name in names if name not in silent]
    assert len(server.answered) >= cohort.context.quorum.threshold
    total, scalars = server.total()
    assert total.tolist() == expected_total(cohort.context, alive)
    assert scalars.tolist() == [5 * len(alive)]


def test_a_cohort_just_above_the_limit_of_full_graphs_is_summed() -> None:
    cohort = Cohort(context_of(34, size=34))
    assert cohort.context.quorum.degree == 32
    silent = cohort.context.names[3:8]
    server = cohort.round(silent)
    assert server.total()[0].tolist() == expected_total(cohort.context, [n for n in cohort.context.names if n not in silent])


def test_two_rounds_with_the_same_keys_are_summed() -> None:
    cohort = Cohort(context_of(4))
    for number in (1, 2, 3):
        cohort.context = replace(cohort.context, round_id=f"{CAMPAIGN}/round-{number}")
        server = cohort.round(silent=cohort.context.names[number : number + 1])
        assert sum(server.total()[0].tolist()) == 3


def test_uploads_in_any_order_give_one_sum() -> None:
    context = context_of(4, size=4)
    cohort = Cohort(context)
    uploads = cohort.upload_all()
    answers = {name: cohort.roles[name].unmask(context, context.names) for name in context.names}
    for order in itertools.permutations(context.names):
        server = ServerRole(context)
        for name in order:
            server.add(name, uploads[name])
        server.close()
        for name in order[::-1]:
            server.answer(name, answers[name])
        assert server.total()[0].tolist() == [1, 1, 1, 1]


SCALARS = [
    ([0, 0, 0], 0),
    ([1, 2, 3], 6),
    ([2**63, 2**63, 7], 7),
    ([2**64 - 1, 1, 0], 0),
    ([-1, -2, -3], 2**64 - 6),
    ([-1, 5, 0], 4),
    ([-(2**63), 2**63 - 1, 0], 2**64 - 1),
    ([2**64, 2**65, 2**64 + 9], 9),
    ([10**12, 10**18, 10**15], 10**12 + 10**18 + 10**15),
]


@pytest.mark.parametrize(("values", "expected"), SCALARS, ids=str)
@pytest.mark.parametrize("silent", [False, True])
def test_scalars_are_exact_modulo_2_to_the_64(values: list[int], expected: int, silent: bool) -> None:
    """Also with a site that stays away, whose masks are taken off."""
    cohort = Cohort(context_of(4, num_scalars=2))
    server = cohort.server()
    given = dict(zip(cohort.context.names, values if silent else [*values, 0], strict=False))
    for name, value in given.items():
        server.add(name, cohort.upload(name, scalars=[value, 1]))
    cohort.ask(server, server.close())
    assert server.total()[1].tolist() == [expected, len(given)]


@pytest.mark.parametrize("scalars", [[], [1], [1, 2, 3]])
def test_another_number_of_scalars_than_agreed_is_an_error_of_ours(scalars: list[int]) -> None:
    cohort = Cohort(context_of(4, num_scalars=2))
    with pytest.raises(RuntimeError, match=f"expected 2 scalars, found {len(scalars)}"):
        cohort.upload("site-000", scalars=scalars)
    cohort.upload("site-000", scalars=[1, 2])  # nothing was spent


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_ring_capacity_boundaries(bits: int, sign: int) -> None:
    """All sites at the bound: no wrap. One unit more at each: the sum is read back with the other sign."""
    for count in (2, 3, 5, 7):
        grid = Grid(0, count, bits)
        for units, wraps in ((grid.bound, False), (grid.bound + 1, True)):
            context = context_of(count, size=3, ring_bits=bits)
            cohort, server = Cohort(context), ServerRole(context)
            vector = grid.to_ring(np.full(3, sign * units))
            for name in context.names:
                server.add(name, cohort.upload(name, vector))
            cohort.ask(server, server.close())
            found = grid.from_ring(server.total()[0]).tolist()
            assert (found == [float(sign * units * count)] * 3) != wraps or (sign < 0 and units * count == 2 ** (bits - 1))


def test_the_bound_is_an_integer_where_float32_would_round_it_up() -> None:
    """2**31 - 1 is 2**31 in float32, and 2**31 wraps."""
    assert int(np.float32(2**31 - 1)) == 2**31
    assert Grid(0, 1, 32).bound == 2**31 - 1
    rounding, out = Rounding(np.full(1, 3e9, np.float32), [(1, Grid(0, 1, 32))]), Ring(32).zeros(1)
    rounding(0, out)
    assert out.tolist() == [2**31 - 1]
    assert Grid(0, 32, 32).bound == 2**26 - 1  # 2**26 - 1 is 2**26 in float32


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_refused(bits: int, bad: float) -> None:
    """Nothing is sent, and the round is used up: nobody can ask for it a second time with other data."""
    cohort = Cohort(context_of(4, ring_bits=bits))
    vector = np.array([0, 0, bad, 0, 0, 0, 0, 0])
    with pytest.raises(NonFiniteError, match="expected finite numbers, found NaN or infinity: nothing is sent"):
        cohort.roles["site-000"].upload(cohort.context, Rounding(vector, [(8, Grid(0, 4, bits))]))
    with pytest.raises(ReplayError, match="was masked before"):
        cohort.upload("site-000")


STRANGE = member("site-001", "stranger")


@pytest.mark.parametrize("seat", ["site-000", "site-001"])
def test_swapped_key_refused(seat: str) -> None:
    """Of the site itself: refused at once. Of a peer: its check shows, and its upload is left out of the sum."""
    swapped = replace(FOUR, cohort=tuple(member(seat, "stranger") if one.site == seat else one for one in FOUR.cohort))
    if seat == "site-000":
        with pytest.raises(ProtocolError, match=r"expected site-000 with its own round key in the cohort, found [0-9a-f]{64}"):
            Cohort(swapped).upload("site-000")
    else:
        cohort, server = Cohort(FOUR), ServerRole(swapped)
        fooled = cohort.roles["site-000"].upload(swapped, fill_of(swapped.ring.zeros(8)))
        server.add("site-000", fooled)
        with pytest.raises(
            ProtocolError, match="expected site-001 and site-000 to share a seed, found two: site-001 is left out"
        ):
            server.add("site-001", cohort.upload("site-001"))


def test_two_sites_whose_keys_are_swapped_are_refused() -> None:
    cohort = (member("site-000", "site-001"), member("site-001", "site-000"), *FOUR.cohort[2:])
    for name in ("site-000", "site-001"):
        with pytest.raises(ProtocolError, match=f"expected {name} with its own round key in the cohort"):
            Cohort(replace(FOUR, cohort=cohort)).upload(name)


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        ((*FOUR.cohort[:3], FOUR.cohort[1]), "expected each site and key once, found duplicates among"),
        ((*FOUR.cohort[:3], STRANGE), "expected each site and key once, found duplicates among"),
        ((*FOUR.cohort[:3], member("site-009", "site-001")), "expected each site and key once, found duplicates among"),
        ((*FOUR.cohort, FOUR.cohort[1]), "expected each site and key once, found duplicates among"),
        (FOUR.cohort[:3], "expected a cohort of at least 4 sites, found 3"),
        ((), "expected a cohort of at least 4 sites, found 0"),
        ((*FOUR.cohort, member("site-004")), "expected 4 sites, found 5"),
    ],
    ids=["doubled", "name twice", "key twice", "padded", "one less", "nobody", "one more"],
)
def test_duplicates_do_not_count(cohort: tuple[Member, ...], message: str) -> None:
    """A cohort that would open less than agreed cannot even be written down."""
    with pytest.raises(ProtocolError, match=message):
        replace(FOUR, cohort=cohort)


def test_duplicates_in_an_alive_list_do_not_count() -> None:
    cohort = Cohort(FOUR)
    cohort.upload_all()
    for alive in (["site-000"] * 4, ["site-000", "site-001", "site-001"], ["site-000", "site-000", "site-001", "site-002"]):
        with pytest.raises(ProtocolError, match="expected a sorted list of different members of the cohort"):
            cohort.roles["site-000"].unmask(FOUR, alive)


def test_unknown_identity_refused() -> None:
    """In a cohort without this site, in an alive list, as sender of an upload, as sender of an answer."""
    cohort, server = Cohort(FOUR), ServerRole(FOUR)
    stranger = SiteRole("site-009", key_of("site-009"), CAMPAIGN, 2)
    with pytest.raises(ProtocolError, match="expected site-009 with its own round key in the cohort, found neither"):
        stranger.upload(FOUR, fill_of(FOUR.ring.zeros(8)))
    uploads = cohort.upload_all()
    for alive in (("site-000", "site-001", "site-009"), (*FOUR.names, "site-009")):
        with pytest.raises(ProtocolError, match="found duplicates or strangers"):
            cohort.roles["site-000"].unmask(FOUR, alive)
    with pytest.raises(ProtocolError, match="found a second or a foreign one from 'site-009'"):
        server.add("site-009", uploads["site-000"])
    for name, upload in uploads.items():
        server.add(name, upload)
    alive = server.close()
    with pytest.raises(ProtocolError, match="expected one answer of each alive holder, found a second or a foreign one"):
        server.answer("site-009", cohort.roles["site-000"].unmask(FOUR, alive))


def test_another_campaign_is_refused() -> None:
    role = SiteRole("site-000", key_of("site-000"), "c-2", 2)
    with pytest.raises(ProtocolError, match="expected site-000 with its own round key in the cohort"):
        role.upload(FOUR, fill_of(FOUR.ring.zeros(8)))


def test_cohort_below_policy_refused() -> None:
    """At upload: too few members, or sums of too few survivors. At unmask: too few of them alive."""
    with pytest.raises(ProtocolError, match="expected a cohort of at least 5 sites, found 4"):
        Cohort(FOUR, min_cohort=5).upload("site-000")
    with pytest.raises(ProtocolError, match="expected sums of at least 4 survivors, found 3"):
        Cohort(FOUR, min_cohort=4).upload("site-000")
    cohort = Cohort(context_of(7))
    cohort.upload_all()
    role = cohort.restart("site-000", min_cohort=7)  # the policy was tightened since
    with pytest.raises(ProtocolError, match="expected at least 7 of 7 sites alive, found 6"):
        role.unmask(cohort.context, cohort.context.names[:6])
    role.unmask(cohort.context, cohort.context.names)


@pytest.mark.parametrize("min_cohort", [-1, 0, 1])
def test_no_policy_lets_a_site_be_summed_alone(min_cohort: int) -> None:
    with pytest.raises(ProtocolError, match="expected a cohort of at least 2 sites, found 1"):
        check_cohort(FOUR.cohort[:1], max(2, min_cohort))
    with pytest.raises(ValueError, match="expected at least two honest sites beside 0 colluding ones, found 1"):
        Quorum(1, 0, 0, 1, 1, 1)
    cohort = Cohort(context_of(2), min_cohort=min_cohort)
    cohort.upload_all()
    with pytest.raises(ProtocolError, match="expected at least 2 of 2 sites alive, found 1"):
        cohort.roles["site-000"].unmask(cohort.context, ["site-000"])


@pytest.mark.parametrize("point", ["00" * 32, "01" + "00" * 31, "ecff" + "ff" * 29 + "7f"])
@pytest.mark.parametrize("count", [4, 40])
def test_a_key_that_makes_the_secret_known_to_all_is_refused_and_the_round_not_used_up(point: str, count: int) -> None:
    """Of any peer: in a sparse graph also of a holder that is no neighbour, or a neighbour that is no holder."""
    good = context_of(count)
    site, own = good.names[0], 0
    holders, around = set(good.graph.holders) - {own}, set(good.graph.neighbours(own))
    chosen = {min(around | holders), *sorted(holders - around)[:1], *sorted(around - holders)[:1]}
    cohort = Cohort(good)
    for at in sorted(chosen):
        weak = good.cohort[at].model_copy(update={"public_key": point})
        context = replace(good, cohort=(*good.cohort[:at], weak, *good.cohort[at + 1 :]))
        with pytest.raises(ProtocolError, match=f"expected an X25519 key of {weak.site}, found a low-order point"):
            cohort.roles[site].upload(context, fill_of(context.ring.zeros(context.size)))
        assert cohort.roles[site].progress == {}
    cohort.upload(site)


def test_a_key_written_in_another_way_gives_other_masks() -> None:
    """X25519 ignores the top bit: a member that registers another's key with this bit set gains nothing."""
    same_point = bytearray.fromhex(FOUR.keys["site-001"])
    same_point[31] |= 0x80
    twin = FOUR.cohort[2].model_copy(update={"public_key": same_point.hex()})
    context = replace(FOUR, cohort=(*FOUR.cohort[:2], twin, FOUR.cohort[3]))
    cohort = Cohort(context)
    seeds = seeds_of(cohort, "site-000", cohort.upload("site-000"))
    assert len(set(seeds)) == 4


def test_both_shares_refused_in_one_request() -> None:
    """A site is in a list or not: for no site does one answer hold its self seed and an edge of it as of a dead one."""
    context = context_of(7)
    for alive in itertools.combinations(context.names, 5):
        items = opened_items(context, alive)
        living = {item.dealer for item in items if item.peer is None}
        dead = {item.peer for item in items if item.peer is not None}
        assert living == {context.index[name] for name in alive}
        assert not living & dead
        assert len(set(items)) == len(items)
    cohort = Cohort(context)
    cohort.upload_all()
    twice = [*context.names, context.names[0]]
    with pytest.raises(ProtocolError, match="expected a sorted list of different members of the cohort, found duplicates"):
        cohort.roles["site-001"].unmask(context, twice)


def test_both_shares_refused_in_two_requests() -> None:
    cohort = Cohort(context_of(7))
    cohort.upload_all()
    role, names = cohort.roles["site-003"], cohort.context.names
    role.unmask(cohort.context, names)
    with pytest.raises(ReplayError, match="round c-1/round-1 was given up, or answered for another alive list or context"):
        role.unmask(cohort.context, names[:6])
    assert second_lists_are_refused(secure_sum, restart=False)


def test_both_shares_refused_across_a_restart() -> None:
    assert second_lists_are_refused(secure_sum, restart=True)


def test_the_same_list_is_answered_again_with_the_same_pads() -> None:
    cohort = Cohort(context_of(7))
    cohort.upload_all()
    first = cohort.roles["site-003"].unmask(cohort.context, cohort.context.names[:6])
    again = cohort.restart("site-003").unmask(cohort.context, cohort.context.names[:6])
    np.testing.assert_array_equal(first, again)


def test_a_refused_list_spends_nothing() -> None:
    cohort = Cohort(context_of(7))
    cohort.upload_all()
    role, before = cohort.roles["site-003"], dict(cohort.roles["site-003"].progress)
    for alive in (cohort.context.names[:4], cohort.context.names[:3] + cohort.context.names[4:], cohort.context.names[::-1]):
        with pytest.raises(ProtocolError):
            role.unmask(cohort.context, alive)
    assert role.progress == before
    role.unmask(cohort.context, cohort.context.names)


def test_replayed_round_refused() -> None:
    """A second vector in one round would open the difference: in no context, nor after a restart."""
    cohort = Cohort(FOUR)
    cohort.upload("site-000")
    for _ in range(2):
        for context in (FOUR, replace(FOUR, request_sha256="cd" * 32), replace(FOUR, size=9)):
            with pytest.raises(
                ReplayError, match=f"round {ROUND} was masked before: a second vector would open the difference"
            ):
                cohort.roles["site-000"].upload(context, fill_of(context.ring.zeros(context.size)))
        cohort.restart("site-000")
    cohort.roles["site-000"].upload(replace(FOUR, round_id="c-1/round-2"), fill_of(FOUR.ring.zeros(8)))


def test_an_unmask_of_another_context_than_was_uploaded_for_is_refused() -> None:
    cohort = Cohort(context_of(5))
    cohort.upload_all()
    for changed in changed_contexts(context_of(5)).values():
        if changed.round_id == ROUND and changed.campaign == CAMPAIGN:
            with pytest.raises(ReplayError, match="was given up, or answered for another alive list or context"):
                cohort.roles["site-000"].unmask(changed, changed.names)


def test_an_unmask_before_an_upload_is_refused() -> None:
    cohort = Cohort(FOUR)
    with pytest.raises(ProtocolError, match=f"expected an unmask after an upload of {ROUND}, found none of site-000"):
        cohort.roles["site-000"].unmask(FOUR, FOUR.names)


def test_a_site_that_uploaded_does_not_answer_a_list_without_itself() -> None:
    cohort = Cohort(context_of(7))
    cohort.upload_all()
    with pytest.raises(ProtocolError, match="expected site-006, which uploaded, among the alive, found it dead: refused"):
        cohort.roles["site-006"].unmask(cohort.context, cohort.context.names[:6])


def test_a_site_without_shares_is_not_asked() -> None:
    cohort = Cohort(context_of(40, size=2))
    outside = next(name for at, name in enumerate(cohort.context.names) if at not in cohort.context.graph.holders)
    cohort.upload(outside)
    with pytest.raises(ProtocolError, match=f"expected a holder of shares, found {outside}"):
        cohort.roles[outside].unmask(cohort.context, cohort.context.names)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("answered", [False, True])
def test_a_burnt_round_is_never_unmasked(restart: bool, answered: bool) -> None:
    cohort = Cohort(FOUR)
    cohort.upload_all()
    if answered:
        cohort.roles["site-000"].unmask(FOUR, FOUR.names)
    cohort.roles["site-000"].burn(ROUND)
    role = cohort.restart("site-000") if restart else cohort.roles["site-000"]
    with pytest.raises(ReplayError, match="was given up"):
        role.unmask(FOUR, FOUR.names)


def test_a_round_burnt_before_its_upload_is_never_masked() -> None:
    cohort = Cohort(FOUR)
    cohort.roles["site-000"].burn(ROUND)
    with pytest.raises(ReplayError, match="was masked before"):
        cohort.upload("site-000")
    with pytest.raises(ReplayError, match="was given up"):
        cohort.roles["site-000"].unmask(FOUR, FOUR.names)
