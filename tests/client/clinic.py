"""One real site with peers that are only keys, and the operator who asks: enough for every request there is.

A round is `uploaded` by the site, and `opened` with peers that send zeros: the sum is then what the site itself had sent.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from urna.client.site import Site, open_site
from urna.client.vault import create_keys
from urna.models.catalogue import spec
from urna.models.loading import artefact_sha256
from urna.models.tuning import trainable_size
from urna.privacy.fixed_point import Grid
from urna.privacy.ring import numbers_of
from urna.privacy.secure_sum import (
    Context,
    ServerRole,
    SiteRole,
    alive_digest,
    burnt_statement,
    context_of,
    segments_of,
    upload_of,
)
from urna.protocol.identity import OPERATOR, ROSTER_FILE, Identity, Roster
from urna.protocol.messages import (
    AbortRequest,
    AnswerOfSite,
    AnyArray,
    AnyReply,
    AnyRequest,
    Audit,
    BallotRequest,
    Burnt,
    CloseRequest,
    Envelope,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Masked,
    Member,
    Message,
    Summed,
    TrainRequest,
    Unmasked,
    UnmaskRequest,
    open_reply,
    open_request,
    signed,
)
from urna.protocol.plan import Plan

NAME, CANARY = "site-1", "canary-7f3a"
CANDIDATES = ("pixels", "autoencoder")
NUM_CLASSES, NUM_RECORDS = 3, 60
NONCE = "0e" * 32  # of sparse graphs
PLAN: dict[str, Any] = {
    "name": "clinic",
    "task": {"num_classes": NUM_CLASSES},
    "candidates": [{"name": name} for name in CANDIDATES],
    "privacy": {"epsilon": 3.0, "delta": 1e-5},
    "federation": {"min_sites": 3, "num_records": 3 * NUM_RECORDS},
    "ballot": {"bucket_size": 8},
    "final": {"num_rounds": 4, "sample_rate": 0.5, "learning_rate": 0.1},
}
POLICY = {"epsilon_total": 8.0, "epsilon_per_campaign": 4.0, "delta": 1e-4, "min_cohort": 3}


def changed(document: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A copy of a document, with keys of some sections replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    for name, section in sections.items():
        copy[name] = copy.get(name, {}) | section if isinstance(section, dict) else section
    return copy


def a_plan(**sections: Any) -> Plan:
    return Plan.model_validate(changed(PLAN, **sections))


def a_signer(name: str) -> Identity:
    return Identity(name, Ed25519PrivateKey.generate())


def write_records(path: Path, num_records: int = NUM_RECORDS, seed: int = 0) -> None:
    """Three kinds of noisy 8 x 8 images; every id is a canary."""
    generator = np.random.default_rng(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", *(f"p{at}" for at in range(64))])
        for number in range(num_records):
            label = number % NUM_CLASSES
            image = generator.uniform(0, 4, 64)
            image[label * 20 : label * 20 + 20] += 10
            writer.writerow([f"{CANARY}-{number:03d}", label, *(f"{value:.3f}" for value in image)])


def write_config(folder: Path, **policy: Any) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in (POLICY | policy).items()]
    dataset = [
        'name = "digits"\nformat = "csv"\nmodality = "image"\npath = "records.csv"',
        f"num_records = {NUM_RECORDS}\nnum_classes = {NUM_CLASSES}",
        "image_height = 8\nimage_width = 8\nmax_value = 16.0",
    ]
    text = "\n".join([f'name = "{NAME}"', "[[dataset]]", *dataset, "[policy]", *lines])
    (folder / "site.toml").write_text(f"{text}\n", encoding="utf-8")


@dataclass(frozen=True)
class Round:
    """A round that the site uploaded for, as the operator sees it."""

    request: Envelope
    reply: Envelope
    context: Context

    @property
    def id(self) -> str:
        return self.context.round_id

    @property
    def all(self) -> tuple[str, ...]:
        return self.context.names

    def without(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in self.all if name not in names)


@dataclass
class Clinic:
    """The site in ``folder`` and all who may talk to it."""

    folder: Path
    site: Site
    operator: Identity
    peers: list[Identity]
    plan: Plan = field(default_factory=a_plan)
    campaign: str = "run-1"
    keys: dict[str, X25519PrivateKey] = field(default_factory=dict)
    own: Member | None = None

    @staticmethod
    def build(folder: Path, plan: Plan | None = None, num_peers: int = 2, **policy: Any) -> "Clinic":
        identity = create_keys(folder, NAME)
        write_records(folder / "records.csv")
        write_config(folder, **policy)
        operator, peers = a_signer(OPERATOR), [a_signer(f"site-{number}") for number in range(2, 2 + num_peers)]
        keys = {one.name: one.public_key_hex for one in (identity, *peers)}
        roster = Roster(operator=operator.public_key_hex, sites=keys)
        (folder / ROSTER_FILE).write_text(roster.model_dump_json(), encoding="utf-8")
        return Clinic(folder, open_site(folder), operator, peers, plan or a_plan())

    def fields(self, request_id: str, stage: str, **changes: Any) -> dict[str, Any]:
        header = {"campaign": self.campaign, "plan_sha256": self.plan.sha256, "stage": stage}
        return header | {"request_id": f"{self.campaign}/{request_id}"} | changes

    def sealed(self, message: Message, arrays: dict[str, AnyArray] | None = None) -> Envelope:
        return signed(self.operator, message, arrays)

    def hello_request_model(self, **changes: Any) -> HelloRequest:
        models = {entry.name: artefact_sha256(entry.name) for entry in self.plan.candidates}
        commitment = hashlib.sha256(bytes.fromhex(NONCE)).hexdigest()
        extra = {"plan_json": self.plan.model_dump_json(), "models": models, "graph_commitment": commitment}
        return HelloRequest(**(self.fields("hello", "hello") | extra | changes))

    def hello_request(self, **changes: Any) -> Envelope:
        return self.sealed(self.hello_request_model(**changes))

    def read(self, request: Envelope) -> AnyRequest:
        return open_request(request, self.site.roster, OPERATOR)

    def ask(self, request: Envelope, site: Site | None = None) -> AnyReply:
        """The site's reply, its signature checked."""
        site = site or self.site
        return open_reply(site.handle(request), site.roster, NAME, request)

    def hello(self) -> HelloReply:
        """Open the campaign; the site must join."""
        reply = self.ask(self.hello_request())
        assert isinstance(reply, HelloReply), reply
        self.own = reply.member
        return reply

    def cohort(self, **changes: Any) -> tuple[Member, ...]:
        """All members; the peers' round keys are made once."""
        if self.own is None:
            self.hello()
        assert self.own is not None
        members = [self.own]
        for peer in self.peers:
            key = self.keys.setdefault(peer.name, X25519PrivateKey.generate())
            public = key.public_key().public_bytes_raw().hex()
            members.append(Member.create(peer, self.campaign, public, NUM_RECORDS).model_copy(update=changes))
        return tuple(members)

    def summed(self, request_id: str, stage: str, **changes: Any) -> dict[str, Any]:
        base: dict[str, Any] = {"noise_multiplier": 10.0, "step_exp": -14, "cohort": changes.get("cohort") or self.cohort()}
        base["graph_nonce"] = NONCE
        return self.fields(request_id, stage) | base | changes

    def ballot(self, request_id: str = "ballot/1", **changes: Any) -> Envelope:
        fields = self.summed(request_id, "ballot", **({"candidates": CANDIDATES} | changes))
        return self.sealed(BallotRequest(**fields))

    def train(self, request_id: str = "final/1", vector: AnyArray | None = None, **changes: Any) -> Envelope:
        fields = self.summed(request_id, **({"stage": "final", "candidate": "pixels"} | changes))
        return self.sealed(TrainRequest(**fields), {"vector": a_head("pixels") if vector is None else vector})

    def evaluate(self, request_id: str = "evaluation/1", vector: AnyArray | None = None, **changes: Any) -> Envelope:
        fields = self.summed(request_id, "evaluation", **({"candidates": ("pixels",), "detail": True} | changes))
        return self.sealed(EvaluateRequest(**fields), {"vector-0": a_head("pixels") if vector is None else vector})

    def close(self, audits: Sequence[Audit] = (), request_id: str = "close") -> Envelope:
        return self.sealed(CloseRequest(**self.fields(request_id, "close", audits=tuple(audits))))

    def unmask(
        self, one: Round | str, alive: Sequence[str] | None = None, request_id: str = "unmask", **changes: Any
    ) -> Envelope:
        """Asks for what opens a round, of all its members if no list is given."""
        alive = (one.all if isinstance(one, Round) else ()) if alive is None else tuple(alive)
        round_id = one.id if isinstance(one, Round) else one
        fields = self.fields(f"{round_id}/{request_id}", "ballot", round_id=round_id, alive=alive, **changes)
        return self.sealed(UnmaskRequest(**fields))

    def abort(self, one: Round | str, request_id: str = "abort") -> Envelope:
        round_id = one.id if isinstance(one, Round) else one
        return self.sealed(AbortRequest(**self.fields(f"{round_id}/{request_id}", "ballot", round_id=round_id)))

    # ---- rounds of the secure sum

    def identity(self, name: str) -> Identity:
        return next(one for one in (self.site.identity, *self.peers) if one.name == name)

    def uploaded(self, request: Envelope) -> Round:
        """The site must take part."""
        reply = self.site.handle(request)
        said = open_reply(reply, self.site.roster, NAME, request)
        assert isinstance(said, Masked), said
        summed = self.read(request)
        assert isinstance(summed, Summed)
        size = 8 * sum(map(len, segments_of(reply.arrays))) // summed.ring_bits
        return Round(request, reply, context_of(summed, self.plan, size, request.sha256))

    def unmasked(self, one: Round, alive: Sequence[str] | None = None) -> Unmasked:
        """The site must answer the list."""
        reply = self.ask(self.unmask(one, alive))
        assert isinstance(reply, Unmasked), reply
        return reply

    def aborted(self, one: Round | str) -> Burnt:
        """The site must give the round up."""
        reply = self.ask(self.abort(one))
        assert isinstance(reply, Burnt), reply
        return reply

    def opened(self, one: Round, silent: Iterable[str] = ()) -> npt.NDArray[np.int64]:
        """Opens a round with peers that send zeros: the site's own numbers, in units of the grid."""
        context, server = one.context, ServerRole(one.context)
        names = [peer.name for peer in self.peers if peer.name not in set(silent)]
        roles = {name: SiteRole(name, self.keys[name], self.campaign, 2) for name in names}
        for name, role in roles.items():
            server.add(name, role.upload(context, numbers_of(context.ring.zeros(context.size))))
        server.add(NAME, upload_of(one.reply.arrays))
        alive = server.close()
        server.answer(NAME, self.site.handle(self.unmask(one, alive)).arrays["pads"])
        for name, role in roles.items():
            server.answer(name, role.unmask(context, alive))
        units = Grid(0, 1, context.ring_bits).from_ring(server.total()[0])
        return np.asarray(units, dtype=np.int64)

    def answer(self, name: str, one: Round, alive: Sequence[str] | None = None) -> AnswerOfSite:
        """What a member signs when it answers a list."""
        digest = alive_digest(one.context, one.all if alive is None else alive)
        return AnswerOfSite(alive_sha256=digest.hex(), signature=self.identity(name).sign("alive", digest).hex())

    def burnt(self, name: str, one: Round, alive: Sequence[str] | None = None, uploaded: bool = True) -> AnswerOfSite:
        """What a member signs when it gives a round up; without a list: that it had answered none."""
        digest = "" if alive is None else alive_digest(one.context, alive).hex()
        statement = burnt_statement(one.id, one.context.digest.hex() if uploaded else "", digest)
        return AnswerOfSite(alive_sha256=digest, signature=self.identity(name).sign("burnt", statement).hex())

    def audit(self, one: Round, alive: Sequence[str] | None = None, signers: Sequence[str] | None = None) -> Audit:
        """Of an opened round: the list, signed by all who are on it or by some."""
        alive = one.all if alive is None else tuple(alive)
        answers = {name: self.answer(name, one, alive) for name in (alive if signers is None else signers)}
        return Audit(round_id=one.id, alive=alive, answers=answers)

    def given_up(self, one: Round, answers: dict[str, AnswerOfSite] | None = None) -> Audit:
        """Of a round that was given up, with what members said of it."""
        return Audit(round_id=one.id, alive=(), answers=answers or {})

    def log(self) -> str:
        return (self.folder / "site.log").read_text("utf-8")

    def restarted(self) -> "Clinic":
        """The site's folder as the next process finds it on the disk: a copy, so that nothing of this one is left."""
        folder = self.folder.with_name(f"{self.folder.name}-again")
        shutil.copytree(self.folder, folder)
        return Clinic(folder, open_site(folder), self.operator, self.peers, self.plan, self.campaign, self.keys, self.own)

    def reopened(self) -> "Clinic":
        """The same site as another process would open it."""
        return Clinic(
            self.folder, open_site(self.folder), self.operator, self.peers, self.plan, self.campaign, self.keys, self.own
        )


def a_head(candidate: str) -> AnyArray:
    return np.zeros(trainable_size(spec(candidate).feature_dim, NUM_CLASSES), np.float32)


def five_sites(folder: Path, policy: dict[str, Any] | None = None, **sections: Any) -> Clinic:
    """A site with four peers."""
    federation = {"num_records": 5 * NUM_RECORDS} | sections.pop("federation", {})
    return Clinic.build(folder, a_plan(federation=federation, **sections), num_peers=4, **(policy or {}))
