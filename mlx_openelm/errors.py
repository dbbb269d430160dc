"""The one error that a user meets."""


class OpenELMError(Exception):
    """What happened, what was found (file and line where there is one), what to do.

    The message is a finished sentence for a person: the command line prints it after
    "error:" and leaves with code 1. Anything else that escapes is a bug of ours.
    """
