"""The two kinds of failure a user can meet, kept apart from bugs.

    SnpcError            never raised itself
      UserError          the request cannot be served: one line, exit code 2
      CheckFailed        snpc looked at its own result and it does not hold: exit code 1

Everything else that is raised is a bug and shows its traceback.
"""

from __future__ import annotations


class SnpcError(Exception):
    """Base of what the command line prints without a traceback."""


class UserError(SnpcError):
    """What, where, why and what to do, in one line: ``UserError("ratio 1.5 is not in [0, 1): ...")``."""


class CheckFailed(SnpcError):
    """A check of a written or about-to-be-written model failed; the message names tensor or node."""
