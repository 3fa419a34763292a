"""The frame of every program: how it ends, and what it says then.

0    it did what its settings say
2    something that the user can mend: one message
130  Ctrl-C; 128 + number for another signal
1    anything else: a fault of hbt_fast, with a traceback
"""

from __future__ import annotations

import atexit
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from hbt_fast.base.errors import StoppedError, UserError

P = ParamSpec("P")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a write to an open file fails so, without a file name


def program(name: str, *also: type[Exception]) -> Callable[[Callable[P, object]], Callable[P, None]]:
    """Make a function the main function of a program: it returns where all is done, and exits with a status otherwise.

    Args:
        name: of the program, before each message.
        also: errors besides UserError that are the user's to mend.
    """

    def frame(main: Callable[P, object]) -> Callable[P, None]:
        @functools.wraps(main)
        def framed(*arguments: P.args, **named: P.kwargs) -> None:
            try:
                main(*arguments, **named)
            except (UserError, *also) as error:
                end(name, str(error), 2)
            except StoppedError as stopped:
                end(name, str(stopped), 128 + stopped.number)
            except KeyboardInterrupt:
                end(name, "interrupted (Ctrl-C)", 130)
            except MemoryError as error:
                end(name, f"memory ran out{': ' * bool(str(error))}{error}", 2)
            except BrokenPipeError:  # its output went to a program that has ended, such as head
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
            except OSError as error:
                if error.filename is None and error.errno not in DISK:
                    raise
                where = "" if error.filename is None else f"{error.filename}: "
                end(name, f"{where}{error.strerror}", 2)

        return framed

    return frame


def end(name: str, message: str, status: int) -> NoReturn:
    """End the program with a message on stderr and a status."""
    print(f"{name}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def as_process(main: Callable[[], None], leave: Callable[[], bool]) -> None:
    """Call the main function of a program as a process of its own.

    Args:
        main: a `program`.
        leave: is called last, on every way out. True: the process ends with what is registered with atexit, and its
            interpreter is not taken down, which threads that are still running might not survive.
    """
    status: object = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if leave():
        if isinstance(status, str):
            print(status, file=sys.stderr)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)
    sys.exit(status)
