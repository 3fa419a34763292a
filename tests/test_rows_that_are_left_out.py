"""data.on_error: skip leaves out every kind of bad row; what is left out, and why, is listed and counted."""

import json
import tracemalloc
import zipfile

import numpy as np
import pytest
from test_store_is_what_was_read import configured, pairs  # noqa: F401 - a fixture
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hbt_fast.data import build as building
from hbt_fast.data.build import build_source
from hbt_fast.data.problems import Tally
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.store import ARRAYS, Role, SourceStore
from hbt_fast.mine import _rows
from hbt_fast.prepare import prepare

GOOD = {"query": "Where?", "passage": "Here.", "language": "en"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read(path, on_error="skip", languages=None, **options):
    tally = Tally()
    source = Source(**{"path": path, **options.pop("source", {})})
    return list(read_source(source, languages, on_error, tally=tally, **options)), tally


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({**GOOD, "query": None}, "'query' is null, a text is needed"),
        ({**GOOD, "query": float("nan")}, "'query' is NaN, a text is needed"),
        ({**GOOD, "passage": 2024}, "'passage' is the number 2024, a text is needed; write it in quotes.*\"2024\""),
        ({**GOOD, "query": {"en": "a", "de": 3}}, "'query' of 'de' is the number 3"),
        ({**GOOD, "query": {}}, "'query' has no text in any language"),
        ({**GOOD, "language": ["en"]}, "'language' is a list; a language code is needed"),
        ({**GOOD, "content": [1]}, "'content' is a list; an id is needed"),
        ({**GOOD, "content": float("nan")}, "'content' is NaN; an id is needed"),
        ({**GOOD, "negatives": {"en": 3}}, "'negatives' must be a text, a list of texts, .* it has the number 3"),
        ({**GOOD, "negatives": {"english": ["x"]}}, "'english' is not a language code"),
        ({**GOOD, "query": "cut \ud83d"}, "holds half of a surrogate pair; mend it"),
        ({**GOOD, "query": "\ude00 cut"}, "holds half of a surrogate pair; mend it"),
        ({**GOOD, "content": True}, "'content' is true; an id is needed"),
        ({**GOOD, "content": float("inf")}, "'content' is .*inf.*; an id is needed"),
        ({**GOOD, "passage": "x" * 1001}, "a text of 1,001 characters .* data.longest_text is 1,000"),
        ('{"query": ' + "[" * 9_000, "JSON that is too deeply nested"),
        ('{"query": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        (json.dumps({**GOOD, "query": "y" * 20_000}), "longer than 9,999 bytes .* write a larger data.longest_line"),
        ('{"query": "\0"}', "holds NUL bytes"),
        ('{"query": "a", "query": "b", "passage": "c", "language": "en"}', "the key 'query' is there twice"),
    ],
)
def test_every_kind_of_bad_row_is_named_or_left_out(tmp_path, bad, reason):
    path = write(tmp_path / "a.jsonl", GOOD, bad, GOOD)
    limits = {"longest_line": 9_999, "longest_text": 1_000}
    with pytest.raises(DataError, match=rf"a.jsonl:2: .*{reason}"):
        read(path, "raise", **limits)
    rows, tally = read(path, **limits)
    assert len(rows) == 2 or "negatives" in reason or "english" in reason  # a bad negative alone is left out
    assert len(tally.skipped) == 1
    assert f"{path}:2: " in tally.skipped[0]
    assert tally.read == 3


def test_a_second_text_of_a_language_is_counted(tmp_path):
    texts = {"zh-CN": "a", "zh-TW": "b", "en": "c", "EN": "d"}
    rows, tally = read(write(tmp_path / "a.jsonl", {"query": texts, "passage": {"en": "A"}}), "raise")
    assert rows[0].queries == {"zh": "a", "en": "c"}
    beside = "beside another of their language, as zh-TW beside zh-CN"
    assert tally.plain()["languages"] == {"en": {"read": 1, beside: 1}, "zh": {"read": 1, beside: 1}}
    assert not tally.left_out


