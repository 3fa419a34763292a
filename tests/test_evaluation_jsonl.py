"""Claims about own data as JSON Lines: pairs, judgements, n-way rows; what is wrong in them is named by line."""

from __future__ import annotations

import json
import re
import zipfile

import pytest
from test_evaluation_layouts import put, relevant

from hbt_fast.data.rows import DataError
from hbt_fast.data.sources import Source, read_source
from hbt_fast.evaluation.jsonl import jsonl


def test_own_jsonl_of_pairs(tmp_path):
    put(tmp_path / "own.jsonl.gz", [
        {"query": "a?", "passage": "A", "language": "en"},
        {"query": "b?", "passage": "A", "language": "en"},
        {"query": "c?", "passage": "A", "language": "de"},
    ])  # fmt: skip
    task = jsonl(tmp_path / "own.jsonl.gz")
    assert relevant(task) == {
        ("own.jsonl.gz:1", "en"): {"A": 1}, ("own.jsonl.gz:2", "en"): {"A": 1}, ("own.jsonl.gz:3", "de"): {"A": 1},
    }  # fmt: skip
    assert task.candidates == ["A", "A"]
    assert jsonl(tmp_path / "own.jsonl.gz", ["de"]).queries == ["c?"]
    put(tmp_path / "plain.jsonl", [{"query": "a?", "passage": "A"}])
    assert jsonl(tmp_path / "plain.jsonl").languages == ["und"]


def test_queries_without_an_id_are_told_apart_by_file_and_line(tmp_path):
    lines = [{"query": f"q{i}", "passage": f"p{i}", "language": "en"} for i in range(4)]
    put(tmp_path / "own" / "a.jsonl", [lines[0], {**lines[1], "id": 1}])
    put(tmp_path / "own" / "b.jsonl", [{**lines[2], "language": "de"}])
    put(tmp_path / "own" / "more" / "a.jsonl", [lines[3]])
    assert jsonl(tmp_path / "own").query_ids == ["a.jsonl:1", "1", "b.jsonl:1", "more/a.jsonl:1"]
    assert jsonl(tmp_path / "own" / "*.jsonl").query_ids == ["a.jsonl:1", "1", "b.jsonl:1"]


def test_own_jsonl_with_judgements(tmp_path):
    folder = tmp_path / "own"
    put(folder / "passages.jsonl", [
        {"passage": "P1", "id": "p1", "language": "en"}, {"passage": "P2", "id": 2, "language": "de"},
        {"passage": "P3", "id": "p3", "language": "en"},
    ])  # fmt: skip
    put(folder / "questions.jsonl", [
        {"query": "a?", "id": "q", "language": "en", "relevant": {"2": 3, "p1": 1, "p3": 0}},
        {"query": "b?", "id": "q", "language": "de", "relevant": [2, "p1"]},
        {"query": "c?", "id": "r", "language": "de", "relevant": []},
    ])  # fmt: skip
    task = jsonl(folder)
    assert relevant(task) == {("q", "en"): {"P1": 1, "P2": 3}, ("q", "de"): {"P1": 1, "P2": 1}}
    assert (task.left_out, task.candidates) == (1, ["P1", "P2", "P3"])
    assert jsonl(folder, ["en"]).candidates == ["P1", "P3"]


