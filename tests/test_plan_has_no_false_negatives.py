"""The batch plan: no content twice in a global batch, no pair twice in an epoch, a pure function of (seed, step)."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import synthetic
from conftest import build_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.questions import list_answers
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.shares import BatchConfig
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.store import Role

STRATEGIES = ["mono", "mixed-mono", "cross", "hybrid"]


def planner(store, size=16, seed=0, **settings):
    return BatchPlanner(store, BatchConfig(size, **settings), seed=seed)


def made(folder, tokenizer, *sources):
    return build_store(folder, [(name, None, rows) for name, rows in sources], tokenizer, Role("", 9), Role("", 9))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_content_repeats_in_a_global_batch(store, strategy):
    plans = planner(store, size=60, strategy=strategy)
    for step in range(200):
        contents = plans.plan(step).contents
        assert len(set(contents.tolist())) == len(contents)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_data_the_guarantees_hold(data):
    """Random rows, contents, languages and hard negatives: what a plan promises, read back from the arrays."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, languages = int(rng.integers(1, 60)), ["de", "en", "fr", "sw"][: rng.integers(1, 5)]
    has = rng.random((rows, len(languages))) < rng.uniform(0.4, 1.1)
    has[np.arange(rows), rng.integers(0, len(languages), rows)] = True
    contents = np.unique(rng.integers(0, rows, rows), return_inverse=True)[1] if rng.random() < 0.7 else None
    negatives = [
        [tuple(map(int, rng.integers(0, (len(languages), 40, 2 * rows)))) for _ in range(rng.integers(0, 6))]
        for _ in range(rows)
    ]
    negatives = [[(code, text, text + rows // 2) for code, text, _ in entries] for entries in negatives]
    questions, answers = np.full(rows, -1), []
    if rng.random() < 0.7:  # question -1 has one content; of the others some are answered by contents of no row
        questions = np.unique(rng.integers(-1, rows // 2 + 1, rows), return_inverse=True)[1] - 1
        of_row = np.arange(rows) if contents is None else contents
        more = [rng.integers(0, 2 * rows, rng.choice([0, 2, 30])).tolist() for _ in range(questions.max() + 1)]
        answers = [sorted({*own, *of_row[questions == q].tolist()}) for q, own in enumerate(more)]
        questions[(questions < 0) & np.isin(of_row, list(chain(*answers)))] = -2
    source = synthetic.source(
        rows, languages, has=has, contents=contents, negatives=negatives, questions=questions, answers=answers
    )
    batch = BatchConfig(
        int(rng.integers(1, 9)), strategy=data.draw(st.sampled_from(STRATEGIES)),
        hard_negatives=int(rng.integers(0, 4)), cross_pairs=data.draw(st.sampled_from(["mixed", "one"])),
    )  # fmt: skip
    try:
        plans = BatchPlanner(synthetic.store(source), batch, seed=int(rng.integers(100)))
    except DataError:
        return  # too little data for the batch, which other tests are about
    epochs = {}
    for step in range(60):
        plan, number = plans.plan(step), plans.stratum(step)
        assert len(set(plan.contents.tolist())) == batch.size
        assert plan.contents.tolist() == (plan.rows if contents is None else contents[plan.rows]).tolist()
        assert has[plan.rows, plan.query_languages].all()
        assert has[plan.rows, plan.passage_languages].all()
        every = [*plan.contents.tolist(), *plan.negative_contents.tolist()]
        assert len(set(every)) == len(every)
        right = [set(answers[q]) if q >= 0 else set() for q in questions[plan.rows]]
        groups = [{i} for i in range(len(every))]
        for i, own in enumerate(right):
            for j in (j for j, content in enumerate(every) if content in own):
                both = groups[i] | groups[j]
                for k in both:
                    groups[k] = both
        ids = plan.passage_ids
        assert all(set(np.flatnonzero(ids == ids[i]).tolist()) == group for i, group in enumerate(groups))
        assert [every[min(group)] for group in groups] == ids.tolist()
        for i in range(batch.size):
            own = [n for n in negatives[plan.rows[i]] if n[0] == plan.passage_languages[i]]
            mine = plan.negatives[plan.negative_rows == i].tolist()
            assert len(mine) <= batch.hard_negatives
            assert set(mine) <= {text for _, text, _ in own}
            assert not right[i] & {c for n, c in enumerate(plan.negative_contents) if plan.negative_rows[n] == i}
            if len(mine) < batch.hard_negatives:  # all others would have repeated a content, or answer the query
                assert {content for _, _, content in own} <= {*every, *right[i]}
        per_epoch = plans.strata[number[0]].contents // batch.size
        epochs.setdefault((number[0], number[1] // per_epoch), []).extend(plan.contents.tolist())
    assert all(len(set(seen)) == len(seen) for seen in epochs.values())


def test_equal_passage_texts_are_one_content_across_questions_and_translations(tokenizer, tmp_path):
    rows = [Row({"en": f"q{i}"}, {"en": "The  SAME text"}) for i in range(3)]
    rows += [Row({"en": f"r{i}"}, {"en": "the same TEXT" if i == 0 else f"text {i}"}) for i in range(3)]
    rows += [Row({"fr": "s"}, {"fr": "le même", "en": "the same text"})]
    contents = made(tmp_path / "s", tokenizer, ("a", rows)).sources[0].row_contents.tolist()
    assert len({contents[i] for i in (0, 1, 2, 3, 6)}) == 1
    assert len(set(contents)) == 3


def test_no_answer_of_a_question_is_its_negative(tokenizer, tmp_path):
    rows = [Row({"en": f"Which {i}?"}, {"en": f"first {i}"}, {"en": (f"second {i}", f"no {i}")}) for i in range(8)]
    rows += [Row({"en": f"which  {i}?"}, {"en": f"second {i}"}) for i in range(8)]
    rows += [Row({"en": f"other {i}?"}, {"en": f"third {i}"}) for i in range(8)]
    rows += [Row({"en": f"other {i}?"}, {"en": f"second {i}"}) for i in range(8)]  # of two questions
    store = made(tmp_path / "s", tokenizer, ("a", rows))
    answers = {f"which {i}": {f"first {i}", f"second {i}"} for i in range(8)}
    answers |= {f"other {i}": {f"third {i}", f"second {i}"} for i in range(8)}
    plans, source, met = planner(store, size=12, strategy="mono", hard_negatives=1), store.sources[0], 0
    for step in range(60):
        plan = plans.plan(step)
        passages = [source.text(n) for n in (*plan.passages, *plan.negatives)]
        assert all(source.text(n).startswith("no ") for n in plan.negatives)
        for query, own in zip(plan.queries, plan.passage_ids, strict=False):
            right = answers[" ".join(source.text(query).lower().rstrip("?").split())]
            for passage, other in zip(passages, plan.passage_ids, strict=True):
                assert own == other or passage not in right
        met += len(passages) - len(set(plan.passage_ids.tolist()))
    assert met > 60


def test_a_question_is_one_in_all_its_languages(tokenizer, tmp_path):
    rows = [
        Row({"en": "who?", "de": "wer?"}, {"en": "a"}),
        Row({"de": "WER?", "fr": "qui ?"}, {"en": "b"}),
        Row({"fr": "qui ?"}, {"en": "c"}),
        Row({"fr": "où ?"}, {"en": "d"}),
        Row({"en": "again?"}, {"en": "e"}),
        Row({"en": "again?"}, {"en": "E"}),  # one content
        Row({"en": "other?"}, {"en": "B"}),  # which answers the first question
    ]
    source = made(tmp_path / "s", tokenizer, ("a", rows)).sources[0]
    assert source.row_answers.tolist() == [0, 0, 0, -1, -1, -1, -2]
    assert source.answers.tolist() == [3, *source.row_contents[:3].tolist()]
    assert source.row_contents[6] == source.row_contents[1]
    alone = made(tmp_path / "t", tokenizer, ("a", rows[2:6])).sources[0]
    assert len(alone.row_answers) == len(alone.answers) == 0


@pytest.mark.parametrize("block", [4, 1 << 20])
@pytest.mark.parametrize("seed", range(6))
def test_questions_are_numbered_by_their_first_row(tmp_path, monkeypatch, seed, block):
    monkeypatch.setattr("hbt_fast.data.contents.BLOCK", block)
    monkeypatch.setattr("hbt_fast.data.questions.BLOCK", block)
    rng = np.random.default_rng(seed)
    count = 40
    keys = [set(rng.integers(0, 200, rng.integers(1, 3)).tolist()) for _ in range(count)]
    contents = np.unique(rng.integers(0, 25, count), return_inverse=True)[1] if seed % 2 else np.empty(0, np.int64)
    groups = list(range(count))  # of rows that share a key, transitively: each by its first
    for key in range(200):
        some = {groups[row] for row in range(count) if key in keys[row]}
        groups = [min(some) if group in some else group for group in groups]
    of_row = contents.tolist() if len(contents) else list(range(count))
    answers = {g: sorted({of_row[row] for row in range(count) if groups[row] == g}) for g in sorted(set(groups))}
    several = [g for g, own in answers.items() if len(own) > 1]
    assert several
    rows, lists = [], []
    found = list_answers(
        np.array([key for own in keys for key in own], np.uint64),
        np.repeat(np.arange(count), [len(own) for own in keys]),
        contents, count, tmp_path / "work", *(lambda part, to=to: to.extend(part.tolist()) for to in (rows, lists)),
    )  # fmt: skip
    assert found == len(several)
    assert lists == [number for g in several for number in (len(answers[g]), *answers[g])]
    begins = dict(zip(several, np.cumsum([0, *(len(answers[g]) + 1 for g in several)]).tolist(), strict=False))
    listed = {content for g in several for content in answers[g]}
    assert rows == [begins.get(g, -2 if content in listed else -1) for g, content in zip(groups, of_row, strict=True)]
    assert not (tmp_path / "work").exists()


def test_rows_of_one_content_id_are_one_content_whatever_their_texts(tokenizer, tmp_path):
    rows = [Row({"en": f"q {i}"}, {"en": f"text {i}"}, content=f"c{i // 2}") for i in range(40)]
    rows += [Row({"de": f"f {i}"}, {"de": f"wort {i}"}, content=f"c{i}") for i in range(20)]
    contents = made(tmp_path / "s", tokenizer, ("a", rows)).sources[0].row_contents
    assert contents.tolist() == [i // 2 for i in range(40)] + list(range(20))


@pytest.mark.parametrize("strategy", ["mono", "cross"])
def test_an_epoch_has_each_content_once_and_the_next_one_other_questions(store, strategy):
    plans = planner(store, size=10, strategy=strategy)
    number = next(n for n, s in enumerate(plans.strata) if s.contents == 150)
    steps = [t for t in range(2000) if plans.stratum(t)[0] == number][:30]
    first = [plans.plan(t) for t in steps[:15]]
    second = [plans.plan(t) for t in steps[15:]]
    row_of = []
    for epoch in (first, second):
        contents = np.concatenate([p.contents for p in epoch])
        assert Counter(contents.tolist()) == Counter(range(150))
        row_of.append(dict(zip(contents.tolist(), np.concatenate([p.rows for p in epoch]).tolist(), strict=True)))
    assert all(row_of[0][c] != row_of[1][c] for c in range(150))  # two questions each: the other one comes next


def test_kinds_say_what_the_languages_are(store):
    for strategy in STRATEGIES:
        plans = planner(store, strategy=strategy)
        for step in range(30):
            plan = plans.plan(step)
            same = plan.query_languages == plan.passage_languages
            if plan.kind == "cross":
                assert not same.any()
            else:
                assert same.all()
            if plan.kind == "mono":
                assert len(set(plan.query_languages.tolist())) == 1
            if plan.kind == "mixed-mono" and store.sources[plan.source].name == "parallel":
                assert len(set(plan.query_languages.tolist())) > 1
            assert plan.kind == strategy or strategy == "hybrid"


def test_texts_are_those_of_the_row_in_the_language(store):
    plan = planner(store, strategy="cross").plan(3)
    source = store.sources[plan.source]
    for i, row in enumerate(plan.rows):
        asked, answered = (store.languages[n[i]] for n in (plan.query_languages, plan.passage_languages))
        question, passage = source.text(plan.queries[i]), source.text(plan.passages[i])
        assert question.startswith(f"{asked} which ")
        assert question.split()[-2] == passage.split()[5] == str(row // 2)
        assert passage.startswith(f"{answered} the ")


def test_a_plan_is_a_function_of_seed_and_step(store):
    forwards, backwards = planner(store, seed=5), planner(store, seed=5)
    one = {t: forwards.plan(t).queries.tolist() for t in range(40)}
    two = {t: backwards.plan(t).queries.tolist() for t in reversed(range(40))}
    assert one == two
    assert one[7] != planner(store, seed=6).plan(7).queries.tolist()
    assert one[7] == planner(store, seed=5).plan(7).queries.tolist()  # where a resumed run begins


def test_seeds_shuffle_even_where_there_is_one_stratum():
    plans = [
        planner(synthetic.store(synthetic.source(100, ["en"])), 50, seed, strategy="mono").plan(0) for seed in (1, 2)
    ]
    assert set(plans[0].rows.tolist()) != set(plans[1].rows.tolist())


def test_hybrid_has_its_share_of_monolingual_batches_and_languages_come_equally(store):
    plans = planner(store, strategy="hybrid", alpha=0.3, source_gamma=0.0)
    kinds = Counter(plans.plan(t).kind for t in range(1000))
    assert abs(kinds["mono"] - 300) <= 3
    languages = Counter(int(p.query_languages[0]) for p in map(plans.plan, range(1000)) if p.kind == "mono")
    assert max(languages.values()) - min(languages.values()) <= 6


def test_hard_negatives_are_the_rows_own_and_differ(store):
    plans = planner(store, strategy="mono", hard_negatives=2, source_gamma=1.0)
    plan = next(p for p in map(plans.plan, range(100)) if store.sources[p.source].name == "plain")
    source = store.sources[plan.source]
    for i, row in enumerate(plan.rows):
        mine = [source.text(t) for t in plan.negatives[plan.negative_rows == i]]
        assert sorted(mine) == [f"never {row}", f"no {row}"]


def test_hard_negatives_are_drawn_anew_each_time():
    negatives = [[(0, 10 * row + k, 1000 + 10 * row + k) for k in range(5)] for row in range(20)]
    source = synthetic.source(20, ["en"], negatives=negatives)
    plans = planner(synthetic.store(source), size=20, strategy="mono", hard_negatives=1)
    seen = np.zeros(5, int)
    for step in range(500):
        seen += np.bincount(plans.plan(step).negatives % 10, minlength=5)
    assert np.abs(seen - 2000).max() < 200  # 5 standard deviations


def test_a_hard_negative_that_is_some_rows_positive_is_swapped_for_another():
    # the first candidate of row r is the positive of row r + 1, the second is everyone's
    negatives = [[(0, 100 + row, (row + 1) % 20), (0, 99, 99), (0, 200 + row, 200 + row)] for row in range(20)]
    plans = planner(synthetic.store(synthetic.source(20, ["en"], negatives=negatives)), 20, strategy="mono",
                    hard_negatives=2)  # fmt: skip
    for step in range(50):
        plan = plans.plan(step)
        assert not set(plan.negative_contents.tolist()) & set(plan.contents.tolist())
        assert Counter(plan.negatives.tolist())[99] == 1  # and it comes once
        assert len(plan.negatives) == 21
        assert plan.excluded >= 19


def test_a_batch_larger_than_a_stratum_is_refused_by_name(store):
    with pytest.raises(DataError, match=r"batch.size is 100.*mono en plain: 60"):
        planner(store, size=100, strategy="mono")


def test_bitext_never_serves_monolingual_batches(tokenizer, tmp_path):
    rows = [Row({"en": f"x {i}", "de": f"y {i}"}, {"en": f"X  {i}", "de": f"y {i}"}) for i in range(9)]
    store = made(tmp_path / "s", tokenizer, ("a", rows))
    assert not store.sources[0].field_mono.any()
    assert planner(store, size=4, strategy="cross").plan(0).kind == "cross"
    with pytest.raises(DataError, match="monolingual batches need"):
        planner(store, size=4, strategy="mono")


def test_real_parallel_data_in_twelve_languages(shared_data, tokenizer, tmp_path):
    """Paragraphs of a handbook, of which every language lacks some: the batches are what the files say."""
    languages = ("ar", "de", "es", "fr", "id", "it", "ja", "nl", "pl", "ru", "tr", "zh")
    source = Source(str(shared_data / "debian-handbook-parallel" / "paragraphs.jsonl"), bitext=True, limit=900)
    rows = list(read_source(source, languages, on_error="skip"))
    assert {code for row in rows for code in row.queries} == set(languages)
    assert len({len(row.queries) for row in rows}) > 3
    store = made(tmp_path / "s", tokenizer, ("handbook", rows))
    plans, seen = planner(store, size=64, strategy="cross"), Counter()
    for step in range(60):
        plan = plans.plan(step)
        for row, a, b, q, p in zip(
            plan.rows, plan.query_languages, plan.passage_languages, plan.queries, plan.passages, strict=True
        ):
            seen[store.languages[a]] += 1
            assert store.sources[0].text(q) == rows[row].queries[store.languages[a]]
            assert store.sources[0].text(p) == rows[row].passages[store.languages[b]]
            assert a != b
        assert len({" ".join(store.sources[0].text(p).casefold().split()) for p in plan.passages}) == 64
    assert set(seen) == set(languages)
