"""A mistake on the command line of any program is one message and status 2; --help is 0; Ctrl-C is 130."""

import importlib
import signal
import subprocess
import sys

import pytest
from programs import status

WRONG = {
    "train": (["--trian.steps=3"], ["--config", "none.yaml"], ["--config"]),
    "prepare": (["--data.soruces=[]"], ["data.sources=[{path: none.jsonl}]"], []),
    "plan": (["--batch-size", "3"], ["--config", "."], []),
    "estimate": (["--wrold", "8"], ["--config", "none.yaml"], ["--world"]),
    "mine": (["--range_mxa=3"], ["--model", "none", "--out", "x.jsonl", "--config", "none.yaml"], []),
    "lexicon": (["--langauges"], ["--source", "none.tmx", "--languages", "en", "de", "--out", "x"], []),
    "encode": (["m", "f", "--oot", "x"], ["none", "none.txt", "--out", "x.npy", "--prompt", ""], []),
    "evaluate": (["m", "--dtaa", "x"], ["none", "--data", "none"], []),
    "compare": (["a", "b", "--otu", "x"], ["none.json", "none2.json"], []),
    "report": (["runs/x", "--otu"], ["none"], []),
}
CASES = [(name, case) for name, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{name} {' '.join(case)}" for name, case in CASES])
def test_mistakes_end_with_one_message_and_status_2(name, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(importlib.import_module(f"hbt_fast.{name}").main, arguments) == 2
    said = capsys.readouterr().err
    assert said.strip()
    assert "Traceback" not in said


@pytest.mark.parametrize("name", WRONG)
def test_help_ends_with_0(name, capsys):
    assert status(importlib.import_module(f"hbt_fast.{name}").main, ["--help"]) in (0, None)
    assert capsys.readouterr().out.strip()


def test_ctrl_c_is_130_and_one_line():
    code = (
        "import time; from hbt_fast.base.programs import program\n"
        "@program('p')\ndef main():\n    print('on', flush=True); time.sleep(60)\nmain()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.readline()
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 130
        assert started.stderr.read() == b"p: interrupted (Ctrl-C)\n"
