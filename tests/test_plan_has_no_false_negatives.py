"""The batch plan: no content twice in a global batch, no pair twice in an epoch, a pure function of (seed, step)."""

from collections import Counter

import numpy as np
import pytest

from hbt_fast.data.draws import KroneckerSchedule, floor_sum, key_of, permute
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import Role, build_store

STRATEGIES = ["mono", "mixed-mono", "cross", "hybrid"]


def planner(store, size=16, **options):
    return BatchPlanner(store, size, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_content_repeats_in_a_global_batch(store, strategy):
    plans = planner(store, size=60, strategy=strategy)
    for step in range(200):
        contents = plans.plan(step).contents
        assert len(set(contents.tolist())) == len(contents)


def test_equal_passage_texts_are_one_content_across_sources_and_questions(tokenizer, tmp_path):
    rows = [Row({"en": f"q{i}"}, {"en": "The  SAME text"}) for i in range(3)]
    other = [Row({"en": f"r{i}"}, {"en": "the same TEXT" if i == 0 else f"text {i}"}) for i in range(3)]
    translated = [Row({"fr": "s"}, {"fr": "le même", "en": "the same text"})]
    sources = [("a", None, rows), ("b", None, other), ("c", None, translated)]
    made = build_store(tmp_path / "s", sources, tokenizer, Role("", 9), Role("", 9), progress=False)
    contents = made.row_contents.tolist()
    assert len({contents[i] for i in (0, 1, 2, 3, 6)}) == 1
    assert len(set(contents)) == 3


def test_rows_of_one_content_id_are_one_content_whatever_their_texts(tokenizer, tmp_path):
    rows = [Row({"en": f"q {i}"}, {"en": f"text {i}"}, content=f"c{i // 2}") for i in range(40)]
    rows += [Row({"de": f"f {i}"}, {"de": f"wort {i}"}, content=f"c{i}") for i in range(20)]
    sources = [("a", None, rows), ("b", None, rows[:1])]  # another source's "c0" is another content, but for its text
    store = build_store(tmp_path / "s", sources, tokenizer, Role("", 9), Role("", 9), progress=False)
    assert len(set(store.row_contents[:60].tolist())) == 20
    assert store.row_contents[0] == store.row_contents[1] == store.row_contents[40] == store.row_contents[60]


@pytest.mark.parametrize("strategy", ["mono", "cross"])
def test_an_epoch_has_each_content_once_and_the_next_one_other_questions(store, strategy):
    plans = planner(store, size=10, strategy=strategy)
    number = next(n for n, s in enumerate(plans.strata) if s.contents == 150)
    steps = [t for t in range(2000) if plans.schedule.stratum(t) == number][:30]
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
        for step in range(30):
            plan = planner(store, strategy=strategy).plan(step)
            same = plan.query_languages == plan.passage_languages
            if plan.kind == "cross":
                assert not same.any()
            else:
                assert same.all()
            if plan.kind == "mono":
                assert len(set(plan.query_languages.tolist())) == 1
            if plan.kind == "mixed-mono" and plan.source == "parallel":
                assert len(set(plan.query_languages.tolist())) > 1
            assert plan.kind == strategy or strategy == "hybrid"


def test_texts_are_those_of_the_row_in_the_language(store):
    plan = planner(store, strategy="cross").plan(3)
    for row, lq, lp, q, p in zip(
        plan.rows, plan.query_languages, plan.passage_languages, plan.queries, plan.passages, strict=True
    ):
        fields = range(store.field_offsets[row], store.field_offsets[row + 1])
        assert q in [store.field_queries[f] for f in fields if store.field_languages[f] == lq]
        assert p in [store.field_passages[f] for f in fields if store.field_languages[f] == lp]


def test_a_plan_is_a_function_of_seed_and_step(store):
    forwards, backwards = planner(store, seed=5), planner(store, seed=5)
    one = {t: forwards.plan(t).queries.tolist() for t in range(40)}
    two = {t: backwards.plan(t).queries.tolist() for t in reversed(range(40))}
    assert one == two
    assert one[7] != planner(store, seed=6).plan(7).queries.tolist()


def test_ranks_share_the_batch_out_whatever_their_number(store):
    plan = planner(store, size=17, hard_negatives=2, strategy="mono").plan(0)
    for world in (1, 2, 3, 5):
        shards = [plan.shard(rank, world) for rank in range(world)]
        assert np.concatenate([plan.rows[s] for s, _ in shards]).tolist() == plan.rows.tolist()
        assert sorted(np.concatenate([n for _, n in shards]).tolist()) == list(range(len(plan.negatives)))


def test_hybrid_has_its_share_of_monolingual_batches_and_languages_come_equally(store):
    plans = planner(store, strategy="hybrid", alpha=0.3, source_gamma=0.0)
    kinds = Counter(plans.plan(t).kind for t in range(1000))
    assert abs(kinds["mono"] - 300) <= 3
    languages = Counter(int(p.query_languages[0]) for p in map(plans.plan, range(1000)) if p.kind == "mono")
    assert max(languages.values()) - min(languages.values()) <= 6


def test_hard_negatives_are_the_rows_own_and_differ(store):
    plans = planner(store, strategy="mono", hard_negatives=2, source_gamma=1.0)
    plan = next(p for p in map(plans.plan, range(100)) if p.source == "plain")
    for i, row in enumerate(plan.rows):
        mine = plan.negatives[plan.negative_rows == i].tolist()
        own = store.negative_texts[store.negative_offsets[row] : store.negative_offsets[row + 1]].tolist()
        assert sorted(mine) == sorted(own)
    assert not set(plan.negative_contents.tolist()) & set(plan.contents.tolist())


def test_a_batch_larger_than_a_stratum_is_refused_by_name(store):
    with pytest.raises(DataError, match=r"batch.size is 100.*mono en plain: 60"):
        planner(store, size=100, strategy="mono")


def test_a_strategy_that_the_data_cannot_serve_is_refused(tokenizer, tmp_path):
    rows = [Row({"en": f"q{i}"}, {"en": f"p{i}"}) for i in range(9)]
    made = build_store(tmp_path / "s", [("a", None, rows)], tokenizer, Role("", 9), Role("", 9), progress=False)
    with pytest.raises(DataError, match="different languages"):
        planner(made, size=2, strategy="cross")


def test_bitext_never_serves_monolingual_batches(tokenizer, tmp_path):
    rows = [Row({"en": f"x {i}", "de": f"y {i}"}, {"en": f"X  {i}", "de": f"y {i}"}) for i in range(9)]
    made = build_store(tmp_path / "s", [("a", None, rows)], tokenizer, Role("", 9), Role("", 9), progress=False)
    assert not made.field_mono.any()
    assert planner(made, size=4, strategy="cross").plan(0).kind == "cross"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 4097])
