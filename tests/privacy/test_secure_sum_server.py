"""The server's role of the secure sum: its order of steps, what it takes, and what it keeps."""

import weakref
from dataclasses import replace

import numpy as np
import pytest

from tests.privacy.secure_sum_cohort import Cohort, context_of, expected_total, one_hot
from tests.privacy.secure_sum_properties import CHANGED
from urna.privacy.secure_sum import Bytes, Item, ServerRole, Upload, alive_digest, opened_items
from urna.protocol.errors import ProtocolError

FOUR = context_of(4)


def test_steps_out_of_order_are_errors_of_ours() -> None:
    cohort = Cohort(FOUR)
    server = cohort.server()
    uploads = cohort.upload_all()
    pads = cohort.roles["site-000"].unmask(FOUR, FOUR.names)
    with pytest.raises(RuntimeError, match="answers are taken after `close`"):
        server.answer("site-000", pads)
    with pytest.raises(RuntimeError, match="the sum opens with 3 answers, found 0"):
        server.total()
    for name, upload in uploads.items():
        server.add(name, upload)
    with pytest.raises(RuntimeError, match="answers are taken after `close`"):
        server.answer("site-000", pads)
    server.close()
    with pytest.raises(RuntimeError, match="the sum opens with 3 answers, found 0"):
        server.total()


def test_a_total_is_taken_once() -> None:
    """A second time the masks would be taken off twice."""
    server = Cohort(FOUR).round()
    assert server.total()[0].tolist() == expected_total(FOUR, FOUR.names)
    with pytest.raises(RuntimeError, match="the total is taken once"):
        server.total()


def test_closing_twice_gives_the_same_list() -> None:
    cohort = Cohort(FOUR)
    server = cohort.round()
    assert server.close() == server.close() == FOUR.names


def test_a_second_upload_of_a_member_is_refused() -> None:
    cohort = Cohort(FOUR)
    server = cohort.server()
    upload = cohort.upload("site-000")
    server.add("site-000", upload)
    with pytest.raises(
        ProtocolError, match="expected one upload of each member, found a second or a foreign one from 'site-000'"
    ):
        server.add("site-000", upload)
    assert server.missing == {"site-001", "site-002", "site-003"}


def test_a_second_answer_is_refused() -> None:
    cohort = Cohort(FOUR)
    server = cohort.round(mute=["site-003"])
    pads = cohort.roles["site-000"].unmask(FOUR, FOUR.names)
    with pytest.raises(ProtocolError, match="expected one answer of each alive holder, found a second or a foreign one"):
        server.answer("site-000", pads)


def test_an_answer_of_a_dead_site_or_of_no_holder_is_refused() -> None:
    cohort = Cohort(context_of(40, size=2))
    names, graph = cohort.context.names, cohort.context.graph
    dead = names[graph.holders[0]]
    outside = next(name for at, name in enumerate(names) if at not in graph.holders)
    server = cohort.received(cohort.upload_all(name for name in names if name != dead))
    alive = server.close()
    holder = names[graph.holders[1]]
    pads = cohort.roles[holder].unmask(cohort.context, alive)
    for name in (dead, outside):
        with pytest.raises(ProtocolError, match=f"expected one answer of each alive holder, found .* from '{name}'"):
            server.answer(name, pads)


@pytest.mark.parametrize(
    "pads",
    [
        np.zeros((3, 32), np.uint8),
        np.zeros((5, 32), np.uint8),
        np.zeros((4, 31), np.uint8),
        np.zeros(128, np.uint8),
        np.zeros((4, 32), np.int8),
        np.zeros((4, 32), np.uint16),
        np.zeros((4, 32, 1), np.uint8),
    ],
    ids=lambda pads: f"{pads.dtype}{pads.shape}",
)
def test_pads_of_another_form_are_refused_and_change_nothing(pads: Bytes) -> None:
    cohort = Cohort(FOUR)
    server = cohort.received()
    alive = server.close()
    with pytest.raises(ProtocolError, match=r"expected pads of \(4, 32\) from site-000, found"):
        server.answer("site-000", pads)
    assert cohort.finished(server) == expected_total(FOUR, alive)


GOOD = Cohort(context_of(4, num_scalars=2)).upload("site-000", scalars=[1, 2])


