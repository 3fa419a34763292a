"""Claims about the layouts of BEIR, MIRACL, Mr. TyDi and mMARCO; what is wrong in them is named by line."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import numpy as np
import pytest
from test_evaluation_program import WordEncoder

from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.beir import beir
from hbt_fast.evaluation.jsonl import jsonl
from hbt_fast.evaluation.reranking import reranking
from hbt_fast.evaluation.run import evaluate
from hbt_fast.evaluation.tasks import RetrievalTask


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, list):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in text)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def relevant(task: RetrievalTask) -> dict[tuple[str, str], dict[str, float]]:
    """(query id, language) -> text of a relevant candidate -> gain."""
    gains = np.ones(len(task.relevant)) if task.gains is None else task.gains
    return {
        key: {task.candidates[task.relevant[r]]: float(gains[r]) for r in range(task.offsets[i], task.offsets[i + 1])}
        for i, key in enumerate(zip(task.query_ids, task.query_languages, strict=True))
    }


def pools(task: RetrievalTask) -> list[list[str]]:
    offsets, members = task.pools
    return [[task.candidate_ids[c] for c in members[a:b]] for a, b in pairwise(offsets)]


@pytest.fixture
def scifact(tmp_path):
    """BEIR's layout: queries of all splits in one file, judgements with a header, graded."""
    folder = tmp_path / "scifact"
    put(folder / "corpus.jsonl", [
        {"_id": "d1", "title": "Albedo", "text": "is the measure", "metadata": {}},
        {"_id": "d2", "title": "", "text": "no title"},
        {"_id": "d3", "title": "Only title", "text": ""},
    ])  # fmt: skip
    put(folder / "queries.jsonl", [{"_id": q, "text": f"query {q}"} for q in ("1", "2", "3", "4")])
    put(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n1\td3\t1\n1\td1\t2\n2\td2\t1\n3\td2\t0\n")
    put(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\n4\td1\t1\n")
    return folder


def test_beir(scifact):
    task = beir(scifact)
    assert task.name == "scifact (test)"
    assert relevant(task) == {
        ("1", "und"): {"Albedo is the measure": 2, "Only title": 1}, ("2", "und"): {"no title": 1},
    }  # fmt: skip
    assert task.candidate_ids == ["d1", "d2", "d3"]
    assert task.left_out == 2  # one is judged 0, one is of another split
    assert beir(scifact, "train", ["en"]).query_languages == ["en"]
    assert beir(scifact, "train").gains is None


def test_one_judgement_in_a_hundred_may_lack_its_document(tmp_path):
    folder = tmp_path / "arguana"
    put(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": f"text {i}"} for i in range(99)])
    put(folder / "queries.jsonl", [{"_id": f"{i}", "text": f"query {i}"} for i in range(99)])
    judged = "".join(f"{i}\td{i}\t1\n" for i in range(98))
    put(folder / "qrels" / "test.tsv", judged + "97\td0\t1\n98\tgone\t1\n")
    task = beir(folder)
    assert (len(task.queries), len(task.relevant), task.missing, task.left_out) == (98, 99, 1, 1)
    results = evaluate(WordEncoder(), task, log=None)
    assert results.notes == [
        "Judgements of documents that the corpus lacks: 1. They do not count (trec_eval counts them as never found)."
    ]
    put(folder / "qrels" / "test.tsv", judged + "98\tgone\t1\n")
    with pytest.raises(DataError, match=r"test\.tsv:99: there is no document 'gone'"):
        beir(folder)


def test_miracl(tmp_path):
    """The folders of its two repositories side by side; ids repeat between languages and are not parallel."""
    for code, answer in (("sw", "Nairobi"), ("yo", "Abuja")):
        folder = tmp_path / f"miracl-v1.0-{code}"
        for split in ("train", "dev"):
            put(folder / "topics" / f"topics.miracl-v1.0-{code}-{split}.tsv", f"0#0\t{split} {code}?\n")
            put(folder / "qrels" / f"qrels.miracl-v1.0-{code}-{split}.tsv", "0#0\tQ0\t1#0\t1\n0#0\tQ0\t2#0\t0\n")
        corpus = tmp_path / f"miracl-corpus-v1.0-{code}"
        put(corpus / "docs-0.jsonl.gz", [{"docid": "1#0", "title": code, "text": answer}])
        put(corpus / "docs-1.jsonl.gz", [{"docid": "2#0", "title": code, "text": "other"}])
    task = beir(tmp_path, name="miracl")
    assert task.name == "miracl (dev)"
    assert relevant(task) == {("sw:0#0", "sw"): {"sw Nairobi": 1}, ("yo:0#0", "yo"): {"yo Abuja": 1}}
    assert task.queries == ["dev sw?", "dev yo?"]
    assert task.candidate_ids == ["sw:1#0", "sw:2#0", "yo:1#0", "yo:2#0"]  # apart, as the queries'
    assert beir(tmp_path, "train", ["yo"]).queries == ["train yo?"]
    with pytest.raises(DataError, match=r"nothing for languages SWA, de; there are sw, yo; did you mean sw\?"):
        beir(tmp_path, languages=["SWA", "de"])
    with pytest.raises(DataError, match=r"nothing for languages de; there are sw, yo$"):
        beir(tmp_path, languages=["de", "sw"])
    with pytest.raises(DataError, match="no qrels of the split testA; there are qrels"):
        beir(tmp_path, "testA")


@pytest.mark.parametrize("ir_format", [False, True])
def test_mr_tydi(tmp_path, ir_format):
    """The unpacked archive, and the judgements of its hub repository."""
    folder = tmp_path / "mrtydi-v1.1-swahili"
    put(folder / "collection" / "docs.jsonl.gz", [{"id": "1#0", "contents": "Kenya\n\nMji mkuu ni Nairobi."}])
    put(folder / "topic.tsv", "8\tof all splits?\n")
    for split in ("train", "dev", "test"):
        names = ("ir-format-data/topics.{}.txt", "ir-format-data/qrels.{}.txt") if ir_format else (
            "topic.{}.tsv", "qrels.{}.txt")  # fmt: skip
        put(folder / names[0].format(split), f"7\t{split}?\n")
        put(folder / names[1].format(split), "7 0 1#0 1\n" if split != "train" else "7\tQ0\t1#0\t1\n")
    for where in (folder, tmp_path):
        task = beir(where)
        assert (task.queries, task.query_languages, task.query_ids) == (["test?"], ["sw"], ["7"])
        assert beir(where, "train").queries == ["train?"]
        assert task.candidates == ["Kenya\n\nMji mkuu ni Nairobi."]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qrels/test.tsv", "1\td9\t1\n", r"test\.tsv:1: there is no document 'd9'"),
        ("qrels/test.tsv", "1\td1\t1\n9\td1\t1\n", r"test\.tsv:2: there is no query '9'"),
        ("qrels/test.tsv", "1\td1\t1\n1\td1\t2\n", r"test\.tsv:2: query '1' and document 'd1' were judged 1 before"),
        ("qrels/test.tsv", "1\td1\t1\n1\td1\t0\n", r"test\.tsv:2: query '1' and document 'd1' were judged 1 before"),
        ("qrels/test.tsv", "1\td1\t0\n1\td1\t1\n", r"test\.tsv:2: query '1' and document 'd1' were judged 0 before"),
        ("qrels/test.tsv", "1\td1\t0\n2\td1\t-1\n", r"test\.tsv: no judgement above 0"),
        ("qrels/test.tsv", "1\td1\t1\n1 d1\n", r"test\.tsv:2: \"query document gain\" or"),
        ("qrels/test.tsv", "1\td1\t1\n2\td1\tyes\n", r"test\.tsv:2: .* is needed, not '2\\td1\\tyes'"),
        ("qrels/test.tsv", "1\td1\t1\n2\td1\tnan\n", r"test\.tsv:2: "),
        ("qrels/test.tsv", "1\td1\tinf\n2\td1\t1\n", r"test\.tsv:1: .*, the gain a number that 32 bits hold"),
        ("qrels/test.tsv", "1\td1\t1\n2\td1\t1e39\n", r"test\.tsv:2: .*, the gain a number that 32 bits hold"),
        ("qrels/test.tsv", "1\td1\t1\n2\td1\t1e-60\n", r"test\.tsv:2: .*, the gain a number that 32 bits hold"),
        ("qrels/test.tsv", "", r"test\.tsv: empty file"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n', r":2: id 'd1' occurs twice"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d2"', r"corpus\.jsonl:2: not JSON"),
        ("corpus.jsonl", '{"_id": "d1", "body": "a"}\n', r"corpus.*:1: an \"_id\" and a .* _id, body"),
        ("corpus.jsonl", '{"_id": "d1", "text": null}\n', r"corpus\.jsonl:1: an"),
        *(
            ("corpus.jsonl", f'{{"_id": "d1", "text": "a"}}\n{{{cut}}}\n', r"corpus\.jsonl:2: .* half of a surrogate")
            for cut in (
                r'"_id": "d2", "text": "cut \ud83d"',
                r'"_id": "d2", "text": "\ude00 cut"',
                r'"_id": "\ud83d", "text": "a"',
                r'"_id": "d2", "title": "cut \ud83d", "text": "a"',
            )
        ),
        ("corpus.jsonl", "", r"corpus\.jsonl: empty file"),
        ("corpus.jsonl", "\n", r"corpus\.jsonl: nothing in it"),
        ("queries.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n', r":2: id '1' occurs twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_file_and_line(scifact, name, text, message):
    put(scifact / name, text)
    with pytest.raises(DataError, match=message):
        beir(scifact)


def test_missing_files_are_named(tmp_path, scifact):
    with pytest.raises(DataError, match="no such folder"):
        beir(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no corpus, queries and qrels in it"):
        beir(tmp_path / "empty")
    with pytest.raises(DataError, match="one language can be named, not en, de"):
        beir(scifact, languages=["en", "de"])
    with pytest.raises(DataError, match="no run file to re-rank"):
        reranking(scifact)
    (scifact / "queries.jsonl").unlink()
    with pytest.raises(DataError, match="no queries of the split test; there are none"):
        beir(scifact)
    (scifact / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match="no corpus file"):
        beir(scifact)


def test_a_judgement_twice_is_one_and_lines_may_be_empty(scifact):
    put(scifact / "qrels" / "test.tsv", "1\td1\t1\n\n1\td1\t1\n")
    assert relevant(beir(scifact)) == {("1", "und"): {"Albedo is the measure": 1}}


def test_judgements_of_0_and_below_say_the_same(scifact):
    put(scifact / "qrels" / "test.tsv", "1\td1\t1\n1\td2\t0\n1\td2\t-1\n")
    assert relevant(beir(scifact)) == {("1", "und"): {"Albedo is the measure": 1}}


def test_a_folder_that_holds_a_collection_is_it_whatever_its_subfolders_are_called(scifact):
    """ "old" and "dev" are languages too (Mochi and Dom), and a backup is no part of the corpus."""
    for name in ("old", "dev"):
        put(scifact / name / "corpus.jsonl", [{"_id": d, "text": "OLD"} for d in ("d1", "d2", "d3")])
        put(scifact / name / "queries.jsonl", [{"_id": "1", "text": "OLD"}])
        put(scifact / name / "qrels" / "test.tsv", "1\td1\t1\n")
    put(scifact / "old" / "qrels.test.tsv", "1\td1\t1\n")
    put(scifact / "dev" / "qrels.dev.tsv", "1\td1\t1\n")
    task = beir(scifact)
    assert task.candidates == ["Albedo is the measure", "no title", "Only title"]
    assert (task.languages, task.queries) == (["und"], ["query 1", "query 2"])


def test_judgements_beside_the_folders_of_languages_make_no_collection(scifact):
    put(scifact.parent / "qrels.txt", "1\td1\t1\n")
    scifact.rename(scifact.parent / "sw")
    assert beir(scifact.parent).languages == ["sw"]


def test_the_folder_that_one_is_in_has_a_name(scifact, mmarco, monkeypatch):
    put(scifact / "top1000.test.tsv", "1\td1\tquery 1\tAlbedo is the measure\n")
    monkeypatch.chdir(scifact)
    assert (beir(".").name, reranking(".").name) == ("scifact (test)", "scifact (test)")
    monkeypatch.chdir(mmarco)
    assert reranking(".").name == f"{mmarco.name} (dev.small)"
    put(scifact / "own" / "a.jsonl", [{"query": "a?", "passage": "A"}])
    monkeypatch.chdir(scifact / "own")
    assert jsonl(".").name == "own"
    sw = scifact.rename(scifact.parent / "sw")
    monkeypatch.chdir(sw)
    assert beir(".").languages == ["sw"]


def test_a_line_of_names_is_no_text(tmp_path):
    put(tmp_path / "collection.tsv", "docid\ttext\n1\tone\nid\ta document that is called id\n")
    put(tmp_path / "queries.tsv", "id\tquery\n1\tone?\n")
    put(tmp_path / "qrels.tsv", "1\t0\t1\t1\n")
    task = beir(tmp_path)
    assert (task.queries, task.candidates, task.left_out) == (["one?"], ["one", "a document that is called id"], 0)


def test_a_damaged_archive_is_named(scifact):
    (scifact / "corpus.jsonl").unlink()
    whole = bytearray(gzip.compress(b"d1\tone\n"))
    whole[10] = 0xFF  # the first byte after the header: a kind of block that there is not
    (scifact / "corpus.tsv.gz").write_bytes(whole)
    with pytest.raises(DataError, match=r"corpus\.tsv\.gz: cannot be read"):
        beir(scifact)


@pytest.fixture
def arguments(tmp_path):
    """ArguAna's form: queries are documents too, and what answers one is another document."""
    documents = [{"_id": f"t{i}", "title": "topic", "text": f"argument  {i}"} for i in range(20)]
    put(tmp_path / "arguments" / "corpus.jsonl", documents)
    put(tmp_path / "arguments" / "queries.jsonl", [{"_id": d["_id"], "text": d["text"]} for d in documents[::2]])
    put(tmp_path / "arguments" / "qrels" / "test.tsv", "".join(f"t{i}\tt{i + 1}\t1\n" for i in range(0, 20, 2)))
    return tmp_path / "arguments"


class OwnTextFirst:
    """Finds every text itself first, then the one that answers it."""

    def encode(self, texts, prompt="", progress=False):
        number = np.array([int(text.split()[-1]) for text in texts])
        vectors = np.zeros((len(texts), 20), np.float32)
        vectors[np.arange(len(texts)), number] = 0.8
        vectors[np.arange(len(texts)), number ^ 1] = 0.6
        return vectors


def test_the_own_text_of_a_query_does_not_count_against_it(arguments):
    """As in BEIR's tool, for which ArguAna and Quora would be hopeless otherwise."""
    task = beir(arguments)
    assert task.ignored.tolist() == list(range(0, 20, 2))
    results = evaluate(OwnTextFirst(), task, "", "", device="cpu", log=None)
    assert results.cutoffs["own"] == {"ndcg@10": 1, "recall@100": 1, "mrr@10": 1}
    assert (results.mo, results.mul, results.bias["accuracy@1"]) == (1, 1, 1)
    assert evaluate(OwnTextFirst(), task, "", "", top_k=1, device="cpu", log=None).bias["own-language@1"] == 1
    assert results.notes == [
        "10 queries are documents themselves (equal ids and texts). Each is left out of its own ranking, as BEIR's "
        "tool does."
    ]
    approximate = evaluate(OwnTextFirst(), task, "", "", device="cpu", index="ivf", log=None)
    assert approximate.cutoffs["all, by ivf"]["mrr@10"] == 1


def test_the_own_text_of_a_query_is_not_reranked(arguments):
    put(arguments / "run.txt", "".join(f"t{i}\tt{j}\t1\n" for i in range(0, 20, 2) for j in range(20)))
    task = reranking(arguments)
    assert task.ignored is None
    assert pools(task)[0] == [f"t{j}" for j in range(1, 20)]
    assert evaluate(OwnTextFirst(), task, "", "", device="cpu", log=None).cutoffs["re-ranking"]["mrr@10"] == 1


def test_a_document_of_a_query_s_id_stays_if_it_is_another_text_or_relevant(arguments):
    """Queries and documents that are numbered from 1 are not the same."""
    put(arguments / "queries.jsonl", [{"_id": f"t{i}", "text": f"another {i}"} for i in range(0, 20, 2)])
    assert beir(arguments).ignored is None
    put(arguments / "queries.jsonl", [{"_id": f"t{i}", "text": f"argument {i}"} for i in range(0, 20, 2)])
    put(arguments / "qrels" / "test.tsv", "t0\tt0\t1\nt2\tt3\t1\n")
    assert beir(arguments).ignored.tolist() == [-1, 2]


@pytest.fixture
def mmarco(tmp_path):
    """mMARCO: names of languages in file names, one qrels for all, runs in MS MARCO's and in TREC's form."""
    for word in ("german", "english"):
        put(tmp_path / "collections" / f"{word}_collection.tsv", "".join(f"{i}\t{word} {i}\n" for i in range(9)))
        put(tmp_path / "queries" / "dev" / f"{word}_queries.dev.tsv", "".join(f"{i}\t{word} {i}?\n" for i in range(9)))
        put(
            tmp_path / "queries" / "dev" / f"{word}_queries.dev.small.tsv",
            f"1\t{word} 1?\n2\t{word} 2?\n5\t{word} 5?\n",
        )
    put(tmp_path / "runs" / "run.bm25_english-msmarco.txt", "1\t3\t1\n1\t0\t2\n2\t4\t1\n")
    put(tmp_path / "runs" / "run.bm25_german-msmarco.txt", "1 Q0 3 1 9.5 bm25\n1 Q0 1 2 9 bm25\n2 Q0 8 1 9 bm25\n")
    put(tmp_path / "qrels.dev.small.tsv", "1\t0\t3\t1\n2\t0\t7\t1\n5\t0\t6\t1\n")
    return tmp_path


def test_mmarco_pools(mmarco):
    task = reranking(mmarco, "dev.small", name="mmarco")
    assert task.name == "mmarco (dev.small)"
    assert relevant(task) == {
        ("1", "en"): {"english 3": 1}, ("2", "en"): {"english 7": 1},
        ("1", "de"): {"german 3": 1}, ("2", "de"): {"german 7": 1},
    }  # fmt: skip
    assert sorted(map(sorted, pools(task))) == [["de:1", "de:3"], ["de:8"], ["en:0", "en:3"], ["en:4"]]
    # Only what is pooled or relevant is a candidate: 0, 3, 4, 7 and 1, 3, 7, 8. Query 5 was not run.
    assert len(task.candidates) == 8
    assert task.left_out == 2
    assert reranking(mmarco, languages=["de"]).query_languages == ["de", "de"]
    assert reranking(mmarco, "dev").left_out == 14


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("runs/run.bm25_german-msmarco.txt", "1\t3\t1\n1\t99\t2\n", r"msmarco\.txt:2: there is no document '99'"),
        ("runs/run.bm25_german-msmarco.txt", "1\t3\t1\n77\t3\t1\n", r"msmarco\.txt:2: there is no query '77'"),
        ("runs/run.bm25_german-msmarco.txt", "1\t3\t1\n1\t3\t2\n", r"msmarco\.txt:2: document '3' occurs twice for"),
        ("runs/run.bm25_german-msmarco.txt", "1\t3\n", r"msmarco\.txt:1: \"query Q0 document rank score name\""),
        ("qrels.dev.small.tsv", "5\t0\t99\t1\n1\t0\t98\t1\n", r"small\.tsv:2: there is no document '98'"),
        ("collections/german_collection.tsv", "3\tone\n3\tagain\n", r"collection\.tsv:2: id '3' occurs twice"),
        ("collections/german_collection.tsv", "3 no tab\n", r"collection\.tsv:1: an id, a tab and a text are needed"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_pools_is_named_by_line(mmarco, name, text, message):
    put(mmarco / name, text)
    with pytest.raises(DataError, match=message):
        reranking(mmarco)


def test_a_language_without_a_run_is_named(mmarco):
    (mmarco / "runs" / "run.bm25_german-msmarco.txt").unlink()
    with pytest.raises(DataError, match="no run of german"):
        reranking(mmarco)


def test_mmarco_of_any_language(mmarco):
    for path in [path for path in mmarco.rglob("*german*") if path.is_file()]:
        path.rename(path.with_name(path.name.replace("german", "ukrainian")))
    assert reranking(mmarco).languages == ["en", "uk"]


def test_two_collections_of_one_language_are_refused(mmarco):
    put(mmarco / "collections" / "de_collection.tsv", "1\tone\n")
    with pytest.raises(DataError, match="de_collection and german_collection are of one language, de; keep one"):
        reranking(mmarco)


def test_a_split_has_its_whole_name(mmarco):
    task = reranking(mmarco)
    assert (task.name.split()[-1], task.left_out) == ("(dev.small)", 2)
    put(mmarco / "qrels.train.tsv", "1\t0\t3\t1\n")
    assert reranking(mmarco).left_out == 2
    for small in (mmarco / "queries" / "dev").glob("*.small.tsv"):
        small.unlink()
    assert reranking(mmarco).left_out == 14  # those of the whole split hold them too


def test_any_collection_with_a_run_can_be_reranked(scifact):
    put(scifact / "top1000.test.tsv", "1\td1\tquery 1\tAlbedo is the measure\n1\td2\tquery 1\tno title\n")
    task = reranking(scifact)
    assert pools(task) == [["d1", "d2"]]
    assert relevant(task) == {("1", "und"): {"Albedo is the measure": 2, "Only title": 1}}
