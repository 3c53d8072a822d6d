"""A site's side of the secure sum between requests: the role, what is kept of it on disk, and the audit of alive lists.

Covered:
    * nothing leaves before `RoundStore` has it; a repeated unmask gets the same bytes, another one of the same round none;
    * a server that showed different alive lists in a round: the next request must bring at least the threshold of holders'
      signatures over the list that this site answered for, or this site takes no further part;
    * a server that says a round was given up, to skip that audit: the round is burnt here before anything else; it must show
      that so many holders never answered that the sum cannot have opened, or use up one of few unproven claims.
Not covered:
    * the last list of a campaign whose operator never asks again: no request, no audit.
"""

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from urna.client.round_store import Audited, KeptRound, RoundStore
from urna.privacy.ring import Fill
from urna.privacy.secure_sum import Bytes, Context, SiteRole, Upload, alive_digest, burnt_statement, check_cohort, check_keys
from urna.protocol.errors import AuditError, ProtocolError, ReplayError, SignatureError
from urna.protocol.identity import Identity, Roster, verify
from urna.protocol.messages import AnswerOfSite, Audit, Member, Summed
from urna.protocol.quorum import MAX_SILENT_AT_SETUP, Quorum

MAX_UNPROVEN_ABORTS = 3  # in a campaign, of rounds that this site had answered


def graph_nonce(private_key: X25519PrivateKey) -> str:
    """This site's part of what a sparse graph depends on, hex; a function of its round key, so nothing more is to be kept."""
    return hmac.digest(private_key.private_bytes_raw(), b"urna graph nonce", "sha256").hex()


