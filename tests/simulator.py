"""A whole campaign in memory: the same `run_campaign` and `Site.handle`, no Flower, faults on demand.

federation = Federation(run_dir, plan)          # virtual sites as the embedded engine makes them
federation.faults["site-2"] = lambda route, reply: None    # drop, alter or raise, per site
federation.run()
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from urna.client.site import Site, open_site
from urna.embedded import OPERATOR_KEY_FILE, ROSTER_FILE, SITES_DIR, prepare
from urna.protocol.identity import OPERATOR, load_identity, load_roster
from urna.protocol.messages import Envelope
from urna.protocol.plan import Plan
from urna.server.campaign import run_campaign
from urna.server.journal import begin

Fault = Callable[[str, Envelope], Envelope | None]  # (route, reply) -> what arrives


@dataclass
class Federation:
    """Virtual sites and the link between them and the server; ``wire`` keeps every envelope that crossed it."""

    run_dir: Path
    plan: Plan
    faults: dict[str, Fault] = field(default_factory=dict)
    wire: list[Envelope] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        begin(self.run_dir, self.plan, engine="memory")
        prepare(self.run_dir, self.plan)
        folders = sorted((self.run_dir / SITES_DIR).iterdir(), key=lambda one: int(one.name.split("-")[1]))
        self.sites = [open_site(folder) for folder in folders]

    def run(self) -> None:
        """Run, or go on with, the campaign."""
        roster = load_roster(self.run_dir / ROSTER_FILE)
        run_campaign(self.run_dir, self, load_identity(OPERATOR, self.run_dir / OPERATOR_KEY_FILE), roster)

    def addresses(self, at_least: int, timeout_seconds: float) -> Sequence[int]:  # noqa: ARG002 - the seam's signature
        """Every site, by number."""
        return range(len(self.sites))

    def ask(
        self,
        route: str,
        requests: Mapping[int, Envelope],
        timeout_seconds: float,  # noqa: ARG002 - the seam's signature
    ) -> Iterator[tuple[int, Envelope | None]]:
        """Hand each request to its site, pass the reply through the site's fault."""
        for address, request in requests.items():
            site = self.sites[address]
            self.wire.append(request)
            reply: Envelope | None = site.handle(Envelope.from_bytes(request.to_bytes()))
            fault = self.faults.get(site.config.name)
            if fault is not None and reply is not None:
                reply = fault(route, reply)
            if reply is not None:
                self.wire.append(reply)
                yield address, reply
