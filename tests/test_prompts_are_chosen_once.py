"""One choice of prompts for all programs: what is given, else what the checkpoint records, else none; it is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from hbt_fast import encode, evaluate
from hbt_fast.config import ModelConfig, parse
from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export
from hbt_fast.encoder.prompts import choose_prompts
from hbt_fast.prepare import resolve
from hbt_fast.train import train

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture
def record(make_encoder, tmp_path):
    """Writes a checkpoint that records prompts, and a file of rows beside it."""

    def made(name="model", **settings):
        folder = export(make_encoder(), tmp_path / name)
        path = folder / "config_sentence_transformers.json"
        path.unlink()
        if settings:
            path.write_text(json.dumps(settings))
        rows = [{"query": f"en which {i} red", "passage": f"en the blue {i} old", "language": "en"} for i in range(8)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return made


def resolved(*arguments):
    config, prompts = resolve(parse("test", "", [str(a) for a in arguments]))
    return (config.model.query_prompt, config.model.passage_prompt), prompts.lines


def test_what_is_given_wins_then_what_is_recorded_then_none(record):
    folder = record(prompts={"query": "query: ", "document": "passage: "})
    texts, lines = resolved(f"model.path={folder}")
    assert texts == ("query: ", "passage: ")
    assert lines == [
        "query prompt 'query: ' (recorded with the model)",
        "passage prompt 'passage: ' (recorded with the model)",
    ]
    texts, lines = resolved(f"model.path={folder}", "model.query_prompt=ask: ", "model.passage_prompt=")
    assert texts == ("ask: ", "")
    assert lines == ["query prompt 'ask: ' (model.query_prompt)", "passage prompt '' (model.passage_prompt)"]
    texts, lines = resolved(f"model.path={record('plain')}")
    assert texts == ("", "")
    assert lines[0] == "query prompt '' (none is recorded with the model)"


def test_null_is_null_on_the_command_line_and_in_yaml(record, tmp_path):
    folder = record(prompts={"query": "query: "})
    (tmp_path / "run.yaml").write_text(f"model: {{path: {folder}, query_prompt: null, passage_prompt: null}}\n")
    for given in (["--config", tmp_path / "run.yaml"], [f"model.path={folder}", "model.query_prompt=null"]):
        assert resolved(*given)[0] == ("query: ", "")


def test_an_encoder_from_nothing_has_the_papers(tmp_path):
    assert resolved()[0] == ("Query: ", "Passage: ")
    for name in ("demo", "demo-mono", "demo-cross", "hybrid-e5", "code-switched"):
        config = parse("test", "", ["--config", str(CONFIGS / f"{name}.yaml")]).model
        e5 = config.path is not None
        given = {"query": config.query_prompt, "passage": config.passage_prompt}
        assert choose_prompts(config.path, given).texts == (
            ("query: ", "passage: ") if e5 else ("Query: ", "Passage: ")
        )


def test_what_a_family_was_trained_with_is_said_and_not_taken(record):
    said = choose_prompts(str(record("multilingual-e5-small")), {}, option="--{kind}-prompt")
    assert said.texts == ("", "")
    hint = "none is recorded with the model; E5 was trained with 'passage: ': --passage-prompt sets it"
    assert said.lines[1] == f"passage prompt '' ({hint})"
    # sentence-transformers 5 writes empty prompts into every model that it saves
    said = choose_prompts(str(record("bge-small-en-v1.5", prompts={"query": "", "document": ""})), {})
    assert "recorded with the model; BGE was trained with 'Represent this" in said.query.line
    assert said.passage.line == "passage prompt '' (recorded with the model)"
    inner = record("Multilingual-E5-small/best")
    assert "E5 was trained with 'query: '" in choose_prompts(f"{inner}/", {}).query.line
    assert "trained with" not in choose_prompts(str(record("re5earch")), {}).query.line


def test_the_default_of_the_record_is_put_before_what_it_has_no_prompt_for(record):
    folder = record(prompts={"search": "find: ", "document": "doc: "}, default_prompt_name="search")
    assert choose_prompts(str(folder), {}).texts == ("find: ", "doc: ")


def test_other_prompts_of_the_record_are_exported_again(record, tmp_path):
    prompts = {"query": "query: ", "STS": "same? ", "document": "passage: "}
    folder = record(prompts=prompts, default_prompt_name="STS")
    encoder = Encoder.from_pretrained(folder, prompts={"query": "ask: "})
    written = json.loads((export(encoder, tmp_path / "again") / "config_sentence_transformers.json").read_text())
    assert written["prompts"] == prompts | {"query": "ask: ", "passage": "passage: "}
    assert written["default_prompt_name"] == "STS"


def test_training_takes_the_recorded_prompts_says_so_and_exports_them(record, tmp_path, monkeypatch, capsys):
    folder = record(prompts={"query": "query: ", "document": "passage: "})
    monkeypatch.chdir(tmp_path)
    settings = f"model.path={folder} train.steps=1 batch.size=4 batch.strategy=mono train.engine=torch"
    lengths = "model.query_max_length=32 model.passage_max_length=32 model.max_length=32 train.run_dir=run"
    config = parse("test", "", [*settings.split(), *lengths.split(), "data.sources=[{path: rows.jsonl}]"])
    assert config.model.query_prompt is None is ModelConfig().passage_prompt
    train(config)
    assert "query prompt 'query: ' (recorded with the model)\npassage prompt 'passage: '" in capsys.readouterr().out
    assert Encoder.from_pretrained("run/model").prompts == {"query": "query: ", "passage": "passage: "}
    assert "query_prompt: 'query: '" in (tmp_path / "run" / "config.yaml").read_text()
    assert '{"query": "query: ", "passage": "passage: "}' in (tmp_path / "run" / "model" / "README.md").read_text()


def test_a_folder_that_is_not_there_is_said_to_be_none():
    with pytest.raises(EncoderError, match="/nowhere/model: no such folder; give a checkpoint folder or a hub name"):
        choose_prompts("/nowhere/model", {})


def test_prompts_of_a_source_are_exported_and_chosen_by_its_name(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(prompts={"query": "query: ", "document": "passage: "})
    sources = "data.sources=[{path: rows.jsonl, name: a}, {path: rows.jsonl, name: b, prompts: {query: 'find: '}}]"
    small = ["batch.size=4", "batch.strategy=mono", "train.steps=1", "train.run_dir=run", "data.store_dir=stores"]
    small += [f"model.{name}_length=24" for name in ("query_max", "passage_max", "max")]
    train(parse("t", "", ["model.path=model", sources, *small, "train.engine=torch", "eval.task=none"]))
    recorded = json.loads((tmp_path / "run/model/config_sentence_transformers.json").read_text())["prompts"]
    assert recorded == {
        "query": "query: ", "passage": "passage: ", "document": "passage: ", "b query": "find: ",
        "b passage": "passage: ",
    }  # fmt: skip
    found = choose_prompts("run/model", {}, of="b")
    assert found.lines == [
        "query prompt 'find: ' (recorded with the model for source b)",
        "passage prompt 'passage: ' (recorded with the model for source b)",
    ]
    given = choose_prompts("run/model", {"query": "ask: ", "passage": None}, of="b")
    assert given.lines[0] == "query prompt 'ask: ' (command line)"
    with pytest.raises(EncoderError, match="no prompts of a source 'a' are recorded with it; there are query, "):
        choose_prompts("run/model", {}, of="a")
    (tmp_path / "texts.txt").write_text("en which 1 red\n")
    lines = ["run/model", "texts.txt", "--as", "query", "--out"]
    encode.main([*lines, "b.npy", "--prompts-of", "b"])
    encode.main(["run/model", "texts.txt", "--prompt", "find: ", "--out", "c.npy"])
    assert (np.load("b.npy") == np.load("c.npy")).all()
    arguments = evaluate.parse(["run/model", "--data", "x", "--prompts-of", "b"])
    assert evaluate.prompts_of(arguments).texts == ("find: ", "passage: ")
