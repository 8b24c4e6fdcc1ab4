"""How a program ends early: by an error that a user is meant to read, or by request."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and the mend.

    Entry points print it without a traceback and exit with code 2; any other exception is a bug and
    keeps its traceback.
    """

    code = 2


class TryAgain(UserError):
    """What the next start of the same command may not meet, such as a process that came too late. Its own
    exit code lets a scheduler start the job again."""

    code = 3


class Stopped(BaseException):
    """A run ended by request. Not an Exception: nothing that handles errors may take it for one.

    together: all processes of the run end by it, so that none is missed by another.
    """

    def __init__(self, message: str = "", together: bool = False) -> None:
        super().__init__(message)
        self.together = together
