"""The root of all errors that a user can mend.

Each part has a class of its own below it (DataError, EncoderError, SettingError, ...). Whatever program meets one ends
with its message and status 2; anything else that is raised is a fault of hbt_fast, and ends with a traceback.
"""

from __future__ import annotations

import signal


class UserError(ValueError):
    """Settings, data, files or a model that cannot be used.

    The message names the file and line, or the setting, and says what to write instead.
    """


class FileError(UserError, OSError):
    """A file that cannot be written: a full disk, a folder that is read-only or gone. The message says what to do."""


class StoppedError(Exception):
    """A signal stopped the program after what it had to keep was written.

    Args:
        number: of the signal.
        message: what was kept, and how to go on.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} {message}")
        self.number = number
