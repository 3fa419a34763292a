"""BEIR, MIRACL, Mr. TyDi, mMARCO and ir_datasets as training data: judgements above 0 are pairs, others negatives."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
from test_evaluation_layouts import put

from hbt_fast.data.problems import Tally
from hbt_fast.data.rows import DataError
from hbt_fast.data.sources import Source, read_source

CORPUS = [{"_id": f"d{n}", "title": "Title" if n == 1 else "", "text": f"text {n}"} for n in range(6)]
QUERIES = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(4)]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t1\nq1\td3\t0\nq2\td4\t1\nq3\td5\t0\n"


def read(path, languages=None, on_error="raise", **settings):
    return list(read_source(Source(str(path), **settings), languages, on_error))


def plain(rows):
    return [(row.queries, row.passages, row.negatives, row.content) for row in rows]


@pytest.fixture
def scifact(tmp_path):
    folder = tmp_path / "queries of mine" / "scifact"  # what is above the folder says nothing
    put(folder / "corpus.jsonl", CORPUS)
    put(folder / "queries.jsonl", QUERIES)
    put(folder / "qrels" / "train.tsv", QRELS)
    put(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t1\n")
    return folder


@pytest.mark.parametrize("settings", [{}, {"format": "judged"}])
def test_beir(scifact, settings):
    rows = read(scifact, language="en", **settings)
    assert plain(rows) == [
        ({"en": "query 1"}, {"en": "Title text 1"}, {"en": ("text 3",)}, "en:d1"),
        ({"en": "query 1"}, {"en": "text 2"}, {"en": ("text 3",)}, "en:d2"),
        ({"en": "query 2"}, {"en": "text 4"}, {}, "en:d4"),
    ]
    assert rows[2].where == f"{scifact}/qrels/train.tsv:5"
    assert plain(read(scifact, language="en", split="test")) == [({"en": "query 0"}, {"en": "text 0"}, {}, "en:d0")]


def test_what_is_missing_is_said_and_no_other_split_is_taken(scifact):
    with pytest.raises(DataError, match="no language; set the source's language"):
        read(scifact)
    with pytest.raises(DataError, match=r"no qrels of the split dev; there are .*test.tsv"):
        read(scifact, language="en", split="dev")
    put(scifact / "qrels" / "train.tsv", QRELS + "q1\td99\t1\nq9\td1\t1\n")
    with pytest.raises(DataError, match=r"train.tsv:7: there is no document 'd99' among the document ids"):
        read(scifact, language="en")
    tally = Tally()
    rows = list(read_source(Source(str(scifact), language="en"), on_error="skip", tally=tally))
    assert len(rows) == 3
    assert [line.partition(": ")[2][:22] for line in tally.skipped] == [
        "there is no document '",
        "there is no query 'q9'",
    ]
    with pytest.raises(DataError, match="no such folder"):
        read(scifact / "corpus.jsonl", language="en", format="judged")


def test_a_split_of_what_has_none_is_refused_once_the_format_is_found(tmp_path):
    put(tmp_path / "a.tsv", "query\tpassage\na\tb\n")
    with pytest.raises(DataError, match=r"a.tsv.split is set, which format tsv has no use for; leave it out"):
        read(tmp_path / "a.tsv", language="en", split="dev")
    with pytest.raises(DataError, match=r"a.tsv.pair is set, which format tsv has no use for"):
        read(tmp_path / "a.tsv", language="en", pair="next")


def test_languages_are_folders(tmp_path, scifact):
    for code, word in (("sw", "swahili"), ("te", "telugu")):
        put(tmp_path / "mr-tydi" / f"mrtydi-v1.1-{word}" / "topic.train.tsv", f"q1\t{code} query\n")
        put(tmp_path / "mr-tydi" / f"mrtydi-v1.1-{word}" / "qrels.train.txt", "q1 Q0 d1 1\nq1 Q0 d2 0\n")
        docs = [{"id": f"d{n}", "contents": f"{code} text {n}"} for n in (1, 2)]
        put(tmp_path / "mr-tydi" / f"mrtydi-v1.1-{word}" / "collection" / "docs.jsonl.gz", docs)
    rows = plain(read(tmp_path / "mr-tydi"))
    assert rows == [
        ({code: f"{code} query"}, {code: f"{code} text 1"}, {code: (f"{code} text 2",)}, f"{code}:d1")
        for code in ("sw", "te")
    ]
    (tmp_path / "mr-tydi" / "mrtydi-v1.1-telugu" / "qrels.train.txt").write_text("broken")
    assert plain(read(tmp_path / "mr-tydi", ("sw",))) == rows[:1]  # what is not wanted is not read


@pytest.mark.parametrize("judged", ["qrels.train.tsv", "triples.train.ids.small.tsv"])
def test_mmarco_is_parallel(tmp_path, judged):
    for code, word in (("de", "german"), ("fr", "french")):
        docs = "".join(f"{n}\t{code} text {n}\n" for n in range(4))
        put(tmp_path / "collections" / f"{word}_collection.tsv", docs)
        put(tmp_path / "queries" / "train" / f"{word}_queries.train.tsv", f"7\t{code} ask\n8\t{code} other\n")
    put(tmp_path / "qrels.dev.small.tsv", "8\t0\t1\t1\n")
    put(tmp_path / judged, "7\t0\t1\t1\n7\t0\t2\t0\n7\t0\t3\t0\n" if "qrels" in judged else "7\t1\t2\n7 1 3\n7\t1\t2\n")
    (row,) = read(tmp_path)
    assert plain([row]) == [
        (
            {"de": "de ask", "fr": "fr ask"},
            {"de": "de text 1", "fr": "fr text 1"},
            {code: (f"{code} text 2", f"{code} text 3") for code in ("de", "fr")},
            "1",
        )
    ]
    assert read(tmp_path, ("fr",))[0].queries == {"fr": "fr ask"}
    put(tmp_path / judged, "7\t1\n")
    with pytest.raises(DataError, match=rf"{judged}:1: "):
        read(tmp_path)


@dataclass
class Entry:
    query_id: str = ""
    doc_id: str = ""
    relevance: int = 0
    doc_id_a: str = ""
    doc_id_b: str = ""
    text: str = ""

    def default_text(self):
        return self.text


class Fake:
    """What is used of ir_datasets."""

    def __init__(self, pairs=False, language="sw", **have):
        self.pairs, self.language, self.have = pairs, language, have

    def queries_lang(self):
        return self.language

    def __getattr__(self, name):
        if name.startswith("has_"):
            return lambda: self.have.get(name[4:], name != f"has_{'qrels' if self.pairs else 'docpairs'}")
        raise AttributeError(name)

    def queries_iter(self):
        return iter(Entry(query_id=f"q{n}", text=f"query {n}") for n in range(3))

    def qrels_iter(self):
        return iter([Entry("q1", "d1", 1), Entry("q1", "d2", 0), Entry("q2", "d9", 1)])

    def docpairs_iter(self):
        return iter([Entry("q1", doc_id_a="d1", doc_id_b="d2")])

    def docs_store(self):
        return self

    def get_many(self, keys):
        assert keys <= {"d1", "d2", "d9"}
        return {key: Entry(text=f"text {key}") for key in keys if key != "d9"}


@pytest.fixture
def catalogue(monkeypatch):
    module, sets = ModuleType("ir_datasets"), {}
    module.load = sets.__getitem__
    monkeypatch.setitem(sys.modules, "ir_datasets", module)
    return sets


def test_ir_datasets_by_name(catalogue):
    catalogue.update(qrels=Fake(), pairs=Fake(pairs=True), none=Fake(qrels=False), tongue=Fake(language=None))
    expected = [({"sw": "query 1"}, {"sw": "text d1"}, {"sw": ("text d2",)}, "d1")]
    assert plain(read("qrels", on_error="skip", format="ir_datasets")) == expected
    assert plain(read("pairs", format="ir_datasets")) == expected
    with pytest.raises(DataError, match="qrels: query q2, document d9: there is no document 'd9'"):
        read("qrels", format="ir_datasets")
    with pytest.raises(DataError, match="it has no queries, documents, or judgements of them"):
        read("none", format="ir_datasets")
    with pytest.raises(DataError, match="does not say its language"):
        read("tongue", format="ir_datasets")
    with pytest.raises(DataError, match="no data set of this name"):
        read("other", format="ir_datasets")


def test_without_ir_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(DataError, match=r'pip install "hbt-fast\[ir-datasets\]"'):
        read("msmarco-passage/train", format="ir_datasets")
