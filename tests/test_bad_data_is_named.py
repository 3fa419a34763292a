"""Malformed data: an error that names file and line and says what to write, or, on request, counted and listed."""

import gzip
import json

import pytest

from hbt_fast.data.languages import normalise
from hbt_fast.data.rows import DataError
from hbt_fast.data.sources import Source, input_files, read_source

GOOD = {"query": "Where?", "passage": "Here.", "language": "en"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read(source, **options):
    return list(read_source(source, **options))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"a.jsonl:2: not JSON"),
        ("[1, 2]", r"a.jsonl:2: a JSON object is needed, this is a list"),
        (
            {"question": "Where?", "passage": "Here.", "language": "en"},
            r"a.jsonl:2: no text 'query'; the fields are 'question'.*fields",
        ),
        ({"query": "Where?", "passage": "Here."}, r"a.jsonl:2: no language: set the source's language"),
        ({**GOOD, "passage": "  "}, r"a.jsonl:2: empty text \(en\)"),
        ({**GOOD, "language": "english"}, r"a.jsonl:2: 'english' is not a language code.*did you mean 'en'"),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_listed(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", GOOD, bad, GOOD)
    with pytest.raises(DataError, match=message):
        read(Source(path=path))
    skipped = []
    assert len(read(Source(path=path), on_error="skip", skipped=skipped)) == 2
    assert len(skipped) == 1
    assert f"{path}:2" in skipped[0]


def test_an_empty_file_is_an_error(tmp_path):
    for name in ("a.jsonl", "a.json", "a.tsv", "a.txt.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
        source = Source(files={"en": str(path)}) if "txt" in name else Source(path=str(path), language="en")
        with pytest.raises(DataError, match="empty file"):
            read(source)


def test_a_wrong_encoding_is_named_with_line_and_byte(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("query\tpassage\nfür\twas\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.tsv:2: not UTF-8 \(byte 1 of the line is 0xfc\).*iconv"):
        read(Source(path=str(path), language="de"))


def test_marks_and_line_ends_are_no_part_of_a_text(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfquery\tpassage\tlanguage\r\nWhere?\tHere.\ten\r\n")
    (row,) = read(Source(path=str(tmp_path / "a.tsv")))
    assert (row.queries, row.passages) == ({"en": "Where?"}, {"en": "Here."})
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"data": []}')
    assert read(Source(path=str(tmp_path / "a.json"), language="en")) == []
    (tmp_path / "b.json").write_bytes(b'{"data":\n [\n"f\xfcr"]}')
    with pytest.raises(DataError, match=r"b.json:3: not UTF-8 \(byte 14 is 0xfc\)"):
        read(Source(path=str(tmp_path / "b.json"), language="en"))


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.tsv:1: two columns are called 'query'"):
        read(Source(path=write(tmp_path / "a.tsv", "query\tpassage\tquery", "a\tb\tc"), language="en"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"context": None}, "paragraph 0: needs a text 'context' and a list 'qas'; it has context, qas"),
        ({"qas": {}}, "paragraph 0: needs a text 'context' and a list 'qas'"),
        ({"qas": [3]}, "paragraph 0: its 'qas' must be objects"),
        *(
            ({"sentence_breaks": breaks}, r"paragraph 0: its 'sentence_breaks' must be a list of \[begin, end\]")
            for breaks in ("ab", {"a": 1}, [3], [[0, 1, 2]], ["ab"], [[0, "1"]], [[0, None]], 3)
        ),
    ],
)
def test_a_paragraph_that_is_none_of_squad_is_named(tmp_path, changed, message):
    paragraph = {"context": "A. B.", "qas": [{"id": "1", "question": "q?", "answers": [{"answer_start": 0}]}]}
    path = write(tmp_path / "a.json", {"data": [{"title": "t", "paragraphs": [paragraph | changed]}]})
    with pytest.raises(DataError, match=rf"a.json: article t, {message}"):
        read(Source(path=path, language="en"))


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"trian.jsonl: no such file; in that folder there are train.jsonl"):
        read(Source(path=str(tmp_path / "trian.jsonl")))


