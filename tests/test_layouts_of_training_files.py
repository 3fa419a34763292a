"""Files of training data as the trainers of the field write them: each layout in each container gives the same rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from hbt_fast.data.problems import Tally
from hbt_fast.data.rows import DataError
from hbt_fast.data.sources import Source, read_source

DOCUMENT = {"docid": "d1", "title": "Gold", "text": "A metal."}
OTHER = {"docid": "d2", "title": "", "text": "A fruit."}


def chat(text):
    return [{"role": "user", "content": text}]


LAYOUTS = {  # name: a record, (passage, content, score) of its rows, (hard negative, score)
    "pairs": (
        {"query": "what?", "passage": "A metal.", "negatives": ["No."], "scores": 0.5, "negative_scores": [0.25]},
        [("A metal.", None, 0.5)],
        [("No.", 0.25)],
    ),
    "flagembedding": (
        {"query": "what?", "pos": ["A metal.", "An element."], "neg": ["No.", "A fruit."], "pos_scores": [1, 0.5],
         "neg_scores": [0.25, 0.125]},
        [("A metal.", None, 1.0), ("An element.", None, 0.5)],
        [("No.", 0.25), ("A fruit.", 0.125)],
    ),
    "tevatron": (
        {"query_id": "1", "query": "what?", "positive_passages": [DOCUMENT], "negative_passages": [OTHER]},
        [("Gold A metal.", "en:d1", None)],
        [("A fruit.", None)],
    ),
    "dpr": (
        {"question": "what?", "answers": ["gold"], "positive_ctxs": [{"title": "Gold", "text": "A metal.",
         "passage_id": "p1"}, {"title": "Au", "text": "An element."}], "negative_ctxs": [{"title": "", "text": "Far."}],
         "hard_negative_ctxs": [{"title": "Fig", "text": "A fruit."}]},
        [("Gold A metal.", "en:p1", None), ("Au An element.", None, None)],
        [("Fig A fruit.", None), ("Far.", None)],
    ),
    "messages": (
        {"messages": chat("what?"), "positive_messages": [chat("A metal."), chat("An element.")],
         "negative_messages": [chat("No.")]},
        [("A metal.", None, None), ("An element.", None, None)],
        [("No.", None)],
    ),
    "anchors": (
        {"anchor": "what?", "positive": "A metal.", "negative_2": "Two.", "negative_10": "Ten.", "note": "x"},
        [("A metal.", None, None)],
        [("Two.", None), ("Ten.", None)],
    ),
    "anchors ": (  # with what a teacher says of the positive and the negatives
        {"anchor": "what?", "positive": "A metal.", "negative": "No.", "score": [0.5, 0.25]},
        [("A metal.", None, 0.5)],
        [("No.", 0.25)],
    ),
    "triplets": (
        {"query": "what?", "positive": "A metal.", "negative": "No."},
        [("A metal.", None, None)],
        [("No.", None)],
    ),
}  # fmt: skip
FLAT = ("anchors", "triplets")  # of which a cell is a text


def cells(record, separator):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([record.keys(), record.values()])
    return text.getvalue().encode()


def arrow(record, opener):
    sink = io.BytesIO()
    table = pa.Table.from_pylist([record])
    with opener(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(record):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), sink)
    return sink.getvalue()


CONTAINERS = {
    "a.jsonl": lambda record: json.dumps(record).encode(),
    "a.ndjson": lambda record: b"\xef\xbb\xbf" + json.dumps(record).encode() + b"\r\n\r\n",
    "a.json": lambda record: json.dumps([record], indent=1).encode(),
    "a.csv": lambda record: cells(record, ","),
    "a.tsv": lambda record: cells(record, "\t"),
    "a.parquet": parquet,
    "a.arrow": lambda record: arrow(record, pa.ipc.new_file),
    "b.arrow": lambda record: arrow(record, pa.ipc.new_stream),
}


def zipped(raw):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("whatever", raw)
    return sink.getvalue()


COMPRESSIONS = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zip": zipped,
    ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


def read(path, **settings):
    tally = Tally()
    rows = list(read_source(Source(path=str(path), **{"language": "en", **settings}), tally=tally))
    return rows, tally


def check(rows, layout):
    _, positives, negatives = LAYOUTS[layout]
    assert [row.queries for row in rows] == [{"en": "what?"}] * len(positives)
    assert [(row.passages["en"], row.content, row.score) for row in rows] == positives
    for row in rows:
        assert row.negatives == {"en": tuple(text for text, _ in negatives)}
        scores = tuple(score for _, score in negatives if score is not None)
        assert row.negative_scores == ({"en": scores} if scores else {})


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_in_every_container(tmp_path, layout, name):
    if name in ("a.csv", "a.tsv") and layout not in FLAT:
        pytest.skip("a cell holds no list")
    (tmp_path / name).write_bytes(CONTAINERS[name](LAYOUTS[layout][0]))
    rows, tally = read(tmp_path / name)
    check(rows, layout)
    (found,) = tally.layouts
    assert found.name == layout.strip()
    check(read(tmp_path / name, layout=layout.strip())[0], layout)  # by name


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_may_be_compressed_and_in_a_folder(tmp_path, name, ending):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / f"{name}{ending}"
    path.write_bytes(COMPRESSIONS[ending](CONTAINERS[name](LAYOUTS["triplets"][0])))
    (folder / "README.md").write_text("what lies beside the data")
    (folder / ".hidden.jsonl").write_text("no data")
    for place in (path, folder):
        check(read(place)[0], "triplets")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_fields_of_any_names_are_read_by_lists_and_patterns(tmp_path):
    record = {"q": "what?", "p": "A metal.", "n1": "One.", "n2": "Two.", "worse": "Three."}
    path = write(tmp_path / "a.jsonl", record)
    for negatives in (["n1", "n2", "worse"], ["n*", "worse"]):
        rows, _ = read(path, fields={"query": "q", "passage": "p", "negatives": negatives})
        assert rows[0].negatives == {"en": ("One.", "Two.", "Three.")}
    rows, _ = read(path, fields={"query": "q", "passage": ["p", "n1"], "negatives": "worse"})
    assert [row.passages["en"] for row in rows] == ["A metal.", "One."]


def test_a_list_may_be_empty_and_a_field_may_be_null(tmp_path):
    good = {"query": "what?", "pos": ["A metal."]}
    path = write(tmp_path / "a.jsonl", {**good, "neg": []}, {**good, "neg": None, "pos_scores": None}, good)
    rows, _ = read(path)
    assert [row.negatives for row in rows] == [{}, {}, {}]
    assert [row.score for row in rows] == [None] * 3


def test_a_passage_of_a_list_may_be_in_several_languages(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": {"en": "what?", "de": "was?"}, "pos": [{"en": "Gold", "de": "Geld"}]})
    (row,) = read(path)[0]
    assert (row.queries, row.passages) == ({"en": "what?", "de": "was?"}, {"en": "Gold", "de": "Geld"})


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"pos": []}, {}, r"a.jsonl:2: 'pos' is an empty list"),
        ({"pos": ["a", None]}, {}, r"a.jsonl:2: 'pos' is null"),
        ({"pos_scores": {"en": [1]}}, {}, r"a.jsonl:2: 'pos_scores' must be 0 numbers"),
        ({"neg": {"en": ["x"], "de": ["y"]}, "neg_scores": [1, 2]}, {}, r"a.jsonl:2: 'neg_scores' must .* by language"),
        ({"neg_scores": [1e39]}, {}, r"a.jsonl:2: 'neg_scores' must be 1 numbers"),
        ({"pos": ["a", 3]}, {}, r"a.jsonl:2: 'pos' is the number 3, a text is needed"),
        ({"pos": None}, {}, r"a.jsonl:2: 'pos' is null, a text is needed"),
        ({"query": float("nan")}, {}, r"a.jsonl:2: 'query' is NaN, a text is needed"),
        ({"query": 2024}, {}, r"a.jsonl:2: 'query' is the number 2024, a text is needed; write it in quotes"),
        ({"pos_scores": [1, 2]}, {}, r"a.jsonl:2: 'pos_scores' must be 1 numbers, one for each passage"),
        ({"neg_scores": ["x"]}, {}, r"a.jsonl:2: 'neg_scores' must be 1 numbers"),
        ({"neg": [3]}, {}, r"a.jsonl:2: 'neg' must be a text.*it has the number 3"),
        ({"query": chat(None)}, {}, r"a.jsonl:2: 'query' has a message whose content is null"),
        ({"pos": [{"title": 3, "text": "x"}]}, {}, r"a.jsonl:2: 'pos' has a title that is the number 3"),
        ({}, {"fields": {"negatives": "negs"}}, r"negatives is 'negs', which none of its first 2 records has; did you"),
        ({}, {"fields": {"negatives": ["neg", "zzz"]}}, r"negatives is 'zzz', which none .* has; they have query, pos"),
        ({}, {"layout": "dpr"}, r"a.jsonl:1: no text 'question'; the fields are 'query', 'pos', 'neg'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, record, settings, message):
    good = {"query": "what?", "pos": ["A metal."], "neg": ["No."]}
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.jsonl", good, {**good, **record}), **settings)


def test_scores_stay_with_their_passages(tmp_path):
    by_language = {"neg": {"de": ["Nein.", "", "Nie."], "en": ["No."]}, "neg_scores": {"de": [3, 2, 1], "en": 0.5}}
    path = write(tmp_path / "a.jsonl", {"query": "what?", "pos": ["A metal."], **by_language})
    (row,) = read(path)[0]
    assert row.negatives == {"de": ("Nein.", "Nie."), "en": ("No.",)}
    assert row.negative_scores == {"de": (3.0, 1.0), "en": (0.5,)}


@pytest.mark.parametrize("frames", [1, 3])
def test_a_zst_file_is_read_to_the_end_of_its_last_frame(tmp_path, frames):
    lines = [json.dumps(LAYOUTS["triplets"][0]).encode() + b"\n"] * 3 * 3000
    parts = [b"".join(lines[n::frames]) for n in range(frames)]
    raw = b"".join(map(zstandard.ZstdCompressor().compress, parts))
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    assert len(read(tmp_path / "a.jsonl.zst")[0]) == len(lines)
    for broken, why in ((raw[:-3], "breaks off"), (b"not zst", "Unknown frame"), (raw[:40] + bytes(40), "ValueError")):
        (tmp_path / "b.jsonl.zst").write_bytes(broken)
        with pytest.raises(DataError, match=rf"b.jsonl.zst: cannot be read .*{why}"):
            read(tmp_path / "b.jsonl.zst")


def test_what_is_not_read_is_noted(tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "what?", "passage": "A metal.", "negative": "No.", "id": 3, "url": ""})
    (found,) = read(path)[1].layouts
    assert found.plain() == {"layout": "pairs", "read": ["query", "passage", "id"], "not read": ["negative"]}


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_an_element_at_a_time(tmp_path, indent):
    records = [{"query": f"what {n}?", "passage": "\U0001f600\n" * (n % 7) * 1000 + "x"} for n in range(100)]
    for ascii_only in (True, False):
        text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
        (tmp_path / "a.json").write_text(f" \n{text}\n ")
        rows, _ = read(tmp_path / "a.json")
        assert [row.queries["en"] for row in rows] == [record["query"] for record in records]
        assert [row.passages["en"] for row in rows] == [record["passage"] for record in records]
        lines = [2 + text[: text.index(f'"what {n}?"')].count("\n") - (indent or 0) for n in range(100)]
        assert [row.where for row in rows] == [f"{tmp_path / 'a.json'}:{line}" for line in lines]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"query": "a", "passage": "b"},\n {"query": "c"', r"a.json:2: not JSON: Expecting ',' delimiter"),
        ('[{"query": "a", "passage": "b"},\n 3]', r"a.json:2: a JSON object is needed, this is the number 3"),
        ('[{"query": "a", "passage": "b"}\n\n {}]', r"a.json:3: not JSON: after an element of an array, a comma or \]"),
        ('[{"query": "a", "passage": "b"},\n]', r"a.json:2: not JSON: Expecting value"),
        ('[{"query": "a", "passage": "b"}]\n[]', r"a.json:2: not JSON: something follows the array's end"),
        ('[{"query": "a", "query": "b"}]', r"a.json:1: the key 'query' is there twice"),
        ('[{"query": "a", \n"passage": "b}]' + "x" * 200_000, r"a.json:2: not JSON: Unterminated string"),
        ("[" * 100_000, r"a.json:1: JSON that is too deeply nested"),
        ('[\n{"query": ' + "9" * 5000 + "}]", r"a.json:2: JSON with a number of thousands of digits"),
        ('[{"query": "a", "passage": "b\udcff"}]', r"a.json:1: after it comes what is not UTF-8 \(0xff\)"),
    ],
)
def test_a_json_array_that_is_none_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


def test_an_element_that_never_ends_is_refused_in_bounded_memory(tmp_path):
    (tmp_path / "a.json").write_text('[{"query": "' + "x" * 3_000_000)
    with pytest.raises(DataError, match=r"a.json:1: an element longer than 1,000,000 bytes \(data.longest_line\)"):
        list(read_source(Source(path=str(tmp_path / "a.json"), language="en"), longest_line=1_000_000))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_table_that_is_none_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1 nothing of it")
    with pytest.raises(DataError, match=rf"{name}: cannot be read as {name[2:]}"):
        read(tmp_path / name)


def test_cells_of_any_length_and_with_returns_are_read(tmp_path):
    long, path = "word " * 40_000, tmp_path / "a.tsv"
    path.write_text(f"query\tpassage\nwhat is long?\t{long}\nfirst part\rsecond part\tan answer\n", newline="")
    for quoting in ("auto", "quoted", "plain"):
        one, two = read(path, quoting=quoting)[0]
        assert one.passages == {"en": long.strip()}
        assert two.queries["en"].split() == ["first", "part", "second", "part"]


def test_quotes_are_what_the_source_says_and_never_silently_kept(tmp_path):
    written = 'query\tpassage\nwhat?\t"called the ""old"" bridge"\n"two\nlines"\tyes\n'
    (tmp_path / "a.tsv").write_text(written)
    one, two = read(tmp_path / "a.tsv", quoting="quoted")[0]
    assert (one.passages["en"], two.queries["en"]) == ('called the "old" bridge', "two\nlines")
    with pytest.raises(DataError, match=r'a.tsv:2: a cell is all between quotes, "called .*quoting: quoted'):
        read(tmp_path / "a.tsv")
    (tmp_path / "b.tsv").write_text('query\tpassage\nwhat?\tyes\n"two\nlines"\tyes\n')
    with pytest.raises(DataError, match=r"b.tsv:3: 1 columns, the first line has 2; if .*line breaks.*quoting: quoted"):
        read(tmp_path / "b.tsv")
    (tmp_path / "c.tsv").write_text('query\tpassage\n5" disk\t"x" and "y"\n')  # characters, as in MS MARCO's files
    (row,) = read(tmp_path / "c.tsv")[0]
    assert (row.queries["en"], row.passages["en"]) == ('5" disk', '"x" and "y"')
    (tmp_path / "d.tsv").write_text('query\tpassage\nwhat?\t"x"\n')
    assert read(tmp_path / "d.tsv", quoting="plain")[0][0].passages["en"] == '"x"'
    (tmp_path / "e.csv").write_text('query,passage\n"what, then?","a ""b"""\n')
    assert read(tmp_path / "e.csv")[0][0].passages["en"] == 'a "b"'
    (tmp_path / "f.csv").write_text('query,passage\nwhat?,"a" b\n')
    with pytest.raises(DataError, match=r"f.csv:2: not a table with quoted cells"):
        read(tmp_path / "f.csv")


