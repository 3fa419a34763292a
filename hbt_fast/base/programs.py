"""The frame of every program: how it ends, and what it says then.

0    it did what its settings say
2    something that the user can mend: one message
130  Ctrl-C; 128 + number for another signal
1    anything else: a fault of hbt_fast, with a traceback
"""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from hbt_fast.base.errors import StoppedError, UserError

P = ParamSpec("P")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a write to an open file fails so, without a file name


def program(
    name: str, *also: type[Exception], at_end: Callable[[], None] = lambda: None
) -> Callable[[Callable[P, object]], Callable[P, None]]:
    """Make a function the main function of a program: it returns where all is done, and exits with a status otherwise.

    Args:
        name: of the program, before each message.
        also: errors besides UserError that are the user's to mend.
        at_end: is called last, when nothing of what the program did is held any more, its exceptions included.
    """

    def frame(main: Callable[P, object]) -> Callable[P, None]:
        def status(*arguments: P.args, **named: P.kwargs) -> int | str | None:
            """What the program exits with; its message is written."""
            try:
                main(*arguments, **named)
            except SystemExit as ended:
                return ended.code
            except (UserError, *also) as error:
                return _said(name, str(error), 2)
            except StoppedError as stopped:
                return _said(name, str(stopped), 128 + stopped.number)
            except KeyboardInterrupt:
                return _said(name, "interrupted (Ctrl-C)", 130)
            except MemoryError as error:
                return _said(name, f"memory ran out{': ' * bool(str(error))}{error}", 2)
            except BrokenPipeError:  # its output went to a program that has ended, such as head
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            except OSError as error:
                if error.filename is None and error.errno not in DISK:
                    raise
                where = "" if error.filename is None else f"{error.filename}: "
                return _said(name, f"{where}{error.strerror}", 2)
            return 0

        @functools.wraps(main)
        def framed(*arguments: P.args, **named: P.kwargs) -> None:
            code = status(*arguments, **named)
            at_end()
            if code:
                sys.exit(code)

        return framed

    return frame


def end(name: str, message: str, status: int) -> NoReturn:
    """End the program with a message on stderr and a status."""
    sys.exit(_said(name, message, status))


def _said(name: str, message: str, status: int) -> int:
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    return status
