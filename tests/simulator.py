"""A whole campaign in memory: the same `run_campaign` and `Site.receive`, sealed as ever, no Flower, faults on demand.

federation = Federation(run_dir, plan)          # virtual sites as the embedded engine makes them
federation.faults["site-2"] = silent_at("train", nth=3)        # a reply is lost, altered, or made to fail
federation.tampered["site-2"] = bit_flipped                    # the same of its sealed replies, as the relay could
federation.unreached["site-3"] = lambda request: request.kind == "unmask"    # a request never arrives
federation.run()

    hello -> [upload -> unmask -> (abort)] ... -> close        every arrow is an exchange: one call of `ask`

Without a campaign's accounting, a single round: `with federation.stages() as stages: stages.train(...)`.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from urna.client.site import Site, open_site
from urna.embedded import prepare
from urna.protocol.identity import OPERATOR, OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, Identity, load_identity, load_roster
from urna.protocol.messages import AnyRequest, Envelope, Head, read_request
from urna.protocol.plan import Plan, load_plan
from urna.protocol.sealing import Parcel, seal, unseal
from urna.server.campaign import run_campaign
from urna.server.exchange import Clock
from urna.server.journal import Entry, Journal, begin
from urna.server.rounds import Rounds
from urna.server.stages import Stages

PLAN = Path(__file__).parents[1] / "plans" / "digits.toml"
Fault = Callable[[str, Envelope], Envelope | None]  # (route, reply) -> what arrives, sealed again by that site
Tampering = Callable[[str, Parcel], Parcel | None]  # (route, sealed reply) -> what arrives


@dataclass
class Federation:
    """Virtual sites and the link between them and the server.

    Args:
        run_dir: the run's folder; the sites' folders are in it.
        plan: what is run.
        faults: by site, what becomes of its replies before they are sealed.
        tampered: by site, what becomes of its sealed replies.
        unreached: by site, which requests never arrive at it.
        site_toml: changes every site's configuration before the sites are opened.
        keeps_wire: whether all that crossed is kept: `parcels` as the relay sees them, and in `wire` the envelopes in them.
    """

    run_dir: Path
    plan: Plan
    faults: dict[str, Fault] = field(default_factory=dict)
    tampered: dict[str, Tampering] = field(default_factory=dict)
    unreached: dict[str, Callable[[AnyRequest], bool]] = field(default_factory=dict)
    site_toml: Callable[[str], str] = str
    keeps_wire: bool = True
    wire: list[Envelope] = field(default_factory=list)
    parcels: list[Parcel] = field(default_factory=list)
    echoed: list[tuple[str, str, Head | None]] = field(default_factory=list)  # request id, site, the head that it was shown
    last_request: Parcel = field(init=False)  # that some site got
    slept_seconds: float = 0.0  # what the operator waited for people; nobody does really
    sites: list[Site] = field(default_factory=list)
    working: tuple[str, str] = ("", "")  # the site that handles a request at this moment, and the request's id

    def __post_init__(self) -> None:
        begin(self.run_dir, self.plan, engine="memory")
        prepare(self.run_dir, self.plan)
        folders = sorted((self.run_dir / SITES_DIR).iterdir(), key=lambda one: int(one.name.split("-")[1]))
        for file in (folder / "site.toml" for folder in folders):
            file.write_text(self.site_toml(file.read_text("utf-8")), encoding="utf-8")
        self.sites = [open_site(folder) for folder in folders]

    @cached_property
    def operator(self) -> Identity:
        """Who asks."""
        return load_identity(OPERATOR, self.run_dir / OPERATOR_KEY_FILE)

    @property
    def clock(self) -> Clock:
        """Time passes here only while somebody sleeps."""

        def sleep(seconds: float) -> None:
            self.slept_seconds += seconds

        return Clock(lambda: self.slept_seconds, sleep)

    def run(self) -> None:
        """Run, or go on with, the campaign."""
        run_campaign(self.run_dir, self, self.operator, load_roster(self.run_dir / ROSTER_FILE))

    @contextmanager
    def stages(self) -> Iterator[Stages]:
        """The campaign's stages after the hello, to ask single rounds with."""
        journal = Journal.open_for_writing(self.run_dir)
        try:
            rounds = Rounds(self, journal, self.operator, load_roster(self.run_dir / ROSTER_FILE), self.plan)
            stages = Stages(self.run_dir.name, self.plan, journal, rounds)
            stages.hello()
            yield stages
        finally:
            journal.close()

    def site(self, name: str) -> Site:
        """By name."""
        return next(one for one in self.sites if one.config.name == name)

    def addresses(self, at_least: int, timeout_seconds: float) -> Sequence[int]:  # noqa: ARG002 - the seam's signature
        """Every site, by number."""
        return range(len(self.sites))

    def ask(
        self,
        route: str,
        requests: Mapping[int, Parcel],
        timeout_seconds: float,  # noqa: ARG002 - the seam's signature
    ) -> Iterator[tuple[int, Parcel | None]]:
        """Hand each request to its site, pass the reply through the site's fault; one reply at a time is alive here."""
        waiting = deque(requests.items())
        try:
            while waiting:
                address, request = waiting.popleft()
                reply = self._handled(route, address, request)
                if reply is not None:
                    yield address, reply
                del reply
        finally:  # sent all the same where the server waits for no more replies
            for address, request in waiting:
                self._handled(route, address, request)

    def opened(self, address: int, request: Parcel) -> tuple[Envelope, Head | None]:
        """A request as its site reads it, with the head that it is shown."""
        site = self.sites[address]
        return unseal(site.identity, site.roster, request, OPERATOR)

    def _handled(self, route: str, address: int, request: Parcel) -> Parcel | None:
        site = self.sites[address]
        name = site.config.name
        opened, echoed = self.opened(address, request)
        self._note(request, opened)
        self.last_request = request
        asked = read_request(opened.body)
        self.echoed.append((asked.request_id, name, echoed))
        if name in self.unreached and self.unreached[name](asked):
            return None
        self.working = (name, asked.request_id)
        reply: Parcel | None = self._faulty(route, site, request, site.receive(request))
        if reply is not None and name in self.tampered:
            reply = self.tampered[name](route, reply)
        return reply

    def _faulty(self, route: str, site: Site, request: Parcel, reply: Parcel) -> Parcel | None:
        """The reply after the site's fault, sealed again where it is another."""
        fault = self.faults.get(site.config.name)
        if fault is None and not self.keeps_wire:
            return reply
        opened, head = unseal(self.operator, site.roster, reply, answers=request.sha256)
        altered = opened if fault is None else fault(route, opened)
        if altered is None:
            return None
        if altered is not opened:
            reply = seal(site.identity, site.roster, altered, {OPERATOR: head}, request.sha256)
        self._note(reply, altered)
        return reply

    def _note(self, parcel: Parcel, envelope: Envelope) -> None:
        if self.keeps_wire:
            self.parcels.append(parcel)
            self.wire.append(envelope)