@pytest.mark.parametrize("name", ["train[1].jsonl", "a*.jsonl", "what?.jsonl"])
def test_a_file_that_is_there_is_no_pattern(tmp_path, name):
    write(tmp_path / name, LAYOUTS["pairs"][0])
    write(tmp_path / "train1.jsonl", {"query": "other", "passage": "x"})
    check(read(tmp_path / name)[0], "pairs")


def test_a_table_whose_first_line_is_a_row_says_how_to_name_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("what?,A metal.\nwho?,She.\n")
    with pytest.raises(DataError, match=r"a.csv:1: the first line must name the columns.*columns: \[query, passage\]"):
        read(tmp_path / "a.csv")
    assert len(read(tmp_path / "a.csv", columns=["query", "passage"])[0]) == 2


def test_a_hub_that_is_out_of_reach_is_asked_once(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def refuse(url, **options):
        asked.append((url, options))
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub is asked again"))
    with pytest.raises(DataError, match=r"^some/data: no such file .*out of reach \(Name or .*set HF_HUB_OFFLINE=1"):
        read("some/data", format="hf")
    ((url, options),) = asked
    assert "/datasets/some/data/" in url
    assert options == {"timeout": 5.0}


def test_format_hf_takes_a_file_too(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        (tmp_path / name).write_bytes(CONTAINERS[name](LAYOUTS["triplets"][0]))
        check(read(tmp_path / name, format="hf")[0], "triplets")


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    record = LAYOUTS["flagembedding"][0]
    write(tmp_path / "a.json", record, record)
    assert len(read(tmp_path / "a.json")[0]) == 4
    write(tmp_path / "long.json", {**record, "query": "x" * 200_000}, record)
    assert len(read(tmp_path / "long.json")[0]) == 4
    (tmp_path / "b.json").write_text('{"data":\n []}')
    assert read(tmp_path / "b.json")[0] == []  # SQuAD without a paragraph


def test_files_of_any_name_are_read_by_format_and_globs_by_their_files(tmp_path):
    record = LAYOUTS["triplets"][0]
    for name in ("part-0", "part-1.gz.txt"):
        write(tmp_path / name, record)
    assert len(read(tmp_path / "part-*", format="jsonl")[0]) == 2
    with pytest.raises(
        DataError, match=r"holds no file of format jsonl by its ending, but part-0, part-1.gz.txt; give"
    ):
        read(tmp_path, format="jsonl")
    write(tmp_path / "a.jsonl", record)
    (tmp_path / "b.csv").write_bytes(cells(record, ","))
    assert len(read(tmp_path)[0]) == len(read(tmp_path / "*.*")[0]) == 2
    assert len(read(tmp_path, format="jsonl")[0]) == 1
    (tmp_path / "c.json").write_text('{"data": []}')
    with pytest.raises(DataError, match=r"holds SQuAD JSON \(c.json\) beside files of other kinds \(csv, json"):
        read(tmp_path / "?.*")


def test_columns_beside_the_negatives_are_none(tmp_path):
    record = {"query": "a", "positive": "p", "negative_1": "n", "negative_id": "D17", "negative_source": "bm25"}
    rows, tally = read(write(tmp_path / "a.jsonl", {**record, "negative_scores": [0.5]}))
    assert (rows[0].negatives, rows[0].negative_scores) == ({"en": ("n",)}, {"en": (0.5,)})
    assert tally.layouts[0].plain()["not read"] == ["negative_id", "negative_source"]
    fields = {"query": "query", "passage": "positive", "negatives": ["negative_?", "*e"]}  # of what nothing else is
    write(tmp_path / "a.jsonl", record)
    assert read(tmp_path / "a.jsonl", fields=fields)[0][0].negatives == {"en": ("n", "bm25")}


def test_scores_of_spellings_of_one_language_stay_with_their_texts(tmp_path):
    negatives = {"en-US": ["n1"], "en-GB": ["n2"]}
    record = {"query": {"en": "a"}, "passage": {"en": "x"}, "negatives": negatives, "negative_scores": {"en-GB": [0.5]}}
    ((row,), _) = read(write(tmp_path / "a.jsonl", record))
    assert row.negatives == {"en": ("n1", "n2")}
    assert row.negative_scores["en"] == pytest.approx((float("nan"), 0.5), nan_ok=True)


def test_a_limit_leaves_the_checks_of_fields_on(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"query": f"q{n}", "passage": f"p{n}", "neg": ["n"]} for n in range(9)])
    with pytest.raises(DataError, match="negatives is 'nope', which none of its first 4 records has"):
        read(path, limit=4, fields={"negatives": "nope"})
    assert read(path, limit=4)[1].layouts[0].plain()["not read"] == ["neg"]


