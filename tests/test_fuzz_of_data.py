"""Whatever is in a file, reading it ends in what it holds or in an error that the user can mend: no traceback."""

import gzip
import io
import json
import lzma
import math
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from hbt_fast.base.errors import UserError
from hbt_fast.data.build import _plain
from hbt_fast.data.lexicon import Lexicon
from hbt_fast.data.problems import Tally
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.tokenise import ChunkEncoder
from hbt_fast.evaluation.beir import beir
from hbt_fast.evaluation.bitext_data import load_bitext
from hbt_fast.evaluation.compared import read_runs
from hbt_fast.evaluation.jsonl import jsonl
from hbt_fast.evaluation.lareqa import mlqa_r
from hbt_fast.evaluation.load import parse_groups
from hbt_fast.evaluation.queries import PerQuery

MANY_MORE = int(os.environ.get("HBT_FUZZ", "0"))  # so many examples, other ones each time
fuzz = settings(max_examples=MANY_MORE or 100, derandomize=not MANY_MORE, deadline=None, database=None)
letters = st.sampled_from(["a", "Was?", "\ud83d", "é", "e\u0301", "\0", "\u2028", "\ufeff", "\r", "\t", '"', " ", ""])
words = st.lists(letters, max_size=4).map("".join) | st.text(st.characters(), max_size=8)
codes = st.sampled_from(["en", "de", "zh-CN", "zh-TW", "", "english", "x-1", "e\0", "en" * 99]) | words
numbers = st.sampled_from([0, -1, 2024, 10**400, True, 0.5, math.nan, math.inf, -0.0]) | st.integers()
NAMES = ["query", "passage", "negatives", "content", "language", "query_language", "id", "en", "de", "question"]
NAMES += ["context", "answers", "text", "answer_start", "relevant", "lang", "title", "_id", "answer_occurrences"]
values = st.recursive(
    st.none() | numbers | words | codes,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | codes, inner, max_size=3),
    max_leaves=6,
)
ODD = [
    "[" * 100_000,
    '{"query":' * 50_000,
    '{"query": ' + "9" * 5000 + "}",
    '{"id": 1e9999, "text": -0}',
    "{",
    "",
    "\ufeff{}",
]


def changed(whole):
    """Values like a whole one, of which a part, at any depth, is another."""

    @st.composite
    def draw(draw):
        return _changed(draw, whole)

    return draw()


def _changed(draw, whole):
    if not isinstance(whole, dict | list) or not whole or draw(st.integers(0, 3)) == 0:
        return draw(values)
    places = list(whole) if isinstance(whole, dict) else list(range(len(whole)))
    place = draw(st.sampled_from(places))
    copy = whole.copy()
    if draw(st.integers(0, 4)) == 0:
        del copy[place]
    else:
        copy[place] = _changed(draw, whole[place])
    return copy


def spoilt(*wholes):
    """Bytes of files whose lines are records like these, some changed, some no JSON, some no text."""
    good = [json.dumps(whole) for whole in wholes]
    odd = st.sampled_from(ODD) | words
    line = st.sampled_from(good) | st.one_of(*map(changed, wholes)).map(json.dumps) | odd
    text = st.lists(line, max_size=5).map("\n".join)
    encoded = text.map(lambda text: text.encode("utf-8", "surrogatepass")) | text.map(
        lambda text: text.encode("utf-16", "surrogatepass")
    )
    return encoded | st.tuples(encoded, st.binary(max_size=6), st.integers(0, 60)).map(
        lambda parts: parts[0][: parts[2]] + parts[1] + parts[0][parts[2] :]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).to_str()
encode = ChunkEncoder(core, {"split_special_tokens": False, "truncation_side": "right"}, [("", 8)] * 2, skip=True)


def read(**source):
    """Read a source as the user's settings would, both ways; what is kept can be tokenised, and is counted."""
    for languages in (None, ("en", "de")):
        for on_error in ("raise", "skip"):
            tally = Tally()
            try:
                rows = list(read_source(Source(**source), languages, on_error, tally=tally, longest_text=99))
            except UserError:
                continue
            assert tally.read == len(rows) + tally.left_out.total()
            for row in rows:
                sides = row.queries, row.passages
                assert all(t == t.strip() != "" and t.encode() for side in sides for t in side.values())
                assert all(type(code) is str for side in sides for code in side)
            if rows:
                made = encode([_plain(row) for row in rows])
                assert len(made.get("field_counts", ())) + len(made["refused"]) == len(rows)


PAIR = {"query": "Was?", "passage": "Das.", "negatives": {"de": ["Dies."]}, "content": "c", "language": "de"}
MANY = {"query": {"en": "a", "de": "b"}, "passage": {"en": "c"}, "negatives": ["d"], "id": 3}
ASKED = {"question": "a", "context": "b a. C.", "answers": {"text": ["a"], "answer_start": [2]}, "language": "en"}
LISTS = {"query": "Was?", "pos": ["Das.", {"title": "A", "text": "b", "id": 3}], "neg": ["c"], "pos_scores": [1, 2],
         "neg_scores": [0.5]}  # fmt: skip
