"""How a program ends, called as a function."""

from __future__ import annotations

from collections.abc import Callable


def status(main: Callable[..., None], *arguments: object) -> int:
    """The exit status of a program's main function."""
    try:
        main(*arguments)
    except SystemExit as ended:
        return ended.code
    return 0