def test_an_unknown_ending_asks_for_the_format(tmp_path):
    (tmp_path / "a.dat").write_text("x")
    with pytest.raises(DataError, match="set the source's format to squad, jsonl"):
        read(Source(path=str(tmp_path / "a.dat")))


def test_files_of_different_length_do_not_align(tmp_path):
    files = {"en": write(tmp_path / "en.txt", "a", "b"), "de": write(tmp_path / "de.txt", "x")}
    with pytest.raises(DataError, match=r"de.txt: has 1 lines, others have more"):
        read(Source(files=files))


def test_a_table_needs_named_columns(tmp_path):
    with pytest.raises(DataError, match=r"a.tsv:1: the first line must name the columns.*'query' and 'passage'"):
        read(Source(path=write(tmp_path / "a.tsv", "x\ty", "z\tw"), language="en"))
    with pytest.raises(DataError, match=r"b.tsv:3: 1 columns, the first line has 2"):
        read(Source(path=write(tmp_path / "b.tsv", "query\tpassage", "z\tw", "z"), language="en"))


def test_a_document_that_is_not_squad_is_named(tmp_path):
    with pytest.raises(DataError, match="not SQuAD JSON"):
        read(Source(path=write(tmp_path / "a.json", {"rows": []}), language="en"))
    with pytest.raises(DataError, match="set the source's language"):
        read(Source(path=write(tmp_path / "a.json", {"data": []})))


def test_broken_xml_is_named_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"a.tmx:3: not well-formed XML"):
        read(Source(path=write(tmp_path / "a.tmx", "<tmx><body>", "<tu>", "</body></tmx>")))


def test_an_entity_bomb_is_refused(tmp_path):
    bomb = '<!DOCTYPE t [<!ENTITY a "xxxx"><!ENTITY b "&a;&a;">]><tmx><tu><tuv><seg>&b;</seg></tuv></tu></tmx>'
    with pytest.raises(DataError, match="declares XML entities"):
        read(Source(path=write(tmp_path / "a.tmx", bomb)))


def test_articles_negatives_and_documents_of_a_wrong_kind_are_named(tmp_path):
    with pytest.raises(DataError, match="article 0: not an object"):
        read(Source(path=write(tmp_path / "a.json", {"data": [3]}), language="en"))
    with pytest.raises(DataError, match=r"b.jsonl:1: 'negatives' must be a text, a list of texts.*it has null"):
        read(Source(path=write(tmp_path / "b.jsonl", {**GOOD, "negatives": ["x", None]})))
    with pytest.raises(DataError, match=r"c.jsonl:1: 'negatives' must be a text"):
        read(Source(path=write(tmp_path / "c.jsonl", {**GOOD, "negatives": 3})))
    files = {"en": write(tmp_path / "en.txt", "a", "b"), "de": write(tmp_path / "de.txt", "x", "y")}
    with pytest.raises(DataError, match=r"docs: has 1 lines"):
        read(Source(files=files, documents=write(tmp_path / "docs", "d")))


def test_codes_of_all_kinds_become_one():
    found = [normalise(c) for c in ("en", "eng-US", "en_GB", "arb", "zho-CN", "zh-TW", "ckb-Arab", "nob", "swa")]
    assert found == ["en", "en", "en", "ar", "zh", "zh", "ckb", "nb", "sw"]
    for code in ("english", "", "xx", "e"):
        with pytest.raises(DataError, match="is not a language code"):
            normalise(code)


def test_a_source_names_the_files_that_it_is_made_of(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    other = write(tmp_path / "other.json", "{}")
    found = input_files(Source(path=str(tmp_path / "*.jsonl"), exclude_paragraphs_of=[path, other]))
    assert [str(p) for p in found] == [path, other]