CHAT = {"messages": [{"role": "user", "content": "Was?"}], "positive_messages": [[{"role": "user", "content": "Das."}]]}
QUESTION = {"id": "1", "question": "a", "answers": [{"text": "a", "answer_start": 2}], "answer_occurrences": 1}
PARAGRAPH = {"context": "b a. C.", "sentence_breaks": [[0, 4], [5, 7]], "qas": [QUESTION]}
SQUAD = {"data": [{"title": "t", "paragraphs": [PARAGRAPH]}]}
LAREQA = {"data": [{"paragraphs": [{**PARAGRAPH, "sentences": ["b a.", "C."]}]}]}


@fuzz
@given(spoilt(PAIR, MANY, ASKED, LISTS, CHAT))
def test_json_lines(folder, raw):
    path = folder / "a.jsonl"
    path.write_bytes(raw)
    array = folder / "array.json"
    array.write_bytes(b"[" + raw.replace(b"\n", b",") + b"]")
    read(path=str(array), language="en")
    read(path=str(path))
    read(path=str(path), language="en", bitext=True)
    read(files={"en": str(path), "de": str(path)}, format="jsonl")


@fuzz
@given(spoilt(SQUAD) | changed(SQUAD).map(lambda value: json.dumps(value).encode()))
def test_squad(folder, raw):
    path = folder / "a.json"
    path.write_bytes(raw)
    read(path=str(path), language="en")
    read(files={"en": str(path), "de": str(path)}, passage="paragraph", exclude_paragraphs_of=[str(path)])


cells = st.lists(words, max_size=3).map("\t".join)


@fuzz
@given(st.sampled_from(["query\tpassage", "en\tde", "query\tpassage\tlanguage", ""]), st.lists(cells, max_size=5))
def test_tables_and_lines(folder, header, rows):
    path, other = folder / "a.tsv", folder / "b.txt"
    path.write_bytes("\n".join([header, *rows]).encode("utf-8", "surrogatepass"))
    other.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    for bitext in (False, True):
        read(path=str(path), language="en", bitext=bitext)
    for pair in ("translation", "next"):
        read(files={"en": str(other), "de": str(other)}, pair=pair)
        read(files={"en": str(other), "de": str(path)}, pair=pair, documents=str(other))
    for name in ("en_de.tsv", "en-de.txt"):
        (folder / name).write_bytes(path.read_bytes())
        for on_error in ("raise", "skip"):
            ends_well(lambda name=name, on_error=on_error: Lexicon.read([folder / name], on_error=on_error))


TMX = ['<?xml version="1.0" encoding="utf-8"?>', "<tmx><body>", "<tu tuid='1'>", '<tuv xml:lang="en">', "<seg>a</seg>",
       "</tuv>", '<tuv xml:lang="de">', "<seg>b<ph>c</ph></seg>", "</tuv>", "</tu>", "</body></tmx>"]  # fmt: skip
OTHERS = ['<?xml version="1.0" encoding="latin-9"?>', '<?xml version="1.0" encoding="utf-16"?>', "<seg/>", "&lt;", "",
          '<?xml version="1.0" encoding="x"?>', '<!DOCTYPE t [<!ENTITY a "b">]>', "&a;", "<tu>", "<a>" * 5000, "&#0;",
          "\ud83d", '<tuv lang="xx y">', "<![CDATA[", "<seg>" + "a" * 100 + "</seg>", "\0"]  # fmt: skip


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(TMX)), st.sampled_from(OTHERS) | words), max_size=3), st.booleans())
def test_tmx(folder, changes, insert):
    parts = list(TMX)
    for place, part in changes:
        parts[place : place + (not insert)] = [part]
    (folder / "a.tmx").write_bytes("".join(parts).encode("utf-8", "surrogatepass"))
    read(path=str(folder / "a.tmx"))


