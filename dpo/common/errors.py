"""The exceptions for a user's mistake and for a request to stop."""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    Commands print it to stderr without a traceback and exit with code 2.
    """


class Stopped(Exception):
    """The user or the system asked the run to stop; the log has said what was kept and how to go on."""