@dataclass(frozen=True)
class SecureRounds:
    """One site's rounds.

    Args:
        identity: signs what this site answers.
        roster: pinned keys of the others.
        store: where rounds are kept.
        min_cohort: the policy's minimum, of cohorts and of survivors.
        max_unproven_aborts: how many rounds that it had answered a campaign may give up without proof.
    """

    identity: Identity
    roster: Roster
    store: RoundStore
    min_cohort: int
    max_unproven_aborts: int = MAX_UNPROVEN_ABORTS

    def setup(self, campaign: str, private_key: X25519PrivateKey, cohort: Sequence[Member]) -> str:
        """Fix the members of a campaign and tell this site's graph nonce, hex.

        Raises:
            ReplayError: other members were fixed before.
            ProtocolError: duplicates, too few members, or this site's commitment is not among them.
        """
        check_cohort(cohort, self.min_cohort)
        commitments = {member.site: member.graph_commitment for member in cohort}
        nonce = graph_nonce(private_key)
        if commitments.get(self.identity.name) != hashlib.sha256(bytes.fromhex(nonce)).hexdigest():
            raise ProtocolError(f"expected {self.identity.name} with its own graph commitment among the members")
        self.store.keep_setup(campaign, commitments)
        return nonce

    def check_graph(self, request: Summed, quorum: Quorum, operator_commitment: str) -> None:
        """Whether nobody could choose the graph of this round alone: all nonces are those that were committed to.

        Raises:
            ProtocolError: one is not, or a member is not of those that were fixed before any nonce was told.
        """
        if hashlib.sha256(bytes.fromhex(request.graph_nonce)).hexdigest() != operator_commitment:
            raise ProtocolError("expected the graph nonce that the hello was committed to, found another")
        if quorum.is_full:
            return
        fixed, told = self.store.setup(request.campaign), request.graph_nonces
        if not told.keys() <= fixed.keys() or len(fixed) - len(told) > MAX_SILENT_AT_SETUP:  # or the choice could be ground
            raise ProtocolError(f"expected the graph nonces of all members but {MAX_SILENT_AT_SETUP}, found fewer or others")
        for site in {*told, *(member.site for member in request.cohort)}:
            if hashlib.sha256(bytes.fromhex(told.get(site, ""))).hexdigest() != fixed.get(site):
                raise ProtocolError(f"expected the graph nonce that {site} had committed to, found another or none")

    def check_round(self, round_id: str, private_key: X25519PrivateKey, cohort: Sequence[Member]) -> None:
        """What would refuse an upload, before anything is spent on it.

        Raises:
            ReplayError: the round was uploaded or given up before.
            ProtocolError: with some member's key no secret can be shared.
        """
        if self.store.find(round_id) is not None:
            raise ReplayError(f"round {round_id} was uploaded before, or given up")
        check_keys(private_key, cohort)

    def upload(self, context: Context, private_key: X25519PrivateKey, fill: Fill, scalars: Sequence[int] = ()) -> Upload:
        """Mask for a round; the caller must `keep` it before the upload leaves.

        Raises:
            ReplayError: the round was uploaded or given up before.
            ProtocolError: see `SiteRole.upload`.
        """
        return self._role(context.campaign, private_key).upload(context, fill, scalars)

    def keep(self, context: Context) -> None:
        """Write that this round was uploaded; within a transaction of the caller's.

        Raises:
            ReplayError: another process of this site was faster: its upload stands.
        """
        if self.store.find(context.round_id) is not None:
            raise ReplayError(f"round {context.round_id} was uploaded before, or given up")
        progress = SiteRole.uploaded(context)
        self.store.keep(context.round_id, KeptRound(context.campaign, context, progress))

    def unmask(
        self,
        round_id: str,
        private_key: X25519PrivateKey,
        alive: Sequence[str],
        request_sha256: str,
        sealed: Callable[[Bytes, AnswerOfSite], bytes],
    ) -> bytes:
        """Answer a round's alive list, once, and keep the answer.

        Args:
            round_id: which round.
            private_key: of its campaign.
            alive: the list.
            request_sha256: of the request, for repeats.
            sealed: makes the bytes that leave.

        Raises:
            ReplayError: another request was answered for this round, or it was given up.
            AuditError: what became of an earlier round that this site answered was not shown yet.
            ProtocolError: this site did not upload, or see `SiteRole.unmask`.
        """
        kept = self.store.find(round_id)
        if kept is None or kept.context is None:
            raise ProtocolError(f"expected an unmask after an upload, found none of {round_id} here")
        if kept.answer is not None:
            if kept.answer_to != request_sha256 or kept.progress.burnt:
                raise ReplayError(f"round {round_id} was answered before, or given up: another request gets nothing")
            return kept.answer
        waiting = set(self.store.unaudited(kept.campaign))
        if waiting:
            raise AuditError(f"expected what became of {', '.join(sorted(waiting))} before another round is opened")
        role = self._role(kept.campaign, private_key)
        pads = role.unmask(kept.context, alive)
        digest = alive_digest(kept.context, alive)
        signature = self.identity.sign("alive", digest)
        reply = sealed(pads, AnswerOfSite(alive_sha256=digest.hex(), signature=signature.hex()))
        progress = role.progress[round_id]
        self.store.keep(round_id, replace(kept, progress=progress, answer_to=request_sha256, answer=reply))
        return reply

    def burn(self, campaign: str, round_id: str) -> AnswerOfSite:
        """Give a round up for ever, and say whether it had been answered."""
        kept = self.store.find(round_id) or KeptRound(campaign, None, SiteRole.uploaded(None))
        kept = replace(kept, progress=replace(kept.progress, burnt=True))
        self.store.keep(round_id, kept)
        statement = burnt_statement(round_id, kept.progress.context, kept.progress.alive_sha256)
        signature = self.identity.sign("burnt", statement)
        return AnswerOfSite(alive_sha256=kept.progress.alive_sha256, signature=signature.hex())

    def check_audits(self, campaign: str, audits: Sequence[Audit]) -> dict[str, Audited]:
        """What became of every round that this site answered and was not shown yet; `note` it when the request is taken.

        Raises:
            AuditError: a round is missing, its list was another than the one answered here, too few signed it, or it is one
                unproven abort too many.
        """
        shown = {audit.round_id: audit for audit in audits}
        found: dict[str, Audited] = {}
        for round_id, kept in self.store.unaudited(campaign).items():
            audit = shown.get(round_id)
            if audit is None:
                raise AuditError(f"expected what became of round {round_id}, which this site answered; found nothing")
            found[round_id] = self._check_opened(kept, audit) if audit.alive else self._check_aborted(kept, audit)
        unproven = self.store.num_unproven(campaign) + list(found.values()).count("unproven")
        if unproven > self.max_unproven_aborts:
            raise AuditError(f"expected at most {self.max_unproven_aborts} rounds given up without proof, found {unproven}")
        return found

    def note(self, found: dict[str, Audited]) -> None:
        """Keep what `check_audits` found."""
        for round_id, audited in found.items():
            self.store.set_audited(round_id, audited)

    def _check_opened(self, kept: KeptRound, audit: Audit) -> Audited:
        context = kept.context
        assert context is not None  # it was answered
        digest = alive_digest(context, audit.alive)
        if digest.hex() != kept.progress.alive_sha256:
            raise AuditError(f"split view: round {audit.round_id} is shown with another alive list than this site answered")
        holders = {context.names[at] for at in context.graph.holders}
        signed = [
            name for name in audit.answers if name in holders and self._signed(name, "alive", digest, audit.answers[name])
        ]
        if len(signed) < context.quorum.threshold:
            raise AuditError(
                f"expected {context.quorum.threshold} holders' signatures over the alive list of round {audit.round_id}, "
                f"found {len(signed)}"
            )
        return "opened"

    def _check_aborted(self, kept: KeptRound, audit: Audit) -> Audited:
        context = kept.context
        assert context is not None  # it was answered
        holders = {context.names[at] for at in context.graph.holders}
        unanswered = 0
        for name, answer in audit.answers.items():
            contexts = [kept.progress.context] if answer.alive_sha256 else [kept.progress.context, ""]
            statements = [burnt_statement(audit.round_id, one, answer.alive_sha256) for one in contexts]
            if name not in holders or not any(self._signed(name, "burnt", one, answer) for one in statements):
                continue
            if answer.alive_sha256 not in ("", kept.progress.alive_sha256):
                raise AuditError(f"split view: {name} answered another alive list of round {audit.round_id} than this site")
            unanswered += answer.alive_sha256 == ""
        # so many never will answer that the others are too few, even if colluders among them lied
        quorum = context.quorum
        return "aborted" if len(holders) - unanswered + quorum.num_colluding < quorum.threshold else "unproven"

    def _signed(self, name: str, purpose: str, data: bytes, answer: AnswerOfSite) -> bool:
        try:
            verify(self.roster, name, purpose, data, bytes.fromhex(answer.signature))
        except SignatureError:
            return False
        return True

    def _role(self, campaign: str, private_key: X25519PrivateKey) -> SiteRole:
        return SiteRole(self.identity.name, private_key, campaign, self.min_cohort, self.store.progress(campaign))