def test_a_line_that_is_not_text_is_a_bad_row_and_lines_stay_aligned(tmp_path):
    (tmp_path / "en.txt").write_bytes(b"one\ntwo\nthree\n")
    (tmp_path / "de.txt").write_bytes(b"eins\nf\xfcnf\ndrei\n")
    source = {"path": None, "files": {code: str(tmp_path / f"{code}.txt") for code in ("en", "de")}}
    rows, tally = read(None, source=source)
    assert [row.queries for row in rows] == [{"en": "one", "de": "eins"}, {"en": "three", "de": "drei"}]
    assert (tally.read, tally.left_out) == (3, {"a text without its translation": 1})
    assert tally.skipped[0].startswith(f"{tmp_path / 'de.txt'}:2: not UTF-8 (byte 1 of the line is 0xfc)")
    with pytest.raises(DataError, match=r"de.txt:2: not UTF-8"):
        read(None, "raise", source=source)
    (tmp_path / "a.jsonl").write_bytes("{}".encode("utf-16"))
    with pytest.raises(DataError, match=r"is UTF-16, UTF-8 is needed; convert it: iconv -f utf-16 -t utf-8"):
        read(str(tmp_path / "a.jsonl"))


def test_what_is_left_out_is_counted_by_reason_and_language(tmp_path):
    rows = [{"en": "a", "de": "b", "fr": "c"}, {"en": "a", "fr": "c"}, {"fr": "c", "es": "d"}, {"de": " ", "en": "a"}]
    kept, tally = read(write(tmp_path / "a.jsonl", *rows, "{"), languages=("en", "de"), source={"bitext": True})
    assert [set(row.queries) for row in kept] == [{"en", "de"}]
    left_out = {"a text without its translation": 1, "malformed": 2, "not in data.languages": 1}
    assert tally.plain() == {
        "read": 5,
        "left_out": left_out,
        "languages": {
            "de": {"malformed": 1, "read": 2},
            "en": {"a text without its translation": 1, "malformed": 1, "read": 3},
            "es": {"not in data.languages": 1, "read": 1},
            "fr": {"not in data.languages": 3, "read": 3},
        },
        "layouts": [],
    }


def test_a_long_line_is_refused_in_bounded_memory(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.jsonl", "w", force_zip64=True) as file,
    ):
        file.write(b'{"query": "')
        for _ in range(40):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + json.dumps(GOOD).encode())
    list(read_source(Source(path=write(tmp_path / "b.jsonl", GOOD))))  # imports
    tracemalloc.start()
    rows, tally = read(f"zip://a.jsonl::{tmp_path / 'a.zip'}", longest_line=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(rows), tally.left_out) == (1, {"malformed": 1})
    assert peak < 16 << 20
    unit = "<tu><tuv xml:lang='en'><seg>" + "x" * 3_000_000
    with pytest.raises(DataError, match=r"a translation unit .* longer than 1,048,576 bytes \(data.longest_line\)"):
        read(write(tmp_path / "a.tmx", "<tmx><body>" + unit), longest_line=1 << 20)


def test_a_line_and_a_translation_unit_may_be_as_long_as_the_limit(tmp_path):
    line = write(tmp_path / "a.jsonl", GOOD)
    length = len(json.dumps(GOOD))
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD))  # without a line end
    for path in (line, str(tmp_path / "b.jsonl")):
        assert len(read(path, "raise", longest_line=length)[0]) == 1
        with pytest.raises(DataError, match=f"longer than {length - 2} bytes"):
            read(path, "raise", longest_line=length - 2)  # of an end two bytes may be
    tmx = write(tmp_path / "a.tmx", "<tmx><body>", *[unit("en", "fr", text="x" * 70_000)] * 20, "</body></tmx>")
    assert len(read(tmx, "raise", longest_line=400_000)[0]) == 20  # of more than a million bytes in all


