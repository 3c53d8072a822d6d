"""A whole campaign in memory: the same `run_campaign` and `Site.handle`, no Flower, faults on demand.

federation = Federation(run_dir, plan)          # virtual sites as the embedded engine makes them
federation.faults["site-2"] = silent_at("train", nth=3)        # a reply is lost, altered, or made to fail
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
from pathlib import Path

from urna.client.site import Site, open_site
from urna.embedded import prepare
from urna.protocol.identity import OPERATOR, OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, load_identity, load_roster
from urna.protocol.messages import AnyRequest, Envelope, read_request
from urna.protocol.plan import Plan, load_plan
from urna.server.campaign import run_campaign
from urna.server.journal import Entry, Journal, begin
from urna.server.rounds import Rounds
from urna.server.stages import Stages

PLAN = Path(__file__).parents[1] / "plans" / "digits.toml"
Fault = Callable[[str, Envelope], Envelope | None]  # (route, reply) -> what arrives


@dataclass
class Federation:
    """Virtual sites and the link between them and the server.

    Args:
        run_dir: the run's folder; the sites' folders are in it.
        plan: what is run.
        faults: by site, what becomes of its replies.
        unreached: by site, which requests never arrive at it.
        site_toml: changes every site's configuration before the sites are opened.
        keeps_wire: whether every envelope that crossed is kept in `wire`.
    """

    run_dir: Path
    plan: Plan
    faults: dict[str, Fault] = field(default_factory=dict)
    unreached: dict[str, Callable[[AnyRequest], bool]] = field(default_factory=dict)
    site_toml: Callable[[str], str] = str
    keeps_wire: bool = True
    wire: list[Envelope] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    working: tuple[str, str] = ("", "")  # the site that handles a request at this moment, and the request's id

    def __post_init__(self) -> None:
        begin(self.run_dir, self.plan, engine="memory")
        prepare(self.run_dir, self.plan)
        folders = sorted((self.run_dir / SITES_DIR).iterdir(), key=lambda one: int(one.name.split("-")[1]))
        for file in (folder / "site.toml" for folder in folders):
            file.write_text(self.site_toml(file.read_text("utf-8")), encoding="utf-8")
        self.sites = [open_site(folder) for folder in folders]

    def run(self) -> None:
        """Run, or go on with, the campaign."""
        roster = load_roster(self.run_dir / ROSTER_FILE)
        run_campaign(self.run_dir, self, load_identity(OPERATOR, self.run_dir / OPERATOR_KEY_FILE), roster)

    @contextmanager
    def stages(self) -> Iterator[Stages]:
        """The campaign's stages after the hello, to ask single rounds with."""
        journal = Journal.open_for_writing(self.run_dir)
        try:
            operator = load_identity(OPERATOR, self.run_dir / OPERATOR_KEY_FILE)
            rounds = Rounds(self, journal, operator, load_roster(self.run_dir / ROSTER_FILE), self.plan)
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
        requests: Mapping[int, Envelope],
        timeout_seconds: float,  # noqa: ARG002 - the seam's signature
    ) -> Iterator[tuple[int, Envelope | None]]:
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

    def _handled(self, route: str, address: int, request: Envelope) -> Envelope | None:
        site = self.sites[address]
        name = site.config.name
        self._note(request)
        asked = read_request(request.body)
        if name in self.unreached and self.unreached[name](asked):
            return None
        self.working = (name, asked.request_id)
        reply: Envelope | None = site.handle(Envelope.from_bytes(request.to_bytes()))
        assert reply is not None
        if name in self.faults:
            reply = self.faults[name](route, reply)
        if reply is not None:
            self._note(reply)
        return reply

    def _note(self, envelope: Envelope) -> None:
        if self.keeps_wire:
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
