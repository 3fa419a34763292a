"""How programs end: a status that says what happened, one message on stderr; a traceback is a fault of ours."""

import atexit
import errno
import os
import signal
import subprocess
import sys

import pytest
from programs import status

from hbt_fast.base.errors import FileError, StoppedError, UserError
from hbt_fast.base.files import replacing, settle, whole_folder, write_whole, writing
from hbt_fast.base.programs import as_process, program
from hbt_fast.data.rows import DataError
from hbt_fast.encoder import EncoderError
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.checkpoint import CheckpointError
from hbt_fast.engine.guard import DivergedError
from hbt_fast.evaluation.compare import CompareError
from hbt_fast.evaluation.run import EvaluationError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a.jsonl:3: no text"), 2, "p: a.jsonl:3: no text\n"),
        (StoppedError(signal.SIGTERM, "after 3 steps"), 143, "p: stopped by SIGTERM after 3 steps\n"),
        (KeyboardInterrupt(), 130, "p: interrupted (Ctrl-C)\n"),
        (MemoryError("a table of 3 GiB"), 2, "p: memory ran out: a table of 3 GiB\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x/y"), 2, "p: x/y: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "p: No space left on device\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "p: Disk quota exceeded\n"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "p: Read-only file system\n"),
        (OSError(errno.EIO, "Input/output error"), 2, "p: Input/output error\n"),
        (MemoryError(), 2, "p: memory ran out\n"),
    ],
)
def test_what_ends_a_program_is_one_message_and_a_status(error, code, said, capsys):
    @program("p")
    def main():
        raise error

    assert status(main) == code
    assert capsys.readouterr().err == said


def test_output_that_nobody_reads_any_more_ends_the_program_as_the_signal_would(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)

    @program("p")
    def main():
        print("x", flush=True)

    with monkeypatch.context() as patch, open(writer, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert status(main) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_a_text_that_a_program_ends_with_is_said_also_where_the_interpreter_stays_up(monkeypatch, capsys):
    def left(status):
        raise InterruptedError(status)

    monkeypatch.setattr(os, "_exit", left)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    with pytest.raises(InterruptedError, match="1"):
        as_process(lambda: sys.exit("no such thing"), lambda: True)
    assert capsys.readouterr().err == "no such thing\n"


def test_a_fault_of_ours_stays_a_traceback():
    for error in (ValueError("x"), KeyError("x"), OSError("no file is named")):

        @program("p")
        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            main()


def test_all_errors_that_a_user_can_mend_have_one_root():
    for kind in (
        DataError, EncoderError, SettingError, CheckpointError, DivergedError, CompareError, EvaluationError, FileError,
    ):  # fmt: skip
        assert issubclass(kind, UserError)


def test_files_are_there_whole_or_not_at_all_and_have_the_modes_of_the_umask(tmp_path):
    path, folder = tmp_path / "a.json", tmp_path / "deep" / "model"
    before = os.umask(0o027)
    try:
        write_whole(path, "one")
        with pytest.raises(FileError), replacing(path) as begun:  # noqa: PT012
            begun.write_text("two")
            raise OSError(errno.ENOSPC, "No space left on device")
        with whole_folder(folder) as begun:
            (begun / "weights").touch(0o600)
            (begun / "inner").mkdir(0o700)
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error), whole_folder(folder) as begun:  # noqa: PT012
                (begun / "weights").write_text("half")
                raise error
        with whole_folder(tmp_path / "again") as begun:
            (begun / "old").touch()
        with whole_folder(tmp_path / "again") as begun:
            (begun / "new").touch()
    finally:
        os.umask(before)
    assert path.read_text() == "one"
    assert {name.name for name in tmp_path.rglob("*")} == {
        "a.json",
        "deep",
        "model",
        "weights",
        "inner",
        "again",
        "new",
    }
    assert (folder / "weights").read_text() == ""
    modes = [oct(p.stat().st_mode & 0o777) for p in (path, folder / "weights", folder, folder / "inner")]
    assert modes == ["0o640", "0o640", "0o750", "0o750"]
    settle(folder)


def test_the_umask_is_known_and_stays_where_the_system_does_not_tell_it(monkeypatch, tmp_path):
    def gone(*_, **__):
        raise FileNotFoundError

    before = os.umask(0o026)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.read_text", gone)
            for name in ("a", "b"):
                write_whole(tmp_path / name, "x")
        assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "b")] == [0o640, 0o640]
    finally:
        assert os.umask(before) == 0o026


def test_a_file_that_cannot_be_written_says_so_with_the_room_there_is(tmp_path, monkeypatch):
    def unknown(path):
        raise OSError

    with pytest.raises(
        FileError, match=r"gone/a could not be written: No such file or directory \(.* MiB free\); make"
    ):
        write_whole(tmp_path / "gone" / "a", "x")
    monkeypatch.setattr("shutil.disk_usage", unknown)
    with pytest.raises(FileError, match=r"a could not be written: No such file or directory; make room"):
        write_whole(tmp_path / "gone" / "a", "x")
    with pytest.raises(FileError, match=r"^it says more$"), writing(tmp_path):
        raise FileError("it says more")
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileError, match=r"file/model could not be written: "),
        whole_folder(tmp_path / "file" / "model"),
    ):
        pass


GROUP = """
import atexit, os, sys, torch
from hbt_fast import train
from hbt_fast.base.errors import StoppedError, UserError
from hbt_fast.engine.launch import start

class Finalised:
    def __del__(self, write=os.write):
        write(2, b"the interpreter was taken down")

def work(config):
    held.append(start(config.train).group)
    torch.distributed.all_reduce(torch.ones(3))
    print("done")
    if sys.argv[1] == "user error":
        raise UserError("x")
    if sys.argv[1] == "signal":
        raise StoppedError(15, "x")
    if sys.argv[1] == "lost rank":
        raise RuntimeError("gloo: connection closed by peer")
    if sys.argv[1] == "fault":
        raise KeyError("x")

held, train.train = [Finalised()], work
atexit.register(print, "at exit")
arguments = ["train.engine=deepspeed"]
main, train.main = train.main, lambda: main(arguments)
train.run()
"""


@pytest.mark.parametrize(
    ("how", "code"), [("", 0), ("user error", 2), ("signal", 143), ("lost rank", 1), ("fault", 1), ("settings", 2)]
)
def test_a_process_with_a_process_group_ends_without_taking_the_interpreter_down(how, code):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    program = GROUP.replace('"train.engine=deepspeed"', '"train.steps=x"') if how == "settings" else GROUP
    command = [sys.executable, "-c", program, how]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.splitlines() == [*(["done"] if how != "settings" else []), "at exit"]
    assert ("Traceback" in ended.stderr) == (how == "fault")
    assert ("taken down" in ended.stderr) == (how == "settings")  # there was no process group