BAD_UPLOADS = {
    "segment with gaps": replace(GOOD, segments=[np.repeat(GOOD.segments[0], 2)[::2]]),
    "segment read backwards": replace(GOOD, segments=[GOOD.segments[0][::-1]]),
    "no segments": replace(GOOD, segments=[]),
    "long segment": replace(GOOD, segments=[np.zeros(33, np.uint8)]),
    "two segments": replace(GOOD, segments=[GOOD.segments[0], GOOD.segments[0]]),
    "words": replace(GOOD, segments=[np.zeros(32, np.uint32)]),
    "one scalar": replace(GOOD, scalars=GOOD.scalars[:1]),
    "signed scalars": replace(GOOD, scalars=GOOD.scalars.astype(np.int64)),
    "float scalars": replace(GOOD, scalars=GOOD.scalars.astype(np.float64)),
    "scalars the other way round": replace(GOOD, scalars=GOOD.scalars.astype(">u8")),
    "nested scalars": replace(GOOD, scalars=GOOD.scalars[None]),
    "a holder less": replace(GOOD, shares=GOOD.shares[1:]),
    "a share less": replace(GOOD, shares=GOOD.shares[:, 1:]),
    "short shares": replace(GOOD, shares=GOOD.shares[:, :, :31]),
    "signed shares": replace(GOOD, shares=GOOD.shares.astype(np.int8)),
    "a check less": replace(GOOD, checks=GOOD.checks[1:]),
    "long checks": replace(GOOD, checks=np.zeros((4, 17), np.uint8)),
    "wide checks": replace(GOOD, checks=GOOD.checks.astype(np.uint32)),
}


@pytest.mark.parametrize("kind", BAD_UPLOADS)
def test_an_upload_of_another_form_is_refused_and_changes_nothing(kind: str) -> None:
    cohort = Cohort(context_of(4, num_scalars=2))
    server = cohort.server()
    with pytest.raises(ProtocolError, match=r"expected scalars, shares and checks of|expected 1 segments of 32 bytes, found"):
        server.add("site-000", BAD_UPLOADS[kind])
    for name, upload in cohort.upload_all().items():
        server.add(name, upload)
    cohort.ask(server, server.close())
    total, scalars = server.total()
    assert total.tolist() == expected_total(cohort.context, cohort.context.names)
    assert scalars.tolist() == [20, 20]


def test_uploads_as_they_come_from_a_message_are_taken() -> None:
    """Read-only arrays over the bytes of a message, at odd addresses; and a layout in Fortran's order."""

    def received(array: Bytes) -> Bytes:
        return np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].reshape(array.shape)

    context = context_of(4, num_scalars=1)
    cohort, server = Cohort(context), ServerRole(context)
    for name, upload in cohort.upload_all().items():
        segments = [received(one) for one in upload.segments]
        scalars = received(upload.scalars.view(np.uint8)).view(np.uint64)
        server.add(name, Upload(segments, scalars, np.asfortranarray(upload.shares), received(upload.checks)))
    alive = server.close()
    for name in alive:
        server.answer(name, np.asfortranarray(cohort.roles[name].unmask(context, alive)))
    total, scalars = server.total()
    assert total.tolist() == expected_total(context, alive)
    assert scalars.tolist() == [20]


def test_the_vector_and_the_uploads_are_not_changed() -> None:
    cohort = Cohort(context_of(4, num_scalars=1))
    vectors = {name: one_hot(cohort.context, name) for name in cohort.context.names}
    uploads = {name: cohort.upload(name, vectors[name], [1]) for name in cohort.context.names}
    before = {name: (one.segments[0].copy(), one.scalars.copy(), one.shares.copy()) for name, one in uploads.items()}
    server = cohort.server()
    for name, upload in uploads.items():
        server.add(name, upload)
    cohort.ask(server, server.close())
    server.total()
    for name, upload in uploads.items():
        for old, new in zip(before[name], (upload.segments[0], upload.scalars, upload.shares), strict=True):
            np.testing.assert_array_equal(old, new)
        assert vectors[name].tolist() == one_hot(cohort.context, name).tolist()


def test_server_memory_is_flat() -> None:
    """No vector of an upload waits in the server: once it was added it is gone."""
    cohort = Cohort(context_of(13, size=1000))
    server, alive_refs = cohort.server(), list[weakref.ref[Bytes]]()
    for name in cohort.context.names:
        upload = cohort.upload(name)
        alive_refs.append(weakref.ref(upload.segments[0]))
        server.add(name, upload)
        del upload
        assert not any(ref() is not None for ref in alive_refs)


def test_what_a_holder_signs_depends_on_the_list_and_the_context() -> None:
    context = context_of(5)
    digests = {alive_digest(context, alive) for alive in (context.names, context.names[:4], context.names[1:])}
    digests |= {alive_digest(one, one.names) for one in CHANGED.values()}
    assert len(digests) == 3 + len(CHANGED)


def test_the_items_of_a_list_are_in_the_order_of_sites() -> None:
    context = context_of(4)
    assert opened_items(context, ["site-000", "site-001", "site-003"]) == [
        Item(0, 0),
        Item(0, 2, 2),
        Item(1, 0),
        Item(1, 2, 2),
        Item(3, 0),
        Item(3, 3, 2),
    ]
