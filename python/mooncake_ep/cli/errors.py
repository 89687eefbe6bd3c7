"""The three ways in which a command ends badly; each is shown as one message, without traceback."""

from __future__ import annotations


class UserError(Exception):
    """The arguments, or what is installed here, do not allow the command: exit status 2."""


class CheckFailedError(Exception):
    """A result is not what it has to be: exit status 1."""


class RankFailedError(Exception):
    """A rank died, missed the deadline or raised an error of its own: exit status 1."""
