"""Candidates on their way to sites that lack them: after the hello, before anything is spent.

    for each candidate    its files in order, the one that pins the others first
      for each piece      one request to all sites that are at this place of the file; each says how much it holds

A site that already holds more, from before a crash, is asked to go on from there; one that lost what it held begins again. Who
does not get a candidate takes no part, and the reason is in the journal.

Covered:
    * only what the hello pinned is sent, only to sites that asked for it, each piece sealed once for all of them;
    * a resumed run sends nothing again that a site has confirmed as installed;
    * a site that gives no answer, or one that goes backwards, is asked a few times and not for ever.
Not covered:
    * sites get the pieces at the pace of the slowest one of those that answer.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from urna.models.candidate_file import CANDIDATE_FILE, WEIGHTS_FILE, read_candidate
from urna.models.catalogue import CATALOGUE, cache_root
from urna.protocol.errors import ModelError
from urna.protocol.identity import Identity
from urna.protocol.messages import (
    Envelope,
    HelloReply,
    HelloRequest,
    Request,
    WeightsReply,
    WeightsRequest,
    signed,
)
from urna.server.exchange import Answer, Exchange
from urna.server.journal import Journal, Json

MAX_STALLS = 5  # pieces of one candidate that a site may not answer, or not keep
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parcelled:
    """A file of a candidate."""

    path: Path
    sha256: str
    size: int


@dataclass
class Place:
    """How far a site is: the file, the bytes of it that it holds, and how many pieces of the candidate were sent in vain."""

    file: int = 0
    offset: int = 0
    stalls: int = 0

    def moved(self, to: int, end: int, size: int) -> None:
        """Note that the site holds ``to`` bytes of its file, after a piece that ended at ``end``."""
        self.stalls += to < end
        self.offset = to
        if to == size:
            self.file, self.offset = self.file + 1, 0


@dataclass
class Sent:
    """What became of one candidate."""

    places: dict[str, Place]  # sites that are still to get something
    delivered: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def ends(self, site: str, why: str | None) -> None:
        """A site has it (no reason), or will not get it."""
        del self.places[site]
        if why is None:
            self.delivered.append(site)
        else:
            self.failed[site] = why


def doubt_of_lacks(request: Request, said: HelloReply) -> str | None:
    """Why a site cannot be sent what it says that it lacks."""
    asked = request.models.keys() if isinstance(request, HelloRequest) else set[str]()
    foreign = sorted(set(said.lacks) - asked)
    return f"says that it lacks {', '.join(foreign)}, which nobody asked for" if foreign else None


class Delivery:
    """Sends weights.

    Args:
        exchange: asks sites.
        journal: where it is kept who has got what.
        identity: the operator's.
        piece_bytes: of a file, in one message.
    """

    def __init__(self, exchange: Exchange, journal: Journal, identity: Identity, piece_bytes: int) -> None:
        self._exchange = exchange
        self._journal = journal
        self._identity = identity
        self._piece_bytes = piece_bytes
        entries = [entry.value for entry in journal.entries() if entry.kind == "weights"]
        self._counted = len(entries)
        self._had = {(one["candidate"], site) for one in entries for site in one.get("delivered", ())}

    def run(self, hello: HelloRequest, lacking: Mapping[str, Sequence[str]], address: Mapping[str, int]) -> dict[str, str]:
        """Send every site what it lacks.

        Args:
            hello: what was asked, with the hash of every candidate.
            lacking: by site, the candidates.
            address: of the sites.

        Returns:
            By site, why it did not get all of it.

        Raises:
            ModelError: a candidate is not here as it was pinned.
        """
        failed: dict[str, str] = {}
        for candidate in dict.fromkeys(name for names in lacking.values() for name in names):
            sites = [site for site, names in lacking.items() if candidate in names and site not in failed]
            sites = sorted(site for site in sites if (candidate, site) not in self._had)
            if sites:
                failed |= self._send(hello, candidate, {site: address[site] for site in sites})
        return failed

    def _send(self, hello: HelloRequest, candidate: str, address: Mapping[str, int]) -> dict[str, str]:
        """One candidate to all sites that lack it."""
        files = files_of(candidate, hello.models[candidate])
        facts: Json = {"candidate": candidate, "bytes": sum(file.size for file in files)}
        self._note(facts | {"sites": sorted(address)})
        sent = Sent({site: Place() for site in address})
        while sent.places:
            number, offset = min((place.file, place.offset) for place in sent.places.values())  # who is behind comes first
            sites = [site for site, place in sent.places.items() if (place.file, place.offset) == (number, offset)]
            self._piece(hello, candidate, (files, number, offset), {address[site]: site for site in sites}, sent)
        why = {site: f"{reason} (weights of {candidate})" for site, reason in sent.failed.items()}
        self._note(facts | {"delivered": sorted(sent.delivered), "failed": sent.failed})
        return why

    def _piece(
        self,
        hello: HelloRequest,
        candidate: str,
        at: tuple[Sequence[Parcelled], int, int],
        site_at: Mapping[int, str],
        sent: Sent,
    ) -> None:
        """One piece to all sites that are at this place, and where each of them is afterwards."""
        files, number, offset = at
        file = files[number]
        end = min(offset + self._piece_bytes, file.size)
        envelope = self._request(hello, candidate, number, file, offset)
        answers: dict[str, Answer] = {}

        def take(answer: Answer) -> None:
            answers.setdefault(answer.site, answer)

        self._exchange.ask("query.weights", envelope, site_at, take)
        for site in site_at.values():
            place, answer = sent.places[site], answers.get(site)
            said = None if answer is None else answer.said
            if isinstance(said, WeightsReply) and said.complete:
                sent.ends(site, None)
            elif isinstance(said, WeightsReply) and said.received <= file.size:
                place.moved(said.received, end, file.size)
                if place.file == len(files):
                    sent.ends(site, "has all of it, and did not install it")
            elif said is not None and answer is not None:
                sent.ends(site, answer.why if not isinstance(said, WeightsReply) else "not believed")
            else:
                place.stalls += 1
            if site in sent.places and place.stalls >= MAX_STALLS:
                sent.ends(site, "silent" if answer is None else answer.doubt or "does not keep what it gets")
        log.info("%s, %s: %d of %d bytes at %s", candidate, file.path.name, end, file.size, ", ".join(site_at.values()))

    def _request(self, hello: HelloRequest, candidate: str, number: int, file: Parcelled, offset: int) -> Envelope:
        """The signed piece: the same bytes whenever it is made, so that the journal need not keep them."""
        with file.path.open("rb") as opened:
            opened.seek(offset)
            part = np.frombuffer(opened.read(self._piece_bytes), np.uint8)
        request = WeightsRequest.model_validate(
            {
                "campaign": hello.campaign,
                "plan_sha256": hello.plan_sha256,
                "request_id": f"{hello.campaign}/weights/{candidate}/{number}/{offset}",
                "candidate": candidate,
                "file": file.path.name,
                "sha256": file.sha256,
                "size": file.size,
                "offset": offset,
            }
        )
        return signed(self._identity, request, {"part": part})

    def _note(self, value: Json) -> None:
        self._counted += 1
        self._journal.record(f"weights/{self._counted}", value)


def files_of(candidate: str, pinned: str) -> list[Parcelled]:
    """The files of an installed candidate, in the order in which they are sent.

    Raises:
        ModelError: it is not here, or not as it was pinned.
    """
    folder = cache_root() / candidate
    if candidate in CATALOGUE:
        pins = {WEIGHTS_FILE: pinned}
    else:
        pins = {CANDIDATE_FILE: pinned}
        pins |= {name: pin.sha256 for name, pin in sorted(read_candidate(candidate, folder)[0].files.items())}
    files = []
    for name, sha256 in pins.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
        except OSError as error:
            raise ModelError(f"{path} must be readable to be sent, found {error.strerror}: install {candidate} again") from None
        if found != sha256:
            raise ModelError(f"{path} must have sha256 {sha256} as it was pinned, found {found}: install {candidate} again")
        files.append(Parcelled(path, sha256, size))
    return files
