"""The one exception for what a user can cause and mend."""

from collections.abc import Iterable

LISTED = 10
"""How many of many names a message gives."""


class UserError(ValueError):
    """Input that cannot be used; the message names the key or file and says what to do.

    Entry points print the message as one line and exit with code 2, without a stack trace.
    """


def check(name: str, settings: object, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raise a UserError for the first (key, whether it holds, what is allowed) that fails."""
    for key, good, allowed in rules:
        if not good:
            raise UserError(f"{name}.{key} is {vars(settings)[key]}; it must be {allowed}")


def listed(names: Iterable[str]) -> str:
    """List the first names, and say how many more there are."""
    found = list(names)
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(found[:LISTED]) + more
