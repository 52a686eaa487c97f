"""The one exception for what a user can cause and mend."""


class UserError(ValueError):
    """Input that cannot be used; the message names the key or file and says what to do.

    Entry points print the message as one line and exit with code 2, without a stack trace.
    """
