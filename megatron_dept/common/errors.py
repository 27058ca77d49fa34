"""Errors a user can mend.

Every error that a user's input, disk or cluster can cause is a `UserError`: one line that names the file, field or
rank, the value found and the remedy. `pretrain_dept.py` and the tools print that line and exit with `EXIT_USER_ERROR`;
anything else is a bug and keeps its traceback.
"""

EXIT_USER_ERROR = 2
REMEDY_OF_LOSS = "look at that rank's log, then start again: the run resumes from its last checkpoint"


def first_line(error: Exception) -> str:
    """What a library's error says, without the stack and the general advice that torch and gloo add."""
    return str(error).strip().partition("\n")[0].partition(". This is typically")[0]


class UserError(Exception):
    """What the user gave cannot be used; the message names what, the value found, and the remedy, on one line."""


class ConfigError(UserError):
    """A field of the configuration is unknown, missing, impossible, or contradicts another."""


class DataError(UserError):
    """A corpus, dataset or tokenizer file is missing, malformed, or does not match its neighbours."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, or of another model."""


class FederationError(UserError):
    """Silos disagree, or a peer is gone."""


class LostPeerError(FederationError):
    """A peer is gone; `what` says how that was noticed, the message adds the remedy."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; {REMEDY_OF_LOSS}")
        self.what = what
