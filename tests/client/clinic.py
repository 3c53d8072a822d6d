"""One real site with two peers that are only keys, and the operator who asks: enough for every request there is."""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from urna.client.site import ROSTER_FILE, Site, create_keys, open_site
from urna.models.catalogue import spec
from urna.models.loading import artefact_sha256
from urna.models.tuning import trainable_size
from urna.protocol.identity import OPERATOR, Identity, Roster
from urna.protocol.messages import (
    AnyArray,
    AnyReply,
    AnyRequest,
    BallotRequest,
    CloseRequest,
    Envelope,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    Member,
    Message,
    TrainRequest,
    open_reply,
    open_request,
    seal,
)
from urna.protocol.plan import Plan

NAME, CANARY = "site-1", "canary-7f3a"
CANDIDATES = ("pixels", "autoencoder")
NUM_CLASSES, NUM_RECORDS = 3, 60
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
    (folder / "site.toml").write_text(
        f'name = "{NAME}"\n[data]\npath = "records.csv"\nnum_records = {NUM_RECORDS}\nnum_classes = {NUM_CLASSES}\n'
        "image_height = 8\nimage_width = 8\nmax_value = 16.0\n[policy]\n" + "\n".join(lines) + "\n",
        encoding="utf-8",
    )


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
    def build(folder: Path, plan: Plan | None = None, **policy: Any) -> "Clinic":
        identity = create_keys(folder, NAME)
        write_records(folder / "records.csv")
        write_config(folder, **policy)
        operator, peers = a_signer(OPERATOR), [a_signer("site-2"), a_signer("site-3")]
        keys = {one.name: one.public_key_hex for one in (identity, *peers)}
        roster = Roster(operator=operator.public_key_hex, sites=keys)
        (folder / ROSTER_FILE).write_text(roster.model_dump_json(), encoding="utf-8")
        return Clinic(folder, open_site(folder), operator, peers, plan or a_plan())

    def fields(self, request_id: str, stage: str, **changes: Any) -> dict[str, Any]:
        header = {"campaign": self.campaign, "plan_sha256": self.plan.sha256, "stage": stage}
        return header | {"request_id": f"{self.campaign}/{request_id}"} | changes

    def sealed(self, message: Message, arrays: dict[str, AnyArray] | None = None) -> Envelope:
        return seal(self.operator, message, arrays)

    def hello_request_model(self, **changes: Any) -> HelloRequest:
        models = {entry.name: artefact_sha256(entry.name) for entry in self.plan.candidates}
        extra = {"plan_json": self.plan.model_dump_json(), "models": models}
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
        """The three members; the peers' round keys are made once."""
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
        return self.fields(request_id, stage) | base | changes

    def ballot(self, request_id: str = "ballot/1", **changes: Any) -> Envelope:
        fields = self.summed(request_id, "ballot", **({"candidates": CANDIDATES} | changes))
        return self.sealed(BallotRequest(**fields))

    def train(self, request_id: str = "final/1", vector: AnyArray | None = None, **changes: Any) -> Envelope:
        fields = self.summed(request_id, "final", **({"candidate": "pixels"} | changes))
        return self.sealed(TrainRequest(**fields), {"vector": a_head("pixels") if vector is None else vector})

    def evaluate(self, request_id: str = "evaluation/1", vector: AnyArray | None = None, **changes: Any) -> Envelope:
        fields = self.summed(request_id, "evaluation", **({"candidates": ("pixels",), "detail": True} | changes))
        return self.sealed(EvaluateRequest(**fields), {"vector-0": a_head("pixels") if vector is None else vector})

    def close(self) -> Envelope:
        return self.sealed(CloseRequest(**self.fields("close", "close")))

    def log(self) -> str:
        return (self.folder / "site.log").read_text("utf-8")

    def reopened(self) -> "Clinic":
        """The same site as another process would open it."""
        return Clinic(
            self.folder, open_site(self.folder), self.operator, self.peers, self.plan, self.campaign, self.keys, self.own
        )


def a_head(candidate: str) -> AnyArray:
    return np.zeros(trainable_size(spec(candidate).feature_dim, NUM_CLASSES), np.float32)
