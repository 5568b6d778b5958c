"""The exception that every command turns into one line for the user and exit code 2."""


class UserError(Exception):
    """An error that the user can fix.

    Its text is the whole message: what is wrong, where, and what to type instead.
    """
