"""Training data that is not what a run began with: refused with the source and what changed; put right, it goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hbt_fast.train import main

SOURCES = "data.sources=[{path: faq.jsonl, name: faq}, {path: manual.jsonl, name: manual}]"
RUN = [
    "data.store_dir=stores", "batch.size=8", "batch.strategy=mono", "model.path=start", "train.run_dir=run",
    "train.steps=6", "train.checkpoint_every=3", "train.learning_rate=0.01", "train.micro_batch_tokens=256",
    "train.keep_gib=0",
]  # fmt: skip


def write(folder, name, rows, **changed):
    """Rows as JSON Lines; `changed` replaces those of the given numbers, as r3="other text"."""
    texts = {i: changed.get(f"r{i}", f"the answer of {name} to {i}") for i in range(rows)}
    lines = [json.dumps({"query": f"{name} asks {i}", "passage": t, "language": "en"}) for i, t in texts.items()]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, "faq", 40)
    write(folder, "manual", 30)
    scratch = ["model.path=null", "model.scratch={vocabulary: 300, hidden: 32, layers: 1, heads: 2}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*RUN, SOURCES, *scratch, "train.run_dir=scratch", "train.steps=1"])
        (folder / "scratch" / "model").rename(folder / "start")
        main([*RUN, SOURCES])
    return folder


@pytest.fixture
def stopped(whole, tmp_path, monkeypatch):
    """A copy of it as it was halfway."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "checkpoint-000006")
    shutil.rmtree(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, *settings):
    """What the resumed run says when it refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*RUN, "train.resume=true", *settings])
    assert ended.value.code == 2
    return capsys.readouterr().err


def assert_goes_on(folder, whole, capsys):
    """The resumed run ends as the whole one did."""
    main([*RUN, SOURCES, "train.resume=true"])
    assert "checkpoint-000003: 3 of 6 steps are done" in capsys.readouterr().out
    ours, theirs = (load_file(which / "run" / "model" / "model.safetensors") for which in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_row_more_is_refused_until_the_file_is_what_it_was(stopped, whole, capsys):
    write(stopped, "faq", 41)
    said = refusal(capsys, SOURCES)
    for words in (
        "checkpoint-000003 is of a run with other settings or data", "data: faq: rows was 40, is 41",
        "data: faq: contents of files was", "Set them back; or start a new run (another train.run_dir)",
    ):  # fmt: skip
        assert words in said
    assert "manual" not in said
    write(stopped, "faq", 40)
    assert_goes_on(stopped, whole, capsys)


def test_one_word_of_one_row_is_noticed(stopped, capsys):
    write(stopped, "manual", 30, r17="the answer of manual to 71")
    said = refusal(capsys, SOURCES)
    assert "data: manual: contents of files was" in said
    assert "rows was" not in said
    assert "faq" not in said


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (SOURCES.replace("name: faq", "name: faq, limit: 30"), "data: faq: source: limit was None, is 30"),
        (SOURCES.replace("name: faq", "name: faq, weight: 2"), "data: faq: weight was None, is 2.0"),
        ("model.query_prompt=Q", "data: manual: query: prompt was 'Query: ', is 'Q'"),
        ("model.passage_max_length=9", "data: faq: passage: max_length was 256, is 9"),
        ("data.languages=[en]", "data: faq: languages was None, is ['en']"),
        (SOURCES.replace(", {path: manual.jsonl, name: manual}", ""), "sources was ['faq', 'manual'], is ['faq']"),
        ("data.sources=[{path: manual.jsonl}, {path: faq.jsonl}]", "sources was ['faq', 'manual'], is ['manual'"),
    ],
)  # fmt: skip
def test_the_setting_that_makes_other_data_is_named(stopped, capsys, changed, message):
    assert message in refusal(capsys, SOURCES, changed)


def test_a_store_that_was_tampered_with_is_refused_and_made_anew_the_run_goes_on(stopped, whole, capsys):
    (array,) = [path for path in stopped.glob("stores/source-*/tokens.npy") if b'"manual"' in source_json(path)][-1:]
    content = bytearray(array.read_bytes())
    content[-4] ^= 1
    array.write_bytes(content)
    said = refusal(capsys, SOURCES)
    folder = array.parent.relative_to(stopped)
    assert f"{folder}/tokens.npy: its checksum is not that of what was written" in said
    assert f"delete {folder} and prepare the data again" in said
    shutil.rmtree(array.parent)
    assert_goes_on(stopped, whole, capsys)


def source_json(array):
    return (array.parent / "source.json").read_bytes()
