"""The one exception a user's mistake raises."""


class UserError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do.

    Commands print it to stderr without a traceback and exit with code 2.
    """
