"""Claims about how the evaluation program's --data, --languages and --groups are read, for every task."""

from __future__ import annotations

import json
import zipfile

import pytest
from programs import status
from test_evaluation_program import WordEncoder
from test_evaluation_tasks import paragraph, write

from hbt_fast import evaluate as program
from hbt_fast.evaluation.load import parse_groups
from hbt_fast.evaluation.tasks import RetrievalTask


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return write(folder, en=paragraph("en"), de=paragraph("de"))


def task_of(*flags) -> RetrievalTask:
    return program.load_task(program.parse(["m", *map(str, flags)]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("low", 'write "low=sw,yo;high=en,de"'),
        ("low=", "write"),
        ("a=en;a=de", "two groups are called 'a'; give each a name of its own"),
        ("FOLDER/twice.yaml", "two groups are called '2024'; give each"),
        ("FOLDER/text.yaml", "write"),
        ("absent.yaml", "absent.yaml"),
        ("FOLDER/list.json", "write"),
        ("FOLDER/broken.yaml", "broken.yaml"),
        ("low=xx", "group 'low': no query is in xx; the languages of the queries are de, en"),
    ],
)
def test_bad_groups_are_named(folder, tmp_path, text, message, capsys):
    (tmp_path / "list.json").write_text('["en"]')
    (tmp_path / "twice.yaml").write_text("2024: [en]\n'2024': [de]\n")
    (tmp_path / "text.yaml").write_text("en")
    (tmp_path / "broken.yaml").write_text("a: [")
    text = text.replace("FOLDER", str(tmp_path))
    assert status(program.main, ["m", "--data", str(folder), "--groups", text], lambda args, device: WordEncoder()) == 2
    assert message in capsys.readouterr().err


def test_names_and_codes_of_groups_are_text(tmp_path):
    """In YAML "no", which is Norwegian, is false elsewhere, and 2024 a number."""
    (tmp_path / "groups.yaml").write_text("2024: [no, en]\nyes: [sw]\n")
    assert parse_groups(str(tmp_path / "groups.yaml")) == {"2024": ["no", "en"], "yes": ["sw"]}
    (tmp_path / "groups.json").write_text('{"low": ["sw", "yo"]}')
    assert parse_groups(str(tmp_path / "groups.json")) == parse_groups("low=sw, yo") == {"low": ["sw", "yo"]}


def test_languages_may_be_written_with_spaces(folder, tmp_path):
    assert task_of("--data", folder, "--languages", "en, de").languages == ["de", "en"]
    lines = [{"query": f"{code}?", "passage": code, "language": code} for code in ("en", "de", "fr")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = ("--task", "jsonl", "--data", tmp_path / "own.jsonl")
    assert task_of(*own, "--languages", " en ,de").queries == ["en?", "de?"]
    for code in ("de", "en", "fr"):
        (folder / f"text.{code}").write_text("a\nb\n")
    bitext = task_of("--task", "bitext", "--data", folder, "--languages", "de, en")
    assert sorted(bitext.languages.values()) == ["de", "en"]


def test_own_jsonl_may_lie_in_an_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.writestr("own.jsonl", json.dumps({"query": "a?", "passage": "A"}))
    assert task_of("--task", "jsonl", "--data", f"zip://own.jsonl::{tmp_path / 'own.zip'}").queries == ["a?"]


@pytest.mark.parametrize("task", ["xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "rerank", "bitext"])
def test_a_folder_in_an_archive_is_refused(task, capsys):
    flags = ["m", "--task", task, "--data", "zip://scifact::beir.zip"]
    assert status(program.main, flags, lambda args, device: WordEncoder()) == 2
    expected = f"zip://scifact::beir.zip: {task} is read from a folder; unpack the archive and give its folder\n"
    assert capsys.readouterr().err == f"hbt_fast.evaluate: {expected}"
