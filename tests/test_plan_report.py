"""What `python -m hbt_fast.plan` says before training is what training draws."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import parallel_rows
from matplotlib.image import imread

from hbt_fast.data.counts import DrawCounts
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.shares import BatchConfig
from hbt_fast.plan import main, report

STEPS, SIZE = 60, 20


@pytest.fixture
def planner(store):
    return BatchPlanner(store, BatchConfig(SIZE, hard_negatives=1), seed=3, steps=STEPS)


def test_batches_pairs_and_epochs_are_those_of_the_run(planner, store):
    text, _ = report(planner, STEPS, 512)
    strata = Counter(planner.name(planner.stratum(step)[0]) for step in range(STEPS))
    rows = re.findall(r"^ *([\d,]+) +([\d.]+)% +([\d,]+) +([\d.]+)  (\w.*)$", text, re.MULTILINE)
    assert {name: int(batches) for batches, *_, name in rows if batches != "0"} == dict(strata)
    for batches, share, contents, epochs, _ in rows:
        assert float(share) == round(100 * int(batches) / STEPS, 1)
        assert float(epochs) == pytest.approx(int(batches) / (int(contents) // SIZE), abs=0.006)
    pairs = Counter(store.sources[planner.plan(step).source].name for step in range(STEPS))
    found = re.findall(r"^ *([\d,]+) +([\d,]+) +([\d,]+)  (\w+)$", text, re.MULTILINE)
    numbers = {name: [int(n.replace(",", "")) for n in several] for *several, name in found}
    assert numbers == {s.name: [SIZE * pairs[s.name], s.rows, s.contents] for s in store.sources}


def test_language_pairs_and_padding_are_those_of_the_batches(planner, store):
    text, counts = report(planner, STEPS, 64)  # few enough steps that all are looked at
    drawn, tokens, longest, passed_over = np.zeros_like(counts.pairs), 0, 0, 0
    for plan in map(planner.plan, range(STEPS)):
        source = store.sources[plan.source]
        for a, b in zip(plan.query_languages, plan.passage_languages, strict=True):
            drawn[a, b] += 1
        lengths = [len(source.text_tokens(t)) for t in [*plan.queries, *plan.passages, *plan.negatives]]
        tokens, longest = tokens + sum(lengths), longest + max(lengths) * len(lengths)
        passed_over += plan.excluded
    assert (counts.pairs == drawn).all()
    table = re.findall(r"^ +(de|en|fr)((?: +(?:[\d.]+|-))+)$", text, re.MULTILINE)
    shares = [[0.0 if cell == "-" else float(cell) for cell in cells.split()] for _, cells in table]
    np.testing.assert_allclose(shares, 100 * drawn / drawn.sum(), atol=0.051)
    per_pair, padding, unsorted = map(
        float, re.search(r"([\d.]+) tokens per pair; ([\d.]+)% .* \(([\d.]+)% of whole", text).groups()
    )
    assert per_pair == pytest.approx(tokens / (STEPS * SIZE), abs=0.051)
    assert unsorted == pytest.approx(100 * (1 - tokens / longest), abs=0.051)
    assert 0 <= padding < unsorted
    assert f"{passed_over:,} hard negatives passed over" in text


def test_counts_go_on_from_a_record(planner, store):
    whole, first, rest = (DrawCounts(store) for _ in range(3))
    plans = [replace(planner.plan(step), excluded=step) for step in range(STEPS)]
    for step, plan in enumerate(plans):
        (first if step < 25 else rest).add(plan)
        whole.add(plan)
    resumed = DrawCounts(store)
    resumed.restore(json.loads(json.dumps(first.record())))
    for plan in plans[25:]:
        resumed.add(plan)
    assert resumed.excluded == sum(range(STEPS))
    assert resumed.record() == whole.record()
    assert (resumed.pairs == first.pairs + rest.pairs).all()


def test_the_program_prints_the_report_and_draws_it(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"query": r.queries, "passage": r.passages, "content": r.content} for r in parallel_rows(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = [
        f"model.path={tmp_path / 'model'}", f"data.store_dir={tmp_path / 'stores'}", "batch.size=16",
        f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]", f"train.run_dir={tmp_path / 'run'}", "train.steps=30",
    ]  # fmt: skip
    main(given)
    said = capsys.readouterr().out
    assert "30 steps of 16 pairs" in said
    assert "80            40  rows" in said
    image = imread(tmp_path / "run-plan.png")
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stop:
        main([*given, "batch.size=500"])
    assert stop.value.code == 2
    assert "fewer different contents than that" in capsys.readouterr().err