def test_n_way_training_data_are_a_task(tmp_path):
    put(tmp_path / "n.jsonl", [{"query": {"en": "a", "de": "b"}, "passage": {"en": "A", "de": "B", "fr": "C"}}])
    task = jsonl(tmp_path / "n.jsonl", ["en", "de"])
    assert relevant(task) == {("0", "en"): {"A": 1, "B": 1}, ("0", "de"): {"A": 1, "B": 1}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"passage": "P", "id": "p"}, {"query": "q", "relevant": ["x"]}], r":2: no passage has the id 'x'"),
        ([{"passage": "P", "id": "p"}, {"passage": "Q", "id": "p"}], r':2: a passage needs an "id" of its own'),
        ([{"passage": "P"}], r':1: a passage needs an "id" of its own, not None'),
        ([{"passage": "P", "id": "p"}, {"query": "q"}], r':2: a query needs "relevant"'),
        ([{"passage": "P", "id": "p"}, {"query": "q", "relevant": {"p": "high"}}], r':2: a query needs "relevant"'),
        ([{"passage": "P", "id": "p"}, {"query": "q", "relevant": "p"}], r':2: a query needs "relevant"'),
        ([{"passage": "P", "id": "p"}, {"question": "q"}], r':2: a line has a "query" or a "passage" or both'),
        ([{"query": "q", "passage": ["P"]}], r':1: a line has a "query"'),
        ([{"query": "q", "passage": "P", "query_language": 1}], r':1: a line has a "query"'),
        ([{"query": "q", "passage": "P"}, {"query": "", "passage": "P", "language": "de"}], r":2: empty text \(de\)"),
        ([{"query": "q", "passage": " \n"}], r":1: empty text \(und\)"),
        ([{"passage": "P", "id": "p"}, {"passage": "", "id": "q"}], r":2: empty text \(und\)"),
        ([{"query": {"de": "q"}, "passage": {"de": ""}}], r"own\.jsonl:1: empty text \(de\)"),
        ([{"query": {"de": "q"}, "passage": {"de": "P"}}, {"query": {"de": "q", "en": " "}, "passage": {"de": "P"}}],
         r"own\.jsonl:2: empty text \(en\)"),
        *(([{"passage": "P", "id": "p"}, {"query": "q", "relevant": {"p": gain}}], re.escape(f":2: {gain} is no gain"))
          for gain in (float("nan"), float("inf"), 1e39, 1e-60)),
        ([{"query": "q", "passage": "P", "id": 1}, {"query": "r", "passage": "P", "id": 1}], ":2: another query"),
        ([{"passage": "P", "id": "p"}], "none of 0 queries has a relevant passage"),
        ([{"query": "q", "relevant": ["p"]}], 'no line has a "passage"'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_own_jsonl_is_named_by_line(tmp_path, lines, message):
    put(tmp_path / "own.jsonl", lines)
    with pytest.raises(DataError, match=message):
        jsonl(tmp_path / "own.jsonl")


def test_a_language_that_is_not_there_is_named(tmp_path):
    put(tmp_path / "plain.jsonl", [{"query": "a?", "passage": "A", "language": code} for code in ("en", "de")])
    put(tmp_path / "n-way.jsonl", [{"query": {"en": "a"}, "passage": {"en": "A", "de": "B"}}])
    for name in ("plain.jsonl", "n-way.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: nothing for languages fr; there are de, en"):
            jsonl(tmp_path / name, ["en", "fr"])
    # German is there, if only to answer in.
    assert jsonl(tmp_path / "n-way.jsonl", ["en", "de"]).candidate_languages == ["en", "de"]


@pytest.mark.parametrize("n_way", [False, True])
def test_languages_are_codes_in_any_spelling(tmp_path, n_way):
    def lines(en, de):
        if n_way:
            return [{"query": {en: "a?", de: "b?"}, "passage": {"en": "A", "de": "B"}}]
        pairs = ((en, "en", "a"), (de, "de", "b"))
        return [{"query": q, "passage": q.upper(), "query_language": a, "passage_language": b} for a, b, q in pairs]

    for name, codes in {"own": ("en", "de"), "other": ("EN", "deu")}.items():
        put(tmp_path / name / "q.jsonl", lines(*codes))
    own, other = (jsonl(tmp_path / name, languages=["de", "ENG"]) for name in ("own", "other"))
    assert (other.query_languages, other.languages) == (own.query_languages, own.languages)
    put(tmp_path / "bad.jsonl", lines("English", "de"))
    with pytest.raises(DataError, match=r"bad.jsonl:1: 'English' is not a language code .*; did you mean 'en'\?"):
        jsonl(tmp_path / "bad.jsonl")
    put(tmp_path / "regions.jsonl", lines("pt-br", "pt_PT"))
    assert jsonl(tmp_path / "regions.jsonl").query_languages == ["pt-BR", "pt-PT"]
    put(tmp_path / "twice.jsonl", [{"query": {"en": "a", "EN": "b"}, "passage": {"en": "A"}}])
    with pytest.raises(DataError, match=r"twice.jsonl:1: two texts of language 'en'; leave one out"):
        jsonl(tmp_path / "twice.jsonl")


def test_queries_and_passages_have_languages_of_their_own_as_in_training(tmp_path):
    lines = [
        {"query": "a?", "passage": "A", "query_language": "en", "passage_language": "de"},
        {"query": "b?", "passage": "B", "query_language": "fr", "language": "sw"},
        {"query": "c?", "passage": "C", "passage_language": "fr", "language": "sw"},
        {"query": "d?", "passage": "A", "language": "de"},
    ]
    put(tmp_path / "own.jsonl", lines)
    task = jsonl(tmp_path / "own.jsonl")
    found = {
        task.queries[i]: (task.query_languages[i], task.candidate_languages[task.relevant[task.offsets[i]]])
        for i in range(4)
    }
    assert found == {"a?": ("en", "de"), "b?": ("fr", "sw"), "c?": ("sw", "fr"), "d?": ("de", "de")}
    assert task.candidates == ["A", "B", "C"]  # the German A is one
    rows = read_source(Source(path=str(tmp_path / "own.jsonl")))
    assert found == {text: (code, *row.passages) for row in rows for code, text in row.queries.items()}


def test_lines_of_passages_alone_have_their_languages_too(tmp_path):
    put(tmp_path / "own.jsonl", [
        {"passage": "P", "id": "p", "passage_language": "de"},
        {"query": "q", "query_language": "en", "relevant": ["p"]},
    ])  # fmt: skip
    task = jsonl(tmp_path / "own.jsonl")
    assert (task.query_languages, task.candidate_languages) == (["en"], ["de"])


def test_gains_at_the_edge_of_what_32_bits_hold_are_held(tmp_path):
    gains = {"p": 1e-37, "q": 3e38, "r": -1, "s": -1e-60}
    put(tmp_path / "own.jsonl", [*({"passage": key, "id": key} for key in gains), {"query": "a", "relevant": gains}])
    found = relevant(jsonl(tmp_path / "own.jsonl"))["own.jsonl:5", "und"]
    assert found == {"p": pytest.approx(1e-37), "q": pytest.approx(3e38)}


def test_a_member_of_an_archive_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "own.zip", "w") as archive:
        archive.writestr("more/own.jsonl", json.dumps({"query": "a?", "passage": "A"}))
    task = jsonl(f"zip://more/own.jsonl::{tmp_path / 'own.zip'}")
    assert (task.name, task.queries, task.query_ids) == ("own.jsonl", ["a?"], ["own.zip:1"])


