"""What a source has of its own - prompts, hard negatives, a teacher's scores - reaches all that it is used for."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import build_store
from test_mining import Mock

from hbt_fast import mine
from hbt_fast.config import ModelConfig, parse
from hbt_fast.data.code_switch import CodeSwitch
from hbt_fast.data.feed import Feed
from hbt_fast.data.mining import gather
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.store import Role
from hbt_fast.data.switching import Switching
from hbt_fast.encoder.prompts import choose_prompts
from hbt_fast.overview import in_words, overview
from hbt_fast.prepare import prepare
from hbt_fast.train import train

SMALL = ["model.scratch={vocabulary: 300, hidden: 32, layers: 1, heads: 2}", "batch.strategy=mono", "batch.size=4"]
ROWS = [{"query": f"which {n}?", "passage": f"the one {n}", "negatives": [f"no {n}", f"never {n}"]} for n in range(12)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configured(*more, a="", b=""):
    sources = f"data.sources=[{{path: a.jsonl, language: en{a}}}, {{path: b.jsonl, language: en{b}}}]"
    return parse("p", "d", [*SMALL, sources, "data.store_dir=stores", *more])


def seen(source, tokenizer, fields):
    return tokenizer.decode(source.text_tokens(fields[0]), skip_special_tokens=True)


def test_prompts_of_a_source_stand_before_its_texts_alone(here):
    config = configured(b=", prompts: {query: 'Find: ', passage: ''}")
    store, tokenizer = prepare(config)
    a, b = store.sources
    assert seen(a, tokenizer, a.field_queries) == "Query: which 0?"
    assert seen(a, tokenizer, a.field_passages) == "Passage: the one 0"
    assert seen(b, tokenizer, b.field_queries) == "Find: which 0?"
    assert seen(b, tokenizer, b.field_passages) == "the one 0"
    assert b.text(b.field_queries[0]) == "which 0?"
    planner = BatchPlanner(store, config.batch)
    said = in_words(overview(choose_prompts(None, {}), store, tokenizer, planner))
    assert said.count("prompts of its own") == 1
    assert "  prompts of its own: query 'Find: ', passage ''" in said
    again, _ = prepare(configured(b=", prompts: {query: 'Find: ', passage: ''}"))
    assert again.identity == store.identity
    assert prepare(configured())[0].identity != store.identity


def test_sources_of_one_name_have_one_prompt(here):
    with pytest.raises(DataError, match=r"named 'x' are one source, but their prompts differs: \{\}, \{'query': 'q'\}"):
        prepare(configured(a=", name: x", b=", name: x, prompts: {query: q}"))


def test_switched_words_get_the_prompt_of_their_source(here):
    (here / "en_de.tsv").write_text("which\twelche\nthe\tdie\n")
    store, tokenizer = prepare(configured(b=", prompts: {query: 'Find: '}"))
    planner = BatchPlanner(store, configured().batch)
    switch = CodeSwitch(lexicons=[str(here / "en_de.tsv")], probability=1.0)
    texts = set()
    with Feed(planner, store, budget=512, steps=6, rewrite=Switching(switch, store, tokenizer, seed=0)) as feed:
        for batch in feed:
            (micro,) = batch.micro_batches
            texts |= {(batch.plan.source, tokenizer.decode(micro.tokens[: micro.cu_seqlens[1]], True).split()[0])}
    assert texts == {(0, "Query:"), (1, "Find:")}


def test_a_prompt_of_the_records_is_that_of_the_source(here):
    write(here / "a.jsonl", [{**row, "prompt": "Search: "} for row in ROWS])
    store, tokenizer = prepare(configured())
    assert seen(store.sources[0], tokenizer, store.sources[0].field_queries) == "Search: which 0?"
    assert seen(store.sources[1], tokenizer, store.sources[1].field_queries) == "Query: which 0?"
    write(here / "a.jsonl", [{**ROWS[0], "prompt": "Search: "}, {**ROWS[1], "prompt": "Find: "}])
    with pytest.raises(DataError, match=r"a.jsonl:2: its prompt is 'Find: ', that of the rows before it 'Search: '"):
        prepare(configured())
    store, tokenizer = prepare(configured("batch.size=1", a=", prompts: {query: 'All: '}"))
    assert seen(store.sources[0], tokenizer, store.sources[0].field_queries) == "All: which 0?"


def test_every_source_has_as_many_hard_negatives_as_it_says(here):
    store, tokenizer = prepare(configured(b=", hard_negatives: 0"))
    planner = BatchPlanner(store, configured("batch.hard_negatives=2").batch)
    counts = {(plan.source, len(plan.negatives)) for plan in map(planner.plan, range(12))}
    assert counts == {(0, 8), (1, 0)}
    store, tokenizer = prepare(configured(b=", hard_negatives: 1"))
    planner = BatchPlanner(store, configured().batch)
    assert {(plan.source, len(plan.negatives)) for plan in map(planner.plan, range(12))} == {(0, 0), (1, 4)}
    assert "hard negatives" in str(store.identity)
    write(here / "b.jsonl", [{"query": row["query"], "passage": row["passage"]} for row in ROWS])
    store, _ = prepare(config := configured(b=", hard_negatives: 3"))
    found = overview(choose_prompts(None, {}), store, tokenizer, BatchPlanner(store, config.batch))
    assert found["not used"][-1] == "hard_negatives of source b is 3, and it has none"


def test_scores_of_a_teacher_are_kept_beside_the_texts(tokenizer, tmp_path):
    rows = [
        Row({"en": "a"}, {"en": "b"}, {"en": ("c", "d"), "de": ("e",)}, None, "", 0.5, {"en": (0.25, 0.125)}),
        Row({"en": "f"}, {"en": "g"}),
        Row({"en": "h"}, {"en": "i"}, {"en": ("j",)}, None, "", None, {"en": (float("nan"),)}),
        Row({"en": "k"}, {"en": "l"}, {"en": ("m",)}, None, "", -1e30),
    ]
    nan = np.nan
    store = build_store(tmp_path / "a", [("s", None, rows)], tokenizer, Role("", 9), Role("", 9), chunk_rows=1)
    assert store.sources[0].row_scores.tolist() == pytest.approx([0.5, nan, nan, -1e30], nan_ok=True)
    assert store.sources[0].negative_scores.tolist() == pytest.approx([0.25, 0.125, nan, nan, nan], nan_ok=True)
    store = build_store(tmp_path / "b", [("s", None, rows[1:2] * 30)], tokenizer, Role("", 9), Role("", 9))
    assert (len(store.sources[0].row_scores), len(store.sources[0].negative_scores)) == (1, 0)  # the same for all


def test_mining_puts_the_prompts_of_the_sources_of_the_model_that_is_trained(here, capsys):
    store, _ = prepare(configured(b=", prompts: {passage: 'Text: '}"))
    prompts = choose_prompts(None, {})
    config = replace(configured(), model=ModelConfig(path="m"))

    def chosen(model, **given):
        options = SimpleNamespace(**{"model": model, "query_prompt": None, "passage_prompt": None, **given})
        return mine._of_sources(options, config, store, prompts)

    assert chosen("m") == [["Query: ", "Query: "], ["Passage: ", "Text: "]]
    assert capsys.readouterr().out.endswith("\npassage prompt of source b: 'Text: '\n")
    assert chosen("other") == chosen("m", passage_prompt="Passage: ") == [["Query: "] * 2, ["Passage: "] * 2]


def test_each_text_is_embedded_with_the_prompt_of_its_source(here, tmp_path):
    store, _ = prepare(configured())
    task, mock = gather(store), Mock()
    mine.embed(mock, store, task.query_texts, ["One: ", "Two: "], tmp_path / "cache", "mock", False)
    assert set(mock.encoded) == {f"{before}which {n}?" for before in ("One: ", "Two: ") for n in range(12)}


def test_a_mined_file_keeps_scores_and_prompt(here):
    write(here / "a.jsonl", [{**row, "prompt": "Search: ", "scores": 1, "negative_scores": [2, None]} for row in ROWS])
    arguments = [
        "--model",
        "m",
        "--out",
        "mined-{source}.jsonl",
        "--num_negatives",
        "1",
        "--range_min",
        "0",
        "--range_max",
        "5",
    ]
    arguments += ["--query_prompt", "", "--passage_prompt", "", "--absolute_margin", "null"]
    sources = "data.sources=[{path: a.jsonl, language: en}, {path: b.jsonl, language: en}]"
    mine.main([*arguments, *SMALL, sources, "data.store_dir=stores"], load=lambda *_: (Mock(), "mock"))
    rows = list(read_source(Source("mined-a.jsonl")))
    assert [(row.prompt, row.score) for row in rows] == [("Search: ", 1.0)] * 12
    for n, row in enumerate(rows):
        assert row.negatives["en"][:2] == (f"no {n}", f"never {n}")
        assert row.negative_scores["en"] == pytest.approx([2, *[np.nan] * (len(row.negatives["en"]) - 1)], nan_ok=True)
    assert max(len(row.negatives["en"]) for row in rows) == 3
    assert not any(row.prompt or row.score or row.negative_scores for row in read_source(Source("mined-b.jsonl")))


def test_hard_negatives_that_nobody_asked_for_are_said(here):
    store, tokenizer = prepare(config := configured(b=", hard_negatives: 1"))
    found = overview(choose_prompts(None, {}), store, tokenizer, BatchPlanner(store, config.batch))
    assert found["not used"] == ["the hard negatives of a, for batch.hard_negatives is 0"]


def test_labels_that_are_not_read_are_counted(here):
    write(here / "a.jsonl", [{**row, "label": n % 3, "score": -1.0} for n, row in enumerate(ROWS)])
    store, tokenizer = prepare(config := configured())
    said = in_words(overview(choose_prompts(None, {}), store, tokenizer, BatchPlanner(store, config.batch)))
    assert "not read: label; label is 0 or below in 4 of the first rows, which count as answers, too" in said
    assert "score is 0" not in said  # it is read, as a teacher's


def test_a_prompt_of_all_sources_is_that_of_the_model(here, capsys):
    write(here / "a.jsonl", [{**row, "prompt": "Search: "} for row in ROWS])
    sources = "data.sources=[{path: a.jsonl, language: en}]"
    train(parse("p", "d", [*SMALL, sources, "data.store_dir=stores", "train.steps=1", "train.run_dir=run",
                           "train.engine=torch", "eval.task=none"]))  # fmt: skip
    assert "all sources have query prompt 'Search: ' and passage prompt 'Passage: '" in capsys.readouterr().out
    recorded = json.loads((here / "run/model/config_sentence_transformers.json").read_text())["prompts"]
    assert recorded == {"query": "Search: ", "passage": "Passage: ", "document": "Passage: "}
    assert '`{"query": "Search: "' in (here / "run/model/README.md").read_text()
