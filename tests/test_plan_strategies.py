"""Strategies and weights: which languages and sources batches are drawn from, and how often."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import synthetic
from scipy.stats import chisquare

from hbt_fast.data.code_switch import CodeSwitch
from hbt_fast.data.counts import DrawCounts
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError
from hbt_fast.data.shares import BatchConfig

EVEN = 1e-3  # the seeds are fixed: a test passes or never does


def planner(*sources, weights=None, seed=0, steps=None, size=20, **settings):
    return BatchPlanner(
        synthetic.store(*sources, weights=weights), BatchConfig(size, **settings), seed=seed, steps=steps
    )


def codes(plans, numbers):
    return [plans.store.languages[n] for n in numbers]


def pairs_of(plans, steps):
    counts = DrawCounts(plans.store)
    for step in range(steps):
        counts.add(plans.plan(step))
    return counts


PARTLY = np.array([[True, (r // 2) % 2 == 0, r % 3 == 0, r % 5 == 0] for r in range(600)])  # every row has "en"


def partly(**options):
    return synthetic.source(600, ["en", "de", "sw", "th"], has=PARTLY, name="partly", **options)


WHO_HAS_WHAT = {
    "some languages": PARTLY,
    "two languages each": np.array([[r % 2 == 0, True, r % 2 == 1, False] for r in range(600)]),
    "all languages": None,
}


@pytest.mark.parametrize("pairs", ["mixed", "one"])
@pytest.mark.parametrize("has", WHO_HAS_WHAT.values(), ids=WHO_HAS_WHAT)
@pytest.mark.parametrize("strategy", ["mono", "mixed-mono", "cross", "code-switched"])
def test_a_language_that_a_row_lacks_is_never_drawn_for_it(strategy, has, pairs):
    source = synthetic.source(600, ["en", "de", "sw", "th"], has=has)
    there = np.ones((600, 4), bool) if has is None else has
    plans = planner(source, strategy=strategy, cross_pairs=pairs)
    for step in range(60):
        plan = plans.plan(step)
        if pairs == "one" and strategy == "cross":
            assert len({*zip(plan.query_languages, plan.passage_languages, strict=True)}) == 1
        for row, a, b, q, p in zip(
            plan.rows, codes(plans, plan.query_languages), codes(plans, plan.passage_languages), plan.queries,
            plan.passages, strict=True,
        ):  # fmt: skip
            assert there[row, source.languages.index(a)]
            assert there[row, source.languages.index(b)]
            assert q == 2 * (4 * row + source.languages.index(a))
            assert p == 2 * (4 * row + source.languages.index(b)) + 1
            assert (a == b) == (strategy != "cross")


@pytest.mark.parametrize("strategy", ["mono", "mixed-mono", "cross"])
def test_rows_of_a_language_that_is_left_out_are_never_drawn(strategy):
    has = WHO_HAS_WHAT["two languages each"]  # every row qualifies, until "sw" is left out
    plans = planner(
        synthetic.source(600, ["en", "de", "sw", "th"], has=has), strategy=strategy, language_weights={"sw": 0}
    )
    rows = set()
    for plan in map(plans.plan, range(60)):
        rows |= set(plan.rows.tolist())
        assert "sw" not in codes(plans, plan.query_languages) + codes(plans, plan.passage_languages)
    assert rows <= ({*range(0, 600, 2)} if strategy == "cross" else {*range(600)})
    assert {stratum.contents for stratum in plans.strata} <= ({300} if strategy == "cross" else {300, 600})


def test_every_language_of_mono_batches_comes_equally_often_however_many_rows_it_has():
    plans = planner(partly(), strategy="mono")
    seen = Counter(codes(plans, [plans.plan(t).query_languages[0] for t in range(400)]))
    assert seen.keys() == {"en", "de", "sw", "th"}
    assert max(seen.values()) - min(seen.values()) <= 4


def test_language_gamma_draws_by_size():
    plans = planner(partly(), strategy="mono", language_gamma=1.0)
    seen = Counter(codes(plans, [plans.plan(t).query_languages[0] for t in range(1220)]))
    assert [abs(seen[c] - n) <= 4 for c, n in {"en": 600, "de": 300, "sw": 200, "th": 120}.items()] == [True] * 4


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_source_gamma_draws_sources_by_size(gamma):
    sources = [synthetic.source(n, ["en"], name=f"s{n}") for n in (100, 400, 900)]
    plans = planner(*sources, strategy="mono", source_gamma=gamma)
    seen = np.bincount([plans.plan(t).source for t in range(1000)])
    expected = np.array([100, 400, 900]) ** gamma
    assert np.abs(seen - 1000 * expected / expected.sum()).max() <= 4


def test_a_source_weight_stands_against_the_others_sizes_and_zero_switches_off():
    sources = [synthetic.source(100, ["en"], name=name) for name in "abc"]
    plans = planner(*sources, weights=[30.0, None, 0.0], strategy="mono", source_gamma=0.5)
    assert np.abs(np.bincount([plans.plan(t).source for t in range(400)]) - [300, 100]).max() <= 4


def test_pairs_within_a_cross_lingual_batch_are_even_and_drawn_with_the_languages_weights():
    source = synthetic.source(600, ["de", "en", "fr"])
    counts = pairs_of(planner(source, strategy="cross"), 500)
    assert chisquare(counts.pairs[~np.eye(3, dtype=bool)]).pvalue > EVEN
    assert not counts.pairs.diagonal().any()
    counts = pairs_of(planner(source, strategy="cross", language_weights={"en": 2.0, "fr": 0.5}), 500)
    w = np.array([1, 2, 0.5])
    expected = np.outer(w, w)[~np.eye(3, dtype=bool)]
    assert chisquare(counts.pairs[~np.eye(3, dtype=bool)], expected / expected.sum() * 10_000).pvalue > EVEN


def test_languages_within_a_mixed_batch_are_even_and_drawn_with_their_weights():
    source = synthetic.source(600, ["de", "en", "fr"])
    assert chisquare(pairs_of(planner(source, strategy="mixed-mono"), 500).pairs.diagonal()).pvalue > EVEN
    weighted = pairs_of(planner(source, strategy="mixed-mono", language_weights={"fr": 3}), 500).pairs.diagonal()
    assert chisquare(weighted, [2000, 2000, 6000]).pvalue > EVEN


def test_one_pair_per_batch():
    plans = planner(partly(), strategy="cross", cross_pairs="one")
    seen = Counter()
    for step in range(600):
        plan = plans.plan(step)
        assert len(set(plan.query_languages.tolist())) == len(set(plan.passage_languages.tolist())) == 1
        seen[plan.query_languages[0], plan.passage_languages[0]] += 1
    assert len(seen) == 12
    assert max(seen.values()) - min(seen.values()) <= 4
    weighted = planner(partly(), strategy="cross", cross_pairs="one", language_weights={"de": 3, "th": 0})
    counts = pairs_of(weighted, 350)
    assert not any("th" in (a, b) for a, b, _ in counts.by_pair())
    seen = {(a, b): round(count / 500) for a, b, count in counts.by_pair()}
    assert seen == {(a, b): 3 if "de" in (a, b) else 1 for a, b in permutations(("de", "en", "sw"), 2)}


def test_language_weights_of_mono_batches():
    plans = planner(partly(), strategy="mono", language_weights={"en": 0, "DEU": 4})
    seen = Counter(codes(plans, [plans.plan(t).query_languages[0] for t in range(300)]))
    assert {code: round(count / 50) for code, count in seen.items()} == {"de": 4, "sw": 1, "th": 1}


def test_alpha_moves_over_the_run_and_batches_of_an_epoch_still_differ():
    source = synthetic.source(400, ["aa", "bb"])
    plans = planner(source, steps=1000, alpha=1.0, alpha_end=0.2)
    kinds = np.array([plans.plan(t).kind == "mono" for t in range(1000)])
    expected = 1.0 - 0.8 * (np.arange(1000) + 0.5) / 1000
    assert np.abs(np.cumsum(kinds) - np.cumsum(expected)).max() < 6
    assert kinds[:10].all()
    cross = [t for t in range(1000) if not kinds[t]]
    for epoch in range(3):
        contents = np.concatenate([plans.plan(t).contents for t in cross[20 * epoch : 20 * epoch + 20]])
        assert len(np.unique(contents)) == 400
    after = [plans.plan(t) for t in range(1000, 1100)]  # training on beyond the planned end keeps the last alpha
    assert 10 <= sum(p.kind == "mono" for p in after) <= 30


@pytest.mark.parametrize(("alpha", "kind"), [(0.0, "cross"), (1.0, "mono")])
def test_the_ends_of_alpha_need_no_data_of_the_other_kind(alpha, kind):
    source = synthetic.source(60, ["aa", "bb"], bitext=True) if kind == "cross" else synthetic.source(60, ["aa"])
    assert {planner(source, alpha=alpha).plan(t).kind for t in range(20)} == {kind}


def test_code_switched_batches_are_monolingual_before_switching():
    plan = planner(partly(), strategy="code-switched", code_switch=CodeSwitch(lexicons=["x.tsv"])).plan(0)
    assert plan.kind == "mono"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "batch.size is 0; write a whole number from 1 on"),
        ({"alpha": 1.5}, "batch.alpha is 1.5; write a number from 0 to 1"),
        ({"alpha_end": -0.1, "steps": 5}, "batch.alpha_end is -0.1; write a number from 0 to 1 or null"),
        ({"alpha_end": 0.1}, "batch.alpha_end needs the number of steps"),
        ({"hard_negatives": -1}, "batch.hard_negatives is -1; write a whole number from 0 to 65,536"),
        ({"language_weights": {"en": -1}}, "batch.language_weights.en is -1; write a number from 0 to 1e.09"),
        ({"language_weights": {"dee": 1}}, r"batch.language_weights"),
        ({"language_weights": {"fr": 1}}, r"the data has no fr; it has de, en, sw, th"),
        ({"language_weights": dict.fromkeys(("de", "en", "sw", "th"), 0)}, "every language has weight 0"),
        ({"strategy": "mono", "size": 150}, "mono th partly: 120. Lower batch.size, drop"),
        ({"strategy": "cross", "cross_pairs": "one", "size": 150}, "8 .*cross_pairs to mixed|and 2 more|cross_pairs"),
        ({"weights": [0.0], "strategy": "cross"}, "every source of cross batches has weight 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        planner(partly(), **settings)


@pytest.mark.parametrize(
    ("source", "strategy", "message"),
    [
        (synthetic.source(40, ["en"]), "cross", "no row has query and passage in different languages"),
        (synthetic.source(40, ["en", "de"], bitext=True), "mono", "monolingual batches need"),
        (synthetic.source(40, ["en", "de"], bitext=True), "mixed-mono", "mixed-mono batches need"),
    ],
)
def test_data_without_such_pairs_is_named(source, strategy, message):
    with pytest.raises(DataError, match=message):
        planner(source, strategy=strategy)
