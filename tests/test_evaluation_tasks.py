"""Claims about evaluation tasks: XQuAD-R has the published counts, rows become tasks, bad data is named."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest

from hbt_fast.data.rows import DataError, Row
from hbt_fast.evaluation.lareqa import mlqa_r, xquad_r
from hbt_fast.evaluation.tasks import RetrievalTask, task_from_rows


def paragraph(language: str, ids: tuple[str, ...] = ("q1", "q2")) -> dict:
    """Three sentences; question q1 is answered in the second, q2 in the third."""
    sentences = [f"{language} one.", f"{language} two.", f"{language} three."]
    context, breaks = " ".join(sentences), []
    for sentence in sentences:
        start = context.index(sentence)
        breaks.append([start, start + len(sentence)])
    qas = [
        {
            "id": name,
            "question": f"{language} {name}?",
            "answers": [{"answer_start": breaks[i + 1][0] + 3, "text": "t"}],
        }
        for i, name in enumerate(("q1", "q2"))
        if name in ids
    ]
    return {"context": context, "qas": qas, "sentences": sentences, "sentence_breaks": breaks}


def write(folder, **paragraphs):
    for language, content in paragraphs.items():
        data = {"data": [{"title": "t", "paragraphs": [content]}], "version": "1"}
        (folder / f"{language}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def relevant_texts(task: RetrievalTask, query: int) -> list[str]:
    return [task.candidates[c] for c in task.relevant[task.offsets[query] : task.offsets[query + 1]]]


def test_xquad_r_has_the_published_counts(shared_data):
    if not (shared_data / "xquad-r").is_dir():
        pytest.skip(f"no XQuAD-R in {shared_data}")
    task = xquad_r(shared_data / "xquad-r")
    assert (len(task.queries), len(task.candidates), len(task.languages)) == (13_090, 13_014, 11)
    assert (np.diff(task.offsets) == 11).all()
    # The answers of a question are one per language, and parallel questions share them.
    language = np.array(task.candidate_languages)[task.relevant].reshape(-1, 11)
    assert (np.sort(language, axis=1) == np.array(task.languages)).all()
    answers = set(zip(task.query_ids, map(tuple, task.relevant.reshape(-1, 11).tolist()), strict=True))
    assert len(answers) == len(set(task.query_ids)) == 1_190
    first = task.queries.index("How many points did the Panthers defense surrender?")
    assert any("just 308 points" in text for text in relevant_texts(task, first))


def test_answer_sentence_is_where_the_answer_starts(tmp_path):
    task = xquad_r(write(tmp_path, en=paragraph("en"), de=paragraph("de")))
    assert task.queries == ["de q1?", "de q2?", "en q1?", "en q2?"]
    assert [relevant_texts(task, i) for i in range(4)] == [["de two.", "en two."], ["de three.", "en three."]] * 2


def test_context_follows_the_sentence_and_languages_restrict(tmp_path):
    write(tmp_path, en=paragraph("en"), de=paragraph("de"), fr=paragraph("fr"))
    task = xquad_r(tmp_path, context=True, languages=["fr", "en"])
    assert task.languages == ["en", "fr"]
    assert task.candidates[1] == "en two.\nen one. en two. en three."


def test_a_missing_translation_is_an_error_for_xquad_r_and_a_hole_for_mlqa_r(tmp_path):
    write(tmp_path, en=paragraph("en"), de=paragraph("de", ids=("q1",)))
    with pytest.raises(DataError, match=r"de\.json: question id 'q2' is missing"):
        xquad_r(tmp_path)
    task = mlqa_r(tmp_path)
    assert [relevant_texts(task, i) for i in range(3)] == [["de two.", "en two."]] * 2 + [["en three."]]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    file = write(tmp_path, en=paragraph("en")) / "en.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert xquad_r(tmp_path).queries == ["en q1?", "en q2?"]


def test_rows_become_a_task_with_parallel_answers():
    rows = [
        Row({"en": "q a", "de": "f a"}, {"en": "p", "de": "t"}, content="x"),
        Row({"en": "q b"}, {"en": "p", "de": "t"}, content="x"),  # a second question on the same passage
        Row({"en": "q c"}, {"en": "p"}, content="y"),  # equal text, other content: a candidate of its own
        Row({"fr": "q d"}, {"fr": "r"}),
    ]
    task = task_from_rows("rows", rows)
    assert list(zip(task.candidate_languages, task.candidates, strict=True)) == [
        ("en", "p"), ("de", "t"), ("en", "p"), ("fr", "r"),
    ]  # fmt: skip
    assert [task.relevant[a:b].tolist() for a, b in zip(task.offsets, task.offsets[1:], strict=False)] == [
        [0, 1], [0, 1], [0, 1], [2], [3],
    ]  # fmt: skip
    assert task.query_ids == ["0", "0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p.pop("sentences"), r'en\.json: article 0, paragraph 0: no "sentences"'),
        (lambda p: p["sentence_breaks"].pop(), r"3 sentences but 2 sentence_breaks"),
        (lambda p: p["qas"][0]["answers"].clear(), r"question 'q1' has no answer"),
        (lambda p: p["qas"][0]["answers"][0].update(answer_start=999), r"starts at 999, which is in no sentence"),
        (lambda p: p["qas"].append(copy.deepcopy(p["qas"][0])), r"question id 'q1' occurs twice"),
        (lambda p: p["qas"].clear(), r"no questions in it"),
        (lambda p: p["qas"][1].pop("id"), r'paragraph 0, question 1: no "id" that is text; LAReQA files are'),
        (lambda p: p["qas"][0].pop("question"), r"question 'q1': no \"question\" that is text"),
        (lambda p: p["qas"].append("q3"), r"question 2: an object is needed, this is the text"),
        (lambda p: p["qas"][0].pop("answers"), r"question 'q1': no \"answers\" that is a list"),
        (
            lambda p: p["qas"][0]["answers"][0].pop("answer_start"),
            r"'q1', answer 0: no \"answer_start\" that is a number",
        ),
        (lambda p: p["qas"][0].update(answers=["t"]), r"question 'q1', answer 0: an object is needed"),
        (lambda p: p.update(context=None), r'paragraph 0: no "context" that is text'),
        (lambda p: p.update(qas={}), r'paragraph 0: no "qas" that is a list'),
        (lambda p: p.update(sentences="one"), r'paragraph 0: no "sentences" that is a list of texts'),
        (lambda p: p["sentences"].__setitem__(1, None), r"paragraph 0, sentence 1: a text and its \[begin, end\]"),
        (lambda p: p["sentence_breaks"].__setitem__(2, [1]), r"paragraph 0, sentence 2: a text and its \[begin, end\]"),
        (lambda p: p["sentence_breaks"].__setitem__(2, ["1", 2]), r"paragraph 0, sentence 2: a text and its"),
        (lambda p: p["sentences"].__setitem__(1, "cut \ud83d"), r"paragraph 0: .* holds half of a surrogate pair"),
        (lambda p: p["qas"][0].update(question="\ude00"), r"paragraph 0: .* holds half of a surrogate pair"),
        (lambda p: p["qas"][1].update({"\ud83d": 1}), r"paragraph 0: .* holds half of a surrogate pair"),
    ],
)
def test_bad_files_are_named(tmp_path, break_it, message):
    content = paragraph("en")
    break_it(content)
    with pytest.raises(DataError, match=message):
        xquad_r(write(tmp_path, en=content))


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ([], r"en\.json: an object is needed, this is a list"),
        ({"data": {}}, r'en\.json: no "data" that is a list'),
        ({"data": [{"paragraphs": []}, "t"]}, r"en\.json: article 1: an object is needed, this is the text"),
        ({"data": [{"paragraphs": {}}]}, r'en\.json: article 0: no "paragraphs" that is a list'),
        ({"data": [{"paragraphs": [[]]}]}, r"en\.json: article 0, paragraph 0: an object is needed, this is a list"),
    ],
)
def test_what_is_no_article_or_paragraph_is_named(tmp_path, top, message):
    (tmp_path / "en.json").write_text(json.dumps(top), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        xquad_r(tmp_path)


def test_bad_folders_and_rows_are_named(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        xquad_r(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no \.json file"):
        xquad_r(tmp_path)
    (tmp_path / "en.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"en\.json:1: not JSON"):
        xquad_r(tmp_path)
    with pytest.raises(DataError, match=r"no file for languages \['xx'\]; there are en"):
        xquad_r(tmp_path, languages=["en", "xx"])
    with pytest.raises(DataError, match="no row has a query"):
        task_from_rows("empty", [])
    with pytest.raises(DataError, match=r"made\.jsonl:7: no passage"):
        task_from_rows("bad", [Row({"en": "q"}, {}, where="made.jsonl:7")])
    with pytest.raises(DataError, match=r"made\.jsonl:7: empty text \(de\)"):
        task_from_rows("bad", [Row({"en": "q", "de": " "}, {"en": "p"}, where="made.jsonl:7")])
    with pytest.raises(DataError, match=r"row 1: empty text \(en\)"):
        task_from_rows("bad", [Row({"en": "q"}, {"en": "p"}), Row({"en": "q"}, {"en": ""})])


@pytest.mark.parametrize(
    ("offsets", "relevant", "message"),
    [
        ([0, 0, 1], [0], "query 'a' has no relevant candidate"),
        ([0, 1, 2], [0, 2], r"must lie in 0 \.\. 1"),
        ([0, 1, 3], [0, 1, 1], "query 'b' repeat"),
        ([0, 1, 2], [0, 1, 1], r"len\(relevant\) = 3"),
    ],
)
def test_inconsistent_tasks_are_refused(offsets, relevant, message):
    with pytest.raises(DataError, match=message):
        RetrievalTask("t", ["x", "y"], ["en"] * 2, ["a", "b"], ["p", "q"], ["en"] * 2,
                      np.array(offsets), np.array(relevant))  # fmt: skip


def test_relevant_lists_may_start_lower_than_the_one_before():
    RetrievalTask(
        "t", ["x", "y"], ["en"] * 2, ["a", "b"], ["p", "q"], ["en"] * 2, np.array([0, 1, 2]), np.array([1, 0])
    )


def parallel(graded: bool = False, pooled: bool = False) -> RetrievalTask:
    """30 questions in two languages, each with an answer in both; candidates 60 .. 99 answer nothing."""
    candidates = [f"c{i}" for i in range(100)]
    languages = ["de", "en"] * 50
    relevant = np.array([[2 * q, 2 * q + 1] for q in range(30) for _ in range(2)])
    offsets = np.arange(61) * 2
    gains = np.arange(1, 121, dtype=np.float32) if graded else None
    pools = (np.arange(61) * 3, (np.arange(180) * 7) % 100) if pooled else None
    return RetrievalTask(
        "made", [f"q{q} {code}" for q in range(30) for code in ("de", "en")], ["de", "en"] * 30,
        [str(q) for q in range(30) for _ in range(2)], candidates, languages, offsets, relevant.ravel(), gains=gains,
        candidate_ids=candidates, groups={"both": ["de", "en"]}, pools=pools,
    )  # fmt: skip


def test_a_subset_keeps_parallel_questions_their_answers_and_the_rest_at_random():
    whole = parallel(graded=True)
    small = whole.subset(10, seed=3, candidates=40)
    assert len(small.queries) == 20
    assert len(set(small.query_ids)) == 10
    assert sorted(small.query_languages) == ["de"] * 10 + ["en"] * 10
    assert len(small.candidates) == 40
    place = {text: i for i, text in enumerate(whole.queries)}
    for i, query in enumerate(small.queries):
        j = place[query]
        assert relevant_texts(small, i) == relevant_texts(whole, j)
        assert small.gains[small.offsets[i] : small.offsets[i + 1]].tolist() == [2 * j + 1, 2 * j + 2]
    assert small.candidates == sorted(small.candidates, key=lambda text: int(text[1:]))  # order decides ties
    assert small.candidate_ids == small.candidates
    assert [whole.candidate_languages[int(text[1:])] for text in small.candidates] == small.candidate_languages
    assert small.groups == {"both": ["de", "en"]}
    assert small.name == "made, 10 of 30 questions"


def test_a_subset_is_a_function_of_its_seed():
    whole = parallel()
    again, same, other = (whole.subset(5, seed, 30) for seed in (1, 1, 2))
    assert (again.queries, again.candidates) == (same.queries, same.candidates)
    assert again.queries != other.queries
    # In every process: a draw from ids in the order of a set would differ from one to the next.
    ids = sorted(set(whole.query_ids))
    assert set(again.query_ids) == {ids[i] for i in np.random.default_rng(1).permutation(30)[:5]}
    assert whole.subset(5, 1).candidates == whole.candidates
    assert whole.subset(1000, 1, 1000).queries == whole.queries
    assert len(whole.subset(5, 1, candidates=0).candidates) == 10  # what is relevant stays
    with pytest.raises(DataError, match="at least 1 is needed"):
        whole.subset(0, 1)


def test_a_subset_keeps_pools():
    whole = parallel(pooled=True)
    small = whole.subset(4, 0, candidates=0)

    def pools(task):
        starts, members = task.pools
        return {
            query: [task.candidates[c] for c in members[starts[i] : starts[i + 1]]]
            for i, query in enumerate(task.queries)
        }

    assert pools(small) == {query: pool for query, pool in pools(whole).items() if query in small.queries}
    # What is in no pool is never ranked, so nobody should wait for its vector.
    assert whole.subset(4, 0).candidates == whole.subset(4, 0, candidates=90).candidates == small.candidates


def test_a_subset_keeps_what_is_ignored():
    whole = parallel()
    whole = replace(whole, ignored=np.where(np.arange(60) % 3, 99 - np.arange(60) // 2, -1))

    def ignored(task):
        return [None if c < 0 else task.candidates[c] for c in task.ignored]

    place = {text: i for i, text in enumerate(whole.queries)}
    for candidates in (None, 40, 0):
        small = whole.subset(10, 3, candidates)
        expected = [ignored(whole)[place[query]] for query in small.queries]
        assert ignored(small) == [text if text in small.candidates else None for text in expected]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"gains": np.array([1.0, 0.0], np.float32)}, "gains must be above 0"),
        ({"gains": np.ones(3, np.float32)}, "one for each of the 2 relevant"),
        ({"candidate_ids": ["a"]}, "2 candidates but 1 candidate ids"),
        ({"groups": {"low": ["sw"]}}, r"group 'low': no query is in sw; the languages of the queries are en"),
        ({"groups": {"low": []}}, r"group 'low': no query is in no language"),
        ({"ignored": np.array([-1])}, r"2 queries but ignored of shape \(1,\)"),
        ({"ignored": np.array([-1, 2])}, r"ignored candidates must lie in 0 \.\. 1, or be -1"),
        ({"ignored": np.array([-1, 1])}, r"query 'b' is to ignore a candidate that is relevant to it"),
        ({"pools": (np.array([0, 1]), np.array([0]))}, "offsets must run from 0 to 1 in 3 steps"),
        ({"pools": (np.array([0, 1, 2]), np.array([0, 2]))}, r"candidates of pools must lie in 0 \.\. 1"),
    ],
)
def test_inconsistent_additions_are_refused(more, message):
    with pytest.raises(DataError, match=message):
        RetrievalTask("t", ["x", "y"], ["en"] * 2, ["a", "b"], ["p", "q"], ["en"] * 2,
                      np.array([0, 1, 2]), np.array([0, 1]), **more)  # fmt: skip
