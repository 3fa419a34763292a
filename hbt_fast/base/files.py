"""Files and folders that are there whole or not at all, with the permissions that the user's umask gives.

A crash, a kill or a full disk at any moment leaves the earlier file as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hbt_fast.base.errors import FileError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is there with all its content or not at all.

    Args:
        path: of the file; its folder must be there.
        content: text is written in UTF-8.

    Raises:
        FileError: it cannot be written.
    """
    with replacing(path) as begun:
        begun.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; when the block ends it is synced and takes the place of `path`.

    Raises:
        FileError: it cannot be written.
    """
    begun = path.with_name(f"{path.name}.{os.getpid()}.begun")
    with writing(path):
        try:
            yield begun
            begun.chmod(0o666 & ~_umask())
            sync(begun)
            begun.replace(path)
            sync(path.parent)
        finally:
            begun.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write files to; when the block ends it is synced and takes the place of `folder`.

    Raises:
        FileError: it cannot be written.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        begun = Path(tempfile.mkdtemp(".begun", f".{folder.name}.", folder.parent))
        try:
            yield begun
            settle(begun)
            if folder.exists():
                aside = begun.with_suffix(".old")
                folder.rename(aside)
                begun.rename(folder)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                begun.rename(folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(begun, ignore_errors=True)
            raise


def settle(folder: Path) -> None:
    """Give a folder and all in it the umask's permissions (safetensors and tempfile write 0600), and sync it."""
    mask = _umask()
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        sync(path)


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names of a folder's files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, instead: str = "make room, or name another place, and start again") -> Iterator[None]:
    """Turn what the system says while a file or folder is written into a message that says what to do.

    Args:
        path: what is written.
        instead: what to do.

    Raises:
        FileError: an OSError was raised.
    """
    try:
        yield
    except FileError:  # it says more
        raise
    except (FileExistsError, NotADirectoryError) as error:
        file = next((there for there in (*reversed(path.parents), path) if there.exists() and not there.is_dir()), path)
        instead = "name another place" if "make room" in instead else instead
        raise FileError(
            f"{path} could not be written: {file} is a file, and a folder is needed there; move it away, or {instead}"
        ) from error
    except OSError as error:
        raise FileError(
            f"{path} could not be written: {error.strerror or error}{free_space(path)}; {instead}"
        ) from error


def free_space(path: Path) -> str:
    """What room there is on the disk of a path, in words; nothing where that cannot be told."""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.is_dir()), None)
    try:
        free = shutil.disk_usage(there).free
    except (OSError, TypeError):
        return ""
    return f" ({there} has {free / 2**20:,.1f} MiB free)"


def _umask() -> int:
    """The umask. Asking the system for it sets it, which other threads would see, so /proc is asked first."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