def silent(_route: str, _reply: Envelope) -> None:
    """Every reply is lost."""


def once(fault: Fault, route: str, nth: int = 1) -> Fault:
    """``fault`` at the nth reply of a route only."""
    seen = 0

    def wrapped(this: str, reply: Envelope) -> Envelope | None:
        nonlocal seen
        seen += this == route
        return fault(this, reply) if this == route and seen == nth else reply

    return wrapped


def always(fault: Fault, route: str) -> Fault:
    """``fault`` at every reply of a route."""
    return lambda this, reply: fault(this, reply) if this == route else reply


def lost(route: str, nth: int = 1) -> Fault:
    """The nth reply of a route is lost."""
    return once(silent, route, nth)


def small(
    *,
    noise: str = "shared",
    if_undecided: str = "runoff",
    num_rounds: int = 4,
    names: Sequence[str] = ("pixels", "pca", "cnn"),
    num_curve_points: int = 1,
    **federation: object,
) -> Plan:
    """The digits plan with few rounds and candidates."""
    document = load_plan(PLAN).model_dump()
    document["candidates"] = [{"name": name} for name in names]
    document["privacy"]["noise"] = noise
    document["ballot"]["if_undecided"] = if_undecided
    document["runoff"]["num_rounds"] = 2
    document["final"] |= {"num_rounds": num_rounds, "local_steps": 3 if noise == "local" else 1}
    document["evaluation"]["num_curve_points"] = num_curve_points
    document["federation"] |= federation
    return Plan.model_validate(document)


def entries(run_dir: Path) -> list[Entry]:
    """All of a run's journal, arrays included."""
    journal = Journal.read(run_dir)
    try:
        return journal.entries(with_arrays=True)
    finally:
        journal.close()


def value(run_dir: Path, key: str) -> dict[str, object]:
    """What the journal says under a key."""
    return next(entry.value for entry in entries(run_dir) if entry.key == key)


def rounds(run_dir: Path) -> dict[str, Entry]:
    """The rounds of a run by their keys, in order."""
    return {entry.key.removeprefix("round/"): entry for entry in entries(run_dir) if entry.kind == "round"}


def bodies(federation: Federation, kind: str) -> list[tuple[str, dict[str, object]]]:
    """Sender and body of every envelope of a kind that crossed the wire."""
    found = [(one.sender, json.loads(one.body)) for one in federation.wire]
    return [(sender, body) for sender, body in found if body["kind"] == kind]
