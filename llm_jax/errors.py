"""The one kind of error a user is meant to read."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and the mend.

    Entry points print it without a traceback and exit with code 2; any other exception is a bug and
    keeps its traceback.
    """
