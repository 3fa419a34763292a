"""Before its first step a run says what it learns from: rows, languages, prompts, tokenizer, examples, pairs."""

import json

import numpy as np
import pytest
from conftest import build_store

from hbt_fast import plan
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import Row
from hbt_fast.data.shares import BatchConfig
from hbt_fast.data.store import Role
from hbt_fast.encoder.prompts import Prompt, Prompts
from hbt_fast.overview import in_words, overview
from hbt_fast.train import main

SMALL = [
    "data.store_dir=stores", "batch.size=8", "model.scratch={vocabulary: 300, hidden: 32, layers: 1, heads: 2}",
    "train.steps=1", "train.engine=torch", "train.micro_batch_tokens=256", "train.run_dir=run", "batch.strategy=mono",
    "data.languages=[en, de]", "data.on_error=skip",
    "data.sources=[{path: pairs.jsonl, name: own}]",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with 60 pairs, of which 40 are in the wanted languages, one is malformed and 10 have hard negatives."""
    rows = [
        {
            "query": f"q{n} {code}",
            "passage": f"p{n} {code}",
            "language": code,
            **({"negatives": ["x"]} if n < 5 else {}),
        }
        for n in range(20)
        for code in ("en", "de", "fr")
    ]
    rows[3]["query"] = "word " * 100
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, "{not json"]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = (
    "query prompt 'Query: ' (of an encoder from nothing)",
    "passage prompt 'Passage: ' (of an encoder from nothing)",
    "BPE, ",
    "own: 40 of 61 rows; left out: 1 row malformed; 20 rows not in data.languages (fr 20); 0.2 hard negatives a row",
    "queries/passages: de 20/20, en 20/20",
    "of the first 1,000 of each: unknown tokens: none; at the length limit: en 1/0",
    "a query as the model sees it (en): <s> Query: q0 en</s>",
    "a passage as the model sees it (en): <s> Passage: p0 en</s>",
)


def test_the_log_the_plan_the_page_and_a_file_say_it_before_training(here, capsys):
    plan.main(SMALL)
    planned = capsys.readouterr().out
    main(SMALL)
    logged = capsys.readouterr().out
    page = (here / "run" / "report.html").read_text(encoding="utf-8")
    for words in WORDS:
        assert words in planned
        assert logged.index(words) < logged.index("step 1/1")
        assert words.replace("'", "&#x27;").replace("<s>", "&lt;s&gt;").replace("</s>", "&lt;/s&gt;") in page
    written = json.loads((here / "run" / "overview.json").read_text(encoding="utf-8"))
    assert written == json.loads((here / "run-plan.json").read_text(encoding="utf-8"))
    (source,) = written["sources"]
    assert (source["read"], source["kept"], source["hard negatives"]) == (61, 40, 10)
    assert sum(written["language pairs"]["share"].values()) == pytest.approx(1, abs=1e-4)


def test_settings_that_nothing_comes_of_are_said(here, capsys):
    main([*SMALL, "batch.hard_negatives=4", "batch.alpha=0.9"])
    said = capsys.readouterr().out
    assert "not used: batch.alpha is 0.9, which batch.strategy mono does not use" in said
    assert "batch.hard_negatives is" not in said
    lines = (here / "pairs.jsonl").read_text().splitlines()
    (here / "pairs.jsonl").write_text("\n".join(line for line in lines if "negatives" not in line))
    plan.main([*SMALL, "batch.hard_negatives=4", "batch.strategy=hybrid", "batch.alpha=1"])
    said = capsys.readouterr().out
    assert "not used: batch.hard_negatives is 4, and the data has none" in said
    assert "batch.alpha is" not in said


def test_many_languages_stay_a_few_lines(here):
    main(SMALL)
    found = json.loads((here / "run" / "overview.json").read_text(encoding="utf-8"))
    found["sources"][0]["languages"] = {f"x{n}": {"queries": 1, "passages": 1} for n in range(100)}
    found["examples"]["query"]["text"] = "word " * 1000
    words = in_words(found)
    assert "and 88 more (the JSON has all)" in words
    assert len(words) < 2000


def test_every_figure_is_of_its_side_language_and_step(tokenizer, tmp_path, monkeypatch):
    """Russian questions, of which the tokenizer does not know a letter, and English answers: two questions each."""
    rows = [
        Row({"ru": f"ж {i} {j}"}, {"en": "red " * (30 if i < 3 else 1) + str(i)}, {"en": ("no",) * (i < 5)}, f"c{i}")
        for i in range(12)
        for j in range(2)
    ]
    roles = Role("", 24), Role("", 24)
    store = build_store(tmp_path, [("s", None, rows)], tokenizer, *roles)
    planner = BatchPlanner(store, BatchConfig(size=8, strategy="cross"), steps=200)
    planned, plan_one = [], planner.plan
    monkeypatch.setattr(planner, "plan", lambda step: planned.append(step) or plan_one(step))
    prompts = Prompts(Prompt("query", "", "nowhere", "E5 was trained otherwise"), Prompt("passage", "", "nowhere"))
    found = overview(prompts, store, tokenizer, planner)
    (source,) = found["sources"]
    assert (source["read"], source["kept"], source["contents"], source["hard negatives"]) == (24, 24, 12, 10)
    ru, en = (source["languages"][code].pop("first") for code in ("ru", "en"))
    assert source["languages"] == {"en": {"queries": 0, "passages": 24}, "ru": {"queries": 24, "passages": 0}}
    assert [(one["queries"], one["passages"]) for one in (ru, en)] == [(24, 0), (0, 12)]
    assert [(one["cut queries"], one["cut passages"]) for one in (ru, en)] == [(0, 0), (0, 3)]
    assert 0.05 < ru["unknown tokens"] < 1
    assert en["unknown tokens"] == 0
    assert found["language pairs"] == {"steps": 40, "share": {"ru-en": 1.0}}
    assert planned == np.linspace(0, 199, 40).astype(int).tolist()
    assert found["tokenizer"]["size"] == len(tokenizer)
    source["languages"]["ru"]["first"] = {**ru, "unknown tokens": 0.001}
    source["read"] = 99
    words = in_words(found)
    assert "query prompt '' (nowhere; E5 was trained otherwise)\npassage prompt '' (nowhere)\n" in words
    assert "unknown tokens: ru 0.1%; at the length limit: none" in words
    assert "0.4 hard negatives a row\n  queries/passages: en 0/24, ru 24/0\n" in words
    assert "language pairs, query-passage, of 40 steps: ru-en 100.0%" in words
    planner = BatchPlanner(store, BatchConfig(size=8, strategy="cross"), steps=2)
    assert overview(prompts, store, tokenizer, planner)["language pairs"]["steps"] == 2
