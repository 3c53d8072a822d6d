"""Random rounds of the secure sum against the plainest oracle: one-hot vectors, so that a 2 is a site counted twice."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from tests.privacy.secure_sum_cohort import CAMPAIGN, Cohort, context_of, mutant, one_hot
from urna.privacy import secure_sum
from urna.privacy.secure_sum import Bytes, ServerRole, Upload
from urna.protocol.errors import ProtocolError, ReplayError

SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
sites = st.integers(0, 8)


class Rounds(RuleBasedStateMachine):
    """Rounds over a network that loses, reorders and repeats; sites restart, and the server asks what it may not."""

    protocol = secure_sum
    cohort: Cohort
    server: ServerRole

    @initialize(
        count=st.integers(3, 9), bits=st.sampled_from([16, 24, 32]), num_scalars=st.integers(0, 2), min_cohort=st.integers(2, 3)
    )
    def a_campaign_begins(self, count: int, bits: int, num_scalars: int, min_cohort: int) -> None:
        context = context_of(count, size=count, ring_bits=bits, num_scalars=num_scalars)
        self.cohort = Cohort(context, self.protocol, min_cohort)
        self.num_rounds = 0
        self.a_round_begins()

    def a_round_begins(self) -> None:
        self.num_rounds += 1
        self.cohort.context = replace(self.cohort.context, round_id=f"{CAMPAIGN}/round-{self.num_rounds}")
        self.server = self.cohort.server()
        self.gone: set[str] = set()  # until the next round
        self.burnt: set[str] = set()
        self.uploads: dict[str, Upload] = {}  # that ever left a site
        self.scalars: dict[str, int] = {}
        self.received: set[str] = set()
        self.alive: tuple[str, ...] | None = None
        self.told: dict[str, tuple[str, ...]] = {}  # the list that a site answered
        self.pads: dict[str, Bytes] = {}  # answers to the true list that ever left a site
        self.answered: set[str] = set()
        self.was_read = False

    def name(self, number: int) -> str:
        names = self.cohort.context.names
        return names[number % len(names)]

    def may_answer(self, name: str, alive: Sequence[str]) -> bool:
        """The oracle: what a site may say to a list."""
        return (
            name in self.uploads
            and name in alive
            and name not in self.burnt
            and self.told.get(name, tuple(alive)) == tuple(alive)
            and len(alive) >= max(self.cohort.min_cohort, self.cohort.context.quorum.min_survivors)
        )

    def ask(self, name: str, alive: tuple[str, ...]) -> Bytes | None:
        try:
            pads = self.cohort.roles[name].unmask(self.cohort.context, alive)
        except ProtocolError:
            assert not self.may_answer(name, alive)
            return None
        assert self.may_answer(name, alive)
        self.told[name] = alive
        return pads

    @rule(number=sites)
    def a_site_uploads(self, number: int) -> None:
        name, context = self.name(number), self.cohort.context
        if name in self.gone:
            return
        spent = name in self.uploads or name in self.burnt
        try:
            upload = self.cohort.upload(name, one_hot(context, name), [number - 4] * context.num_scalars)
        except ReplayError:
            assert spent
            return
        assert not spent
        self.uploads[name], self.scalars[name] = upload, number - 4

    @rule(number=sites)
    def an_upload_arrives_early_late_or_again(self, number: int) -> None:
        name = self.name(number)
        if name not in self.uploads:
            return
        welcome = name not in self.received and self.alive is None
        try:
            self.server.add(name, self.uploads[name])
        except ProtocolError:
            assert not welcome
            return
        assert welcome
        self.received.add(name)

    @precondition(lambda self: self.alive is None)
    @rule(number=sites, count=sites)
    def several_sites_upload(self, number: int, count: int) -> None:
        for at in range(number, number + count):
            self.a_site_uploads(at)
            self.an_upload_arrives_early_late_or_again(at)

    @rule(number=sites)
    def a_site_is_started_again(self, number: int) -> None:
        self.cohort.restart(self.name(number))

    @rule(number=sites)
    def a_site_leaves(self, number: int) -> None:
        if number % 3 == 1:
            self.gone.add(self.name(number))

    @rule(number=sites)
    def a_site_gives_the_round_up(self, number: int) -> None:
        if number % 4 == 0:  # seldom: rounds are to open, too
            self.cohort.roles[self.name(number)].burn(self.cohort.context.round_id)
            self.burnt.add(self.name(number))

    @rule()
    def the_server_closes(self) -> None:
        enough = len(self.received) >= self.cohort.context.quorum.min_survivors
        try:
            alive = self.server.close()
        except ProtocolError:
            assert not enough
            return
        assert enough
        assert alive == tuple(sorted(self.received))
        self.alive = alive

    @rule(number=sites, left_out=st.sets(sites, max_size=2))
    def the_server_asks_with_another_list(self, number: int, left_out: set[int]) -> None:
        name, names = self.name(number), self.cohort.context.names
        other = tuple(one for at, one in enumerate(names) if at not in left_out)
        if name not in self.gone and other != self.alive:
            self.ask(name, other)

    @rule(number=sites)
    def a_site_is_asked(self, number: int) -> None:
        name = self.name(number)
        if self.alive is None or name in self.gone:
            return
        pads = self.ask(name, self.alive)
        if pads is not None:
            np.testing.assert_array_equal(pads, self.pads.setdefault(name, pads))

    @rule(number=sites)
    def an_answer_arrives_early_or_again(self, number: int) -> None:
        name = self.name(number)
        if name not in self.pads:
            return
        try:
            self.server.answer(name, self.pads[name])
        except ProtocolError:
            assert name in self.answered
            return
        assert name not in self.answered
        self.answered.add(name)

    @precondition(lambda self: self.alive is not None)
    @rule(number=sites, count=sites)
    def several_sites_answer(self, number: int, count: int) -> None:
        for at in range(number, number + count):
            self.a_site_is_asked(at)
            self.an_answer_arrives_early_or_again(at)

    @precondition(lambda self: not self.was_read)
    @rule(left_out=st.sets(sites, max_size=2), misled=st.none() | sites)
    def the_rest_of_the_round_goes_well(self, left_out: set[int], misled: int | None) -> None:
        for at in set(range(9)) - left_out:
            self.a_site_uploads(at)
            self.an_upload_arrives_early_late_or_again(at)
        if misled is not None:
            self.the_server_asks_with_another_list(misled, {misled + 1})
        self.the_server_closes()
        for at in set(range(9)) - left_out:
            self.a_site_is_asked(at)
            self.an_answer_arrives_early_or_again(at)
        self.the_sum_is_read()

    def count(self) -> None:
        """Called for every sum that was read."""

    @precondition(lambda self: not self.was_read)
    @rule()
    def the_sum_is_read(self) -> None:
        context = self.cohort.context
        try:
            total, scalars = self.server.total()
        except RuntimeError:
            assert len(self.answered) < context.quorum.threshold
            return
        self.was_read = True
        assert self.alive is not None
        assert len(self.answered) >= context.quorum.threshold
        assert len(self.alive) >= context.quorum.min_survivors
        assert total.tolist() == [1 if name in self.alive else 0 for name in context.names]
        expected = sum(self.scalars[name] for name in self.alive) % 2**64
        assert scalars.tolist() == [expected] * context.num_scalars
        self.count()

    @precondition(lambda self: self.was_read or len(self.burnt) > 2 or len(self.gone) > 4)
    @rule()
    def the_next_round_begins_with_the_same_keys(self) -> None:
        self.a_round_begins()

    @invariant()
    def a_round_is_open_with_as_many_answers_as_the_threshold(self) -> None:
        assert self.server.is_open == (len(self.answered) >= self.cohort.context.quorum.threshold)
        assert self.server.answered == self.answered


def test_random_rounds_open_the_plain_sum_or_nothing() -> None:
    """The counts at the end: a search in which rounds never came to their end would prove little."""
    opened: list[tuple[bool, bool]] = []

    class Counted(Rounds):
        def count(self) -> None:
            assert self.alive is not None
            misled = any(told != self.alive for told in self.told.values())
            opened.append((len(self.alive) < len(self.cohort.context.names), misled))

    run_state_machine_as_test(Counted, settings=SETTINGS)
    assert len(opened) >= 50
    assert sum(dropouts for dropouts, _ in opened) >= 20
    assert sum(misled for _, misled in opened) >= 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(peer < self._site for peer in peers)", "(peer > self._site for peer in peers)"),
        ("(len(self._scalars), keys)", "(len(self._scalars), keys[1:])"),
        ('kept.alive_sha256 not in ("", digest)', "False"),
        ("if context.round_id in self.progress:", "if context.round_id in self.progress and len(self._pair_keys):"),
        (">= self._context.quorum.threshold", "> self._context.quorum.threshold"),
        ("at is None or at in self._shares", "at is None"),
    ],
    ids=["sign", "scalars", "second list", "second vector after a restart", "threshold", "double count"],
)
def test_the_random_rounds_find_a_planted_mutant(old: str, new: str) -> None:
    with mutant((old, new)) as changed:

        class Mutated(Rounds):
            protocol = changed

        quick = settings(SETTINGS, phases=[Phase.generate], print_blob=False)
        with pytest.raises(Exception):  # noqa: B017, PT011 - any of the machine's assertions, or several
            run_state_machine_as_test(Mutated, settings=quick)
