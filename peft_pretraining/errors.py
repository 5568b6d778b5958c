"""The one exception that both scripts turn into a sentence for the user and a non-zero exit code."""


class UserError(Exception):
    """Something the user can put right. Its text is the whole message: what is wrong, where, what to type instead."""
