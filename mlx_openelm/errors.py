"""The error type of the project."""


class OpenELMError(Exception):
    """An error for the user: what happened, where (file and line), and what to do.

    The message is a complete sentence. The command line prints it after "error:" and
    exits with code 1. Any other exception that reaches the user is a bug.
    """