def test_a_table_of_questions_and_contexts_is_not_taken_for_squad(tmp_path):
    record = {"question": "a", "context": "c", "positive_ctxs": [{"title": "t", "text": "u"}]}
    for layout in ("auto", "dpr"):
        assert read(write(tmp_path / "a.jsonl", record), layout=layout)[0][0].passages == {"en": "t u"}


def test_the_first_record_that_can_be_read_decides(tmp_path):
    path = write(tmp_path / "a.jsonl", {"note": "x"}, {"query": "a", "pos": ["b"]})
    tally = Tally()
    assert len(list(read_source(Source(str(path), language="en"), on_error="skip", tally=tally))) == 1
    assert tally.layouts[0].name == "flagembedding"


def test_lists_and_numbers_in_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('query,pos,neg,pos_scores\na,"[""x"", ""z""]","[""n""]","[1, 2]"\n')
    one, two = read(tmp_path / "a.csv")[0]
    assert (one.passages, two.passages, two.negatives, two.score) == ({"en": "x"}, {"en": "z"}, {"en": ("n",)}, 2.0)
    (tmp_path / "b.csv").write_text("query,pos,neg\na,\"['x', 'z']\",n\n")
    with pytest.raises(DataError, match=r"b.csv:2: 'pos' is the text .* looks like a list and is no JSON"):
        read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("query,passage,score\na,x,0.5\n")
    assert read(tmp_path / "c.csv")[0][0].score == 0.5