def test_repeated_queries_are_one_question_with_several_answers(tmp_path):
    pairs = [("What  is it?", "A"), ("who?", "B"), ("what is IT?", "C"), ("what is it?", "D")]
    put(tmp_path / "pairs.jsonl", [{"query": q, "passage": p, "language": "en"} for q, p in pairs])
    task = jsonl(tmp_path / "pairs.jsonl")
    assert relevant(task) == {
        ("pairs.jsonl:1", "en"): {"A": 1, "C": 1, "D": 1}, ("pairs.jsonl:2", "en"): {"B": 1},
    }  # fmt: skip
    put(tmp_path / "n.jsonl", [{"query": {"en": q}, "passage": {"en": p, "de": f"{p} de"}} for q, p in pairs])
    assert relevant(jsonl(tmp_path / "n.jsonl")) == {
        ("0", "en"): dict.fromkeys(("A", "A de", "C", "C de", "D", "D de"), 1), ("1", "en"): {"B": 1, "B de": 1},
    }  # fmt: skip


def test_queries_with_ids_keep_them_and_share_what_is_relevant(tmp_path):
    put(tmp_path / "own.jsonl", [
        {"query": "what?", "id": 1, "passage": "A", "language": "en"},
        {"query": "was?", "id": 1, "passage": "A de", "language": "de"},
        {"query": "What?", "id": 2, "passage": "B", "language": "en"},
        {"query": "what?", "id": 3, "passage": "C", "language": "de"},  # another word in another language
        {"query": "what?", "relevant": {"en\tB": 2}, "language": "en"},
    ])  # fmt: skip
    all_of_it = {"A": 1, "B": 2}
    assert relevant(jsonl(tmp_path / "own.jsonl")) == {
        ("1", "en"): all_of_it, ("1", "de"): {"A de": 1}, ("2", "en"): all_of_it, ("3", "de"): {"C": 1},
        ("own.jsonl:5", "en"): all_of_it,
    }  # fmt: skip
