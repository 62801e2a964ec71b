"""The one exception for bad input: a message for a person, exit code 2, no traceback."""


class UserError(Exception):
    """Something the user can fix. The message names the field or file, the value and the fix.

    The command line prints the message alone and exits with code 2; in Python it is an ordinary exception.
    """
