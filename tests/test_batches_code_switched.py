"""Code-switched batches: what the encoder reads is the switched text, the same at any number of ranks."""

import numpy as np
import pytest

from hbt_fast.data.code_switch import CodeSwitch
from hbt_fast.data.feed import Feed, rank_batch
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError
from hbt_fast.data.shares import BatchConfig
from hbt_fast.data.store import Role
from hbt_fast.data.switching import Switching

QUERY, PASSAGE = Role("Query: ", 24), Role("Passage: ", 24)  # as the store fixture has them


@pytest.fixture
def lexicons(tmp_path):
    (tmp_path / "en_de.tsv").write_text("which\twelche\nthe\tdie\nred\trot\nso\tsehr\n", encoding="utf-8")
    (tmp_path / "en_fr.tsv").write_text("which\tquelle\nthe\tla\nblue\tbleu\n", encoding="utf-8")
    return [str(tmp_path)]


def switching(store, tokenizer, lexicons, seed=0, **settings):
    return Switching(CodeSwitch(lexicons=lexicons, **settings), store, tokenizer, seed=seed)


def texts_of(batch, tokenizer):
    """Every text of a rank's batch, decoded."""
    texts = [""] * sum(len(m.index) for m in batch.micro_batches)
    for micro in batch.micro_batches:
        for k, i in enumerate(micro.index):
            texts[i] = tokenizer.decode(micro.tokens[micro.cu_seqlens[k] : micro.cu_seqlens[k + 1]], True)
    return texts if batch.inverse is None else [texts[i] for i in batch.inverse]


def plan_in_english(store, **settings):
    planner = BatchPlanner(store, BatchConfig(20, strategy="mono", language_weights={"de": 0, "fr": 0}, **settings))
    return planner, next(p for p in map(planner.plan, range(50)) if store.sources[p.source].name == "parallel")


def test_the_encoder_reads_the_switched_texts_with_prompt_and_limit(store, tokenizer, lexicons):
    rewrite = switching(store, tokenizer, lexicons, probability=1.0, languages=["de"])
    _, plan = plan_in_english(store)
    source = store.sources[plan.source]
    batch = rank_batch(plan, source, np.arange(20), 4096, rewrite=rewrite)
    words = {"which": "welche", "the": "die", "red": "rot", "so": "sehr"}
    expected = []
    for numbers, role in ((plan.queries, QUERY), (plan.passages, PASSAGE)):
        for text in map(source.text, numbers):
            switched = " ".join(words.get(word, word) for word in text.split())
            ids = tokenizer(role.prompt + switched, truncation=True, max_length=role.max_length)["input_ids"]
            expected.append(tokenizer.decode(ids, True))
    assert texts_of(batch, tokenizer) == expected
    assert sum("die" in text for text in expected) >= 20


@pytest.mark.parametrize(("side", "first", "second"), [("queries", True, False), ("passages", False, True)])
def test_one_side_alone_is_switched_on_request(store, tokenizer, lexicons, side, first, second):
    settings = {"queries": False, "passages": False, side: True}
    rewrite = switching(store, tokenizer, lexicons, probability=1.0, **settings)
    _, plan = plan_in_english(store)
    source = store.sources[plan.source]
    plain, switched = (
        texts_of(rank_batch(plan, source, np.arange(20), 4096, rewrite=r), tokenizer) for r in (None, rewrite)
    )
    assert (plain[:20] != switched[:20]) == first
    assert (plain[20:] != switched[20:]) == second


def test_any_number_of_ranks_reads_the_same_switched_texts(store, tokenizer, lexicons):
    seen = []
    for world in (1, 2, 3):
        texts = {}
        for rank in range(world):
            planner = BatchPlanner(store, BatchConfig(20, strategy="hybrid", hard_negatives=2), seed=3)
            rewrite = switching(store, tokenizer, lexicons, mode="multilingual", seed=3)
            with Feed(planner, store, rank=rank, world=world, budget=512, steps=12, rewrite=rewrite) as feed:
                for batch in feed:
                    n = len(batch.rows)
                    decoded = texts_of(batch, tokenizer)
                    for k, row in enumerate(batch.rows):
                        texts[batch.plan.step, int(row)] = decoded[k], decoded[n + k]
        seen.append(texts)
    assert len(seen[0]) == 240
    assert seen[0] == seen[1] == seen[2]


def test_switches_differ_from_step_to_step_and_seed_to_seed(store, tokenizer, lexicons):
    planner, _ = plan_in_english(store)
    steps = [t for t in range(60) if store.sources[planner.plan(t).source].name == "parallel"]
    first, again = (planner.plan(t) for t in (steps[0], next(t for t in steps[1:] if planner.plan(t).kind == "mono")))
    source = store.sources[first.source]

    def read(plan, seed):
        rewrite = switching(store, tokenizer, lexicons, seed=seed)
        return texts_of(rank_batch(plan, source, np.arange(20), 4096, rewrite=rewrite), tokenizer)

    assert read(first, 0) == read(first, 0)
    assert read(first, 0) != read(first, 1)
    later = type(first)(**{**first.__dict__, "step": again.step})
    assert read(first, 0) != read(later, 0)


def test_languages_without_a_word_in_the_lexicons_are_named_and_stay(store, tokenizer, tmp_path):
    (tmp_path / "en_sw.tsv").write_text("which\tgani\n", encoding="utf-8")
    rewrite = switching(store, tokenizer, [str(tmp_path)], probability=1.0)
    assert rewrite.unswitched == ("de", "fr")
    planner = BatchPlanner(store, BatchConfig(20, strategy="mono", language_weights={"en": 0}))
    plan = planner.plan(0)
    source = store.sources[plan.source]
    batches = [rank_batch(plan, source, np.arange(20), 4096, rewrite=r) for r in (None, rewrite)]
    assert texts_of(batches[0], tokenizer) == texts_of(batches[1], tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lexicons": []}, r"batch.code_switch.lexicons names no dictionary"),
        ({"queries": False, "passages": False}, "queries and passages are both false"),
        ({"probability": 1.5}, "probability is 1.5"),
    ],
)
def test_settings_that_switch_nothing_are_refused(store, tokenizer, lexicons, settings, message):
    with pytest.raises(DataError, match=message):
        switching(store, tokenizer, **{"lexicons": lexicons, **settings})


def test_lexicons_of_other_languages_are_refused(store, tokenizer, tmp_path):
    (tmp_path / "sw_ja.tsv").write_text("gani\tどの\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no word of the data's languages \(de, en, fr\)"):
        switching(store, tokenizer, [str(tmp_path)])
