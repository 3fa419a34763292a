"""The commands of docs/your-file.md run as they are printed, on the files that it shows."""

import importlib
import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "your-file.md").read_text(encoding="utf-8")
FILES = re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S) for line in block.splitlines()]
READ_AS = {
    "pairs": "pairs", "parallel": "pairs", "flag": "flagembedding", "tevatron": "tevatron", "dpr": "dpr",
    "triplets": "anchors", "chat": "messages",
}  # fmt: skip


def test_the_page_has_a_file_of_every_layout():
    names = [name for name, _ in FILES]
    assert len(names) == len(set(names)) == 10
    assert all(name.partition("/")[0] in "\n".join(COMMANDS) for name in names)


def test_its_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    said = {}
    for command in COMMANDS:
        python, m, module, *arguments = shlex.split(command)
        assert (python, m) == ("python", "-m")
        small = ["model.scratch={vocabulary: 300, hidden: 32, layers: 1, heads: 2}"]
        importlib.import_module(module).main(arguments + small * (module != "hbt_fast.evaluate"))
        said[command] = capsys.readouterr().out
    shown = re.search(r"^    pairs: 6 of 6 rows.*?\n\n", PAGE, re.M | re.S)[0]
    assert "\n".join(line[4:] for line in shown.strip("\n").splitlines()) in said[COMMANDS[0]]
    read = {}
    for command, words in said.items():
        assert "not used" not in words, command
        found = re.findall(r"^(\w+): \d+ of .*\n  read as (\w+):", words, re.M)
        assert all(READ_AS[name] == layout for name, layout in found)
        read |= dict(found)
    assert read == READ_AS
    assert "prompts of its own: query 'Question: ', passage ''" in said[COMMANDS[-1]]