def test_what_is_read_of_tmx_is_forgotten(tmp_path):
    path = write(tmp_path / "a.tmx", "<tmx><body>", *[unit("en", "fr", text="x" * 1000)] * 6000, "</body></tmx>")
    list(zip(range(3), read_source(Source(path=path)), strict=False))  # imports
    tracemalloc.start()
    assert sum(1 for _ in read_source(Source(path=path))) == 6000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def unit(*languages, text="a"):
    return "<tu>" + "".join(f"<tuv xml:lang='{code}'><seg>{code} {text}</seg></tuv>" for code in languages) + "</tu>"


def test_lines_of_white_space_are_empty_rows_and_no_bad_ones(tmp_path):
    files = {
        "en": write(tmp_path / "en.txt", "one", " ", "three"),
        "de": write(tmp_path / "de.txt", "eins", "\t", "drei"),
    }
    rows, tally = read(None, "raise", source={"files": files})
    assert (len(rows), tally.left_out) == (2, {"an empty line": 1})


def test_a_unit_in_one_language_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.tmx", "<tmx><body>", unit("en"), unit("en", "de"), "</body></tmx>")
    with pytest.raises(DataError, match=r"a.tmx: unit 1: fewer than two languages with a text"):
        read(path, "raise")
    assert len(read(path)[0]) == 1


def test_what_a_reader_leaves_out_is_counted_by_short_language(tmp_path):
    tally = Tally()
    tally.leave_out("why", "eng-US", True)
    tally.leave_out("why", "deu", False)
    tally.leave_out("why", "english", True)
    assert tally.plain() == {
        "read": 2,
        "left_out": {"why": 2},
        "languages": {code: {"read": 1, "why": 1} for code in ("de", "en", "english")},
        "layouts": [],
    }
    _, tally = read(write(tmp_path / "a.jsonl", "[]", "{}"))
    assert str(tally).startswith("all 2 rows were malformed, the first: ")
    assert tally.skipped[0] in str(tally)


def test_fields_without_a_text_are_as_if_they_were_not_there(tmp_path):
    bitext = {"en": "a", "de": "b", "fr": "", "it": None}
    assert read(write(tmp_path / "a.jsonl", bitext), "raise", source={"bitext": True})[0][0].queries == {
        "en": "a",
        "de": "b",
    }
    path = write(tmp_path / "b.jsonl", {**GOOD, "language": "", "negatives": ""})
    (row,) = read(path, "raise", source={"language": "de"})[0]
    assert (row.queries, row.negatives) == ({"de": "Where?"}, {})