def packed(name):
    good = (json.dumps(PAIR) + "\n").encode() * 300
    if name.endswith(".zip"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", good)
        return file.getvalue()
    return {"gz": gzip.compress, "xz": lzma.compress}[name[-2:]](good)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.zip"])
@fuzz
@given(data=st.data())
def test_broken_archives(folder, name, data):
    raw = bytearray(packed(name))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    read(path=f"zip://a.jsonl::{folder / name}" if name == "a.zip" else str(folder / name), format="jsonl")


def ends_well(load, *arguments):
    try:
        return load(*arguments)
    except UserError:
        return None


@fuzz
@given(spoilt(LAREQA) | changed(LAREQA).map(lambda value: json.dumps(value).encode()))
def test_lareqa(folder, raw):
    (folder / "lareqa").mkdir(exist_ok=True)
    (folder / "lareqa" / "en.json").write_bytes(raw)
    if task := ends_well(mlqa_r, folder / "lareqa"):
        assert all(text.encode() is not None for text in (*task.queries, *task.candidates))


@fuzz
@given(
    spoilt({"query": "a", "passage": "b", "language": "en"}, {"passage": "c", "id": "p", "language": "de"},
           {"query": "d", "id": 1, "relevant": {"p": 2}}, {"query": "e", "id": "x", "relevant": ["p"]}, MANY)
)  # fmt: skip
def test_own_questions(folder, raw):
    (folder / "own.jsonl").write_bytes(raw)
    if task := ends_well(jsonl, folder / "own.jsonl"):
        assert all(text.encode() for text in (*task.queries, *task.candidates, *task.languages))


JUDGED = ["q\td\t1", "q 0 d 1", "q d x", "q d nan", "q d 1e999", "q d 1_0", "query-id\tcorpus-id\tscore"]
lines = st.lists(st.sampled_from(JUDGED) | cells | words, max_size=4)
texts = spoilt({"_id": "d", "text": "a", "title": "t"}, {"_id": "q", "text": "b"})


@fuzz
@given(texts, texts, lines, st.sampled_from(["jsonl", "tsv"]))
def test_beir(folder, corpus, queries, judgements, kind):
    here = folder / f"beir-{kind}"
    here.mkdir(exist_ok=True)
    (here / f"corpus.{kind}").write_bytes(corpus)
    (here / f"queries.{kind}").write_bytes(queries)
    (here / "qrels.tsv").write_bytes("\n".join(judgements).encode("utf-8", "surrogatepass"))
    ends_well(beir, here)
    (here / "run.txt").write_bytes(queries)
    ends_well(beir, here, None, None, None, True)


@fuzz
@given(st.lists(words, max_size=3), st.binary(max_size=9))
def test_translations_by_line(folder, first, second):
    (folder / "lines").mkdir(exist_ok=True)
    (folder / "lines" / "en.txt").write_bytes("\n".join(first).encode("utf-8", "surrogatepass"))
    (folder / "lines" / "de.txt").write_bytes(second)
    ends_well(load_bitext, folder / "lines")


RESULTS = {
    "task": "t", "model": "m", "languages": ["de", "en"], "queries": 4, "candidates": 9, "mo": 0.5, "cr": 0.25,
    "mul": 0.5, "rank_distance": 3.0, "matrix": [[0.5, 0.25], [0.25, 0.5]], "mul_by_language": [0.5, 0.5],
    "rank_distance_by_language": [3.0, None], "cutoffs": {"own": {"ndcg@10": 0.5}}, "bias": {"accuracy@1": 0.5},
    "prompts": {"query": ""}, "settings": {"max_length": 8}, "by_language": {"mo": [0.5, 0.5]}, "left_out": 0,
    "groups": {"low": {"mo": 0.5}}, "group_languages": {"low": ["de"]}, "notes": ["n"],
}  # fmt: skip
BITEXT = {
    "task": "t", "model": "m", "sources": ["de", "en"], "targets": ["en", "de"], "sentences": [2, 2],
    "measures": {"accuracy": [0.5, 1.0]}, "means": {"all directions": {"accuracy": 0.75}}, "groups": {"g": ["de"]},
}  # fmt: skip


@fuzz
@given(st.one_of(*map(changed, (RESULTS, BITEXT))).map(json.dumps) | st.sampled_from(ODD))
def test_result_files(folder, text):
    (folder / "whole.json").write_text(json.dumps(BITEXT if '"sources"' in text else RESULTS))
    (folder / "result.json").write_text(text)
    for run in ends_well(read_runs, [f"a={folder / 'whole.json'}", f"b={folder / 'result.json'}"]) or ():
        assert all(len(found) == 1 + len(run.languages) for found in run.figures.values())


@fuzz
@given(st.data())
def test_values_of_queries(folder, data):
    path = PerQuery("t", ["1", "2"], ["de", "en"], {"mo": np.array([0.5, 1.0])}).write(folder / "a.queries.npz")
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    else:  # whole archives of other arrays
        array = st.sampled_from([np.array("t"), np.array(["a", "b"]), np.zeros(2), np.zeros((2, 2)), np.array([], str)])
        names = st.sampled_from(["task", "ids", "languages", "mo", "x"])
        np.savez_compressed(path, **data.draw(st.dictionaries(names, array, max_size=5)))
    found = ends_well(PerQuery.read, path)
    assert found is None or (isinstance(found.task, str) and len(found.ids) == len(found.languages))


@fuzz
@given(words | st.sampled_from(["low=sw;high=en,de", "a=b;a=c", "[" * 9999, "{low: [sw]}", "&a [*a]", "? [a]\n: b"]))
def test_groups(folder, text):
    (folder / "groups.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    ends_well(parse_groups, text)
    ends_well(parse_groups, str(folder / "groups.yaml"))
