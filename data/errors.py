"""The one exception that means: the user's input is wrong, and here is the remedy."""


class UserError(ValueError):
    """Says which field or file is wrong, what the rule is and what to do about it.

    The command line prints it without a traceback and exits with status 2.
    """