def test_the_keyed_permutation_is_one(n):
    seen = [permute(i, n, key_of(n, 1)) for i in range(n)]
    assert sorted(seen) == list(range(n))
    if n >= 16:
        assert seen != [permute(i, n, key_of(n, 2)) for i in range(n)]


def test_positions_after_the_permutation_are_spread():
    n = 1000
    # each of 10 blocks of positions gets about a tenth of each block of indices (chi-squared, 81 degrees of freedom)
    chi2 = []
    for key in range(20):
        table = np.zeros((10, 10))
        for i in range(n):
            table[i // 100, permute(i, n, key_of(key, 9)) // 100] += 1
        chi2.append(((table - 10) ** 2 / 10).sum())
    assert np.mean(chi2) < 100  # 81 expected, standard deviation of the mean 2.8


def test_the_schedule_counts_its_own_visits():
    schedule = KroneckerSchedule([0.5, 0.1, 0.0, 0.4], seed=7)
    steps = [schedule.stratum(t) for t in range(3000)]
    for t in (0, 1, 5, 77, 2999):
        assert [schedule.visits(j, t) for j in range(4)] == [steps[:t].count(j) for j in range(4)]
    assert abs(steps.count(0) - 1500) <= 4
    assert 2 not in steps


def test_floor_sum_is_the_sum():
    for n, m, a, b in [(0, 5, 3, 2), (1, 1, 0, 0), (10, 7, 3, 5), (25, 4, 9, 11), (13, 100, 61, 250)]:
        assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))