def bare(words="qp"):
    """A tokenizer that drops all but these letters."""
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(words)}, []))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def rows_with(bad, count=40):
    return [
        Row({"en": "q" * (1 + i % 5)}, {"en": "z" if i in bad else "p" * (1 + i % 7)}, where=f"f:{i}")
        for i in range(count)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_without_a_token_are_left_out_in_processes_too(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(building, "ALONE", 1)
    bad = {3, *range(10, 20), 25, 39}  # one of them fills a chunk
    role, tally, options = Role("", 9), Tally(), {"progress": False, "chunk_rows": 10, "workers": workers}
    made = build_source(tmp_path / "a", "made", rows_with(bad), bare(), role, role, tally=tally, skip=True, **options)
    whole = [row for i, row in enumerate(rows_with(bad)) if i not in bad]
    assert made.rows == len(whole)
    assert made.refused == tuple(sorted(bad))
    assert made.left_out == {"malformed": len(bad)}
    assert made.read_by_language["en"]["malformed"] == len(bad)
    assert (tmp_path / "a" / "skipped.txt").read_text().splitlines()[0] == (
        "f:3: no token is left of the text 'z'; leave it out"
    )
    with pytest.raises(DataError, match=r"f:3: no token is left of the text 'z'"):
        build_source(tmp_path / "b", "made", rows_with(bad), bare(), role, role, **options)
    with pytest.raises(DataError, match=r"source 'made': all 40 rows were malformed, the first: f:0: no token is left"):
        build_source(tmp_path / "c", "made", rows_with(range(40)), bare(), role, role, skip=True, **options)


def test_an_interrupted_build_leaves_out_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "JOURNAL_SECONDS", 0.0)
    bad, role = {3, *range(10, 20), 25, 39}, Role("", 9)

    def make(folder, rows):
        tally = Tally()
        return build_source(folder, "made", rows, bare(), role, role, tally=tally, skip=True, progress=False,
                            chunk_rows=10, workers=0)  # fmt: skip

    def stopping(after):
        yield from rows_with(bad)[:after]
        raise KeyboardInterrupt

    for after in (5, 15, 25, 35):  # chunks that are in: 0, 1, 2 (the second is empty), 3
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "stopped", stopping(after))
    one, other = make(tmp_path / "stopped", rows_with(bad)), make(tmp_path / "whole", rows_with(bad))
    for name in ARRAYS:
        pair = getattr(one, name), getattr(other, name)
        assert np.array_equal(*pair, equal_nan=pair[0].dtype.kind == "f"), name
    assert one.refused == other.refused
    for name in ("source.json", "skipped.txt"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_store_of_settings_says_what_was_left_out(configured, tmp_path, capsys):  # noqa: F811
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "query": "cut \ud83d"}, {**GOOD, "language": "fr"}, GOOD)
    config = configured({"path": path}, on_error="--data.on_error=skip", languages="--data.languages=[en]")
    source = prepare(config)[0].sources[0]
    assert (source.rows, source.read) == (2, 4)
    assert source.left_out == {"malformed": 1, "not in data.languages": 1}
    assert source.read_by_language == {"en": {"malformed": 1, "read": 3}, "fr": {"not in data.languages": 1, "read": 1}}
    assert "a.jsonl:2: the text 'cut" in (source.folder / "skipped.txt").read_text()
    assert SourceStore.open(source.folder).left_out == source.left_out  # not of this reading alone
    path = write(tmp_path / "b.jsonl", *({**GOOD, "query": None} for _ in range(3)))
    with pytest.raises(DataError, match=r"all 3 rows were malformed, the first: .*b.jsonl:1: 'query' is null"):
        prepare(configured({"path": path}, on_error="--data.on_error=skip"))


def test_rows_that_are_read_again_are_those_of_the_store(configured, tmp_path):  # noqa: F811
    """Mining reads the sources again and looks up each row's texts by its number."""
    path = write(tmp_path / "a.jsonl", *({**GOOD, "query": f"q {i}"} for i in range(6)))
    config = configured({"path": path})
    store, tokenizer = prepare(config)
    role, group = Role("", 9), config.data.sources
    rows = list(read_source(group[0]))
    rows[2] = Row({"en": "\ud83d"}, rows[2].passages, where="f:3")  # what only the tokenising process may find
    made = build_source(tmp_path / "s", store.sources[0].name, rows, tokenizer, role, role, skip=True, progress=False)
    assert made.refused == (2,)
    from hbt_fast.data.mining import gather
    from hbt_fast.data.store import Store

    found = list(_rows(config, made, 0, gather(Store((made,), (None,)))))
    assert [row.queries["en"] for row, _ in found] == ["q 0", "q 1", "q 3", "q 4", "q 5"]


def test_a_changed_description_of_a_store_is_refused(configured, tmp_path):  # noqa: F811
    source = prepare(configured({"path": pairs(tmp_path / "a.jsonl", *range(3))}))[0].sources[0]
    text = (source.folder / "source.json").read_text()
    (source.folder / "source.json").write_text(text.replace('"contents": 3', '"contents": 7'))
    assert text != (source.folder / "source.json").read_text()
    with pytest.raises(DataError, match=r"source.json: its checksum is not that of what was written"):
        SourceStore.open(source.folder)
