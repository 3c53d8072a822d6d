"""The error tree, drawn once.

    UrnaError                     every error a person may meet; the message says what was expected, found, and to do
      BadInputError   exit 2      what a person wrote or pointed at is wrong
        PlanError                 plan.toml
        SiteConfigError           site.toml, or the records it points to
        ModelError                a model file that is missing, altered, or of a kind that is never opened
        RunError                  a run folder that is none, or is in use
        ControlError              what a person told a site's runner cannot be done, or must not be told at this place
      RefusedError    exit 3      a site's policy said no (the reasons are in the message)
      RoundError      exit 4      a round could not be completed with the minimum cohort
      PausedError     exit 4      a person at the site has stopped all releases
      ProtocolError   exit 4      a peer sent what the protocol does not allow
        SignatureError            not signed by whom it claims
        ReplayError               a known request id with other content
        StaleError                a campaign that was closed
        AuditError                an earlier round was not shown to have had one alive list
        NonFiniteError            NaN or infinity where a number is to be clipped
      LedgerError     exit 4      the ledger is missing, altered or busy: nothing is released
        RollbackError             the ledger is older than one that was shown before
      RunnerError     exit 4      a site's runner does not answer its own people, or failed

Calling our own code out of order is ``RuntimeError``; a policy's *no* inside the program is a value (``Refusal``).
What leaves a site is never one of these texts but a `FailureCode`: the text stays in the site's own log.
"""

from enum import StrEnum


class UrnaError(Exception):
    """Root of the tree; ``exit_code`` is what the command line returns."""

    exit_code = 1


class BadInputError(UrnaError):
    """What a person wrote or pointed at is wrong."""

    exit_code = 2


class PlanError(BadInputError):
    """The plan is not one that can be run."""


class SiteConfigError(BadInputError):
    """A site's configuration, or the records it points to, cannot be used."""


class ModelError(BadInputError):
    """A model file is missing, altered, or of a kind that is never opened."""


class RunError(BadInputError):
    """A run folder is none, or another process works in it."""


class ControlError(BadInputError):
    """What a person told a site's runner cannot be done: an unknown campaign, another plan, a socket of someone else."""


class RefusedError(UrnaError):
    """A site's policy said no."""

    exit_code = 3


class RoundError(UrnaError):
    """A round could not be completed with the minimum cohort."""

    exit_code = 4


class PausedError(UrnaError):
    """A person at the site has stopped all releases."""

    exit_code = 4


class ProtocolError(UrnaError):
    """A peer sent what the protocol does not allow."""

    exit_code = 4


class SignatureError(ProtocolError):
    """A message was not signed by whom it claims."""


class ReplayError(ProtocolError):
    """A request id that was answered before came with other content."""


class StaleError(ProtocolError):
    """A request for a campaign that was closed."""


class AuditError(ProtocolError):
    """A server did not show that an earlier round had one alive list for everybody, or showed that it had two."""


class NonFiniteError(ProtocolError):
    """A number that is to be clipped is NaN or infinite; it would switch the clip off."""


class LedgerError(UrnaError):
    """The ledger is missing, altered or busy; nothing is released."""

    exit_code = 4


class RollbackError(LedgerError):
    """The ledger is an older copy, or another, than the one that was shown before; nothing is released."""


class RunnerError(UrnaError):
    """A site's runner does not answer its own people, or failed."""

    exit_code = 4


class FailureCode(StrEnum):
    """All that a site says about a failure of its own: a closed set, so that no text about records can leave."""

    BAD_REQUEST = "bad_request"  # malformed, unsigned, foreign, or out of order
    REPLAY_CHANGED = "replay_changed"  # a known request id with other content
    DATA = "data"  # the records cannot be read as declared
    MODEL = "model"  # the candidate is missing here, altered, or not sound under DP
    NUMERIC = "numeric"  # a non-finite or out-of-range value
    AUDIT = "audit"  # an earlier round was not shown to have had one alive list
    LEDGER = "ledger"  # the ledger cannot record the release
    ROLLBACK = "rollback"  # the ledger is older than the one that was shown before
    STALE = "stale"  # the campaign was closed here
    PAUSED = "paused"  # a person at the site has paused it
    INTERNAL = "internal"  # anything else