def test_a_translation_that_is_null_is_not_there(tmp_path):
    table = pa.table({"query": [{"en": "a", "de": "b"}, {"en": "c", "de": None}], "passage": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.queries for row in read(tmp_path / "a.parquet")[0]] == [{"en": "a", "de": "b"}, {"en": "c"}]


def test_a_field_that_is_there_and_empty_is_no_mistake(tmp_path):
    rows = [{"query": f"q{n}", "p[0]": f"p{n}", "hard": None} for n in range(1001)]
    path = write(tmp_path / "a.jsonl", *rows, {**rows[0], "hard": "n"})
    assert read(path, fields={"passage": "p[0]", "negatives": "hard"})[0][-1].negatives == {"en": ("n",)}


def test_one_name_is_wanted_where_one_field_is_read(tmp_path):
    with pytest.raises(DataError, match="its fields say that query is q, t; write one name"):
        read(write(tmp_path / "a.jsonl", {"q": "a", "t": "b", "passage": "c"}), fields={"query": ["q", "t"]})


def test_all_members_of_an_archive_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("in")
        for name in ("__MACOSX/._a.jsonl", "in/a.jsonl", "in/b.csv", "in/.c.jsonl"):
            record = LAYOUTS["triplets"][0]
            archive.writestr(name, cells(record, ",") if name.endswith("csv") else json.dumps(record))
    for place in (tmp_path, tmp_path / "*.zip"):
        rows, _ = read(place)
        assert len(rows) == 2
        assert rows[0].where == f"zip://in/a.jsonl::{tmp_path / 'a.zip'}:1"
    assert len(read(f"zip://in/a.jsonl::{tmp_path / '*.zip'}")[0]) == 1
    with zipfile.ZipFile(tmp_path / "one.jsonl.zip", "w") as archive:
        archive.mkdir("in")
        archive.writestr("in/whatever", json.dumps(LAYOUTS["triplets"][0]))
    check(read(tmp_path / "one.jsonl.zip")[0], "triplets")


def test_hidden_folders_and_what_lies_beside_data_sets_are_left_alone(tmp_path):
    for place in ("data", "data/.ipynb_checkpoints"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.parquet").write_bytes(parquet(LAYOUTS["triplets"][0]))
    (tmp_path / "dataset_infos.json").write_text("{}")
    check(read(tmp_path)[0], "triplets")


def test_columns_of_one_name_are_refused_in_parquet_too(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["query", "passage", "passage"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: two columns are called 'passage'"):
        read(tmp_path / "a.parquet")


def test_ids_are_those_of_a_language(tmp_path):
    for code in ("de", "en"):
        record = {"query": "a", "positive_passages": [{"docid": "7", "text": code}], "language": code}
        write(tmp_path / f"{code}.jsonl", record)
    assert [row.content for row in read(tmp_path)[0]] == ["de:7", "en:7"]
