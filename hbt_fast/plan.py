"""Plan batches without training: what the run would draw.

python -m hbt_fast.plan --config configs/demo.yaml
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hbt_fast.base.files import write_whole, writing
from hbt_fast.base.programs import program
from hbt_fast.config import parse
from hbt_fast.data.counts import DrawCounts
from hbt_fast.data.feed import rank_batch
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.engine.step import FIRST_TOKENS
from hbt_fast.overview import in_words, overview
from hbt_fast.prepare import prepare, resolve

SAMPLE = 200  # language pairs and padding are counted over at most so many steps, spread over the run


@program("hbt_fast.plan")
def main(arguments: list[str] | None = None) -> None:
    """Report from the command line."""
    config, prompts = resolve(parse("hbt_fast.plan", __doc__.splitlines()[0], arguments))
    store, tokenizer = prepare(config)
    planner = BatchPlanner(store, config.batch, seed=config.train.seed, steps=config.train.steps)
    known = overview(prompts, store, tokenizer, planner)
    print(in_words(known) + "\n", flush=True)
    budget = config.train.micro_batch_tokens
    budget = FIRST_TOKENS["cpu"] if budget == "auto" else budget
    text, counts = report(planner, config.train.steps, budget)
    print(text)
    picture, page = (Path(f"{config.train.run_dir}-plan{end}") for end in (".png", ".json"))  # beside the run folder
    title = f"language pairs of {config.batch.strategy} batches, {counts.pairs.sum():,} pairs drawn"
    with writing(picture, "write another train.run_dir"):
        picture.parent.mkdir(parents=True, exist_ok=True)
        counts.draw(picture, title)
        write_whole(page, json.dumps(known, indent=1, ensure_ascii=False))
    print(f"\nheat map  {picture}\noverview  {page}")


def report(planner: BatchPlanner, steps: int, budget: int) -> tuple[str, DrawCounts]:
    """Batches per stratum, pairs and epochs of each source, language pairs, padding and what was left out, as text.

    Args:
        planner: of the run.
        steps: of the run.
        budget: tokens per micro-batch, padding included.

    Returns:
        the text, and the counts of the steps that were sampled.
    """
    size, store, steps = planner.batch.size, planner.store, max(steps, 1)
    lines = [f"{steps:,} steps of {size:,} pairs", ""]
    lines.append(f"{'batches':>8} {'share':>7} {'contents':>13} {'epochs':>7}  drawn from")
    seen = [0] * len(store.sources)
    for number, stratum in enumerate(planner.strata):
        batches = planner.visits(number, steps)
        epochs = batches / (stratum.contents // size)
        seen[stratum.source] += batches * size
        share = f"{batches:>8,} {batches / steps:>7.1%} {stratum.contents:>13,} {epochs:>7.2f}"
        lines.append(f"{share}  {planner.name(number)}")
    lines += [
        "",
        f"{'pairs':>12} {'of rows':>13} {'of contents':>13}  source (rows beyond its contents repeat a passage)",
    ]
    for source, pairs in zip(store.sources, seen, strict=True):
        lines.append(f"{pairs:>12,} {source.rows:>13,} {source.contents:>13,}  {source.name}")
    counts, padding = _sample(planner, steps, budget)
    lines += ["", f"over {min(SAMPLE, steps)} of these steps: {padding}"]
    if any(planner.hard_negatives):
        lines.append(
            f"{counts.excluded:,} hard negatives passed over: the batch had their content already, or another row says "
            "that they answer the query"
        )
    lines += ["", *_table(counts)]
    return "\n".join(lines), counts


def _table(counts: DrawCounts) -> list[str]:
    """The language pairs in percent: a square where it fits a screen, else the most frequent ones."""
    total, pairs = counts.pairs.sum(), counts.by_pair()
    used = np.flatnonzero(counts.pairs.sum(0) + counts.pairs.sum(1))
    codes = [counts.store.languages[n] for n in used]
    if len(used) > 24:
        lines = ["% of pairs, query -> passage language"]
        lines += [f"  {a:>6} -> {b:<6} {100 * count / total:6.2f}" for a, b, count in pairs[:40]]
        return [*lines, f"  and {len(pairs) - 40} more"] if len(pairs) > 40 else lines
    lines = ["% of pairs: query language down, passage language across", " " * 6 + "".join(f"{c:>5}" for c in codes)]
    for code, row in zip(codes, counts.pairs[np.ix_(used, used)], strict=True):
        cells = "".join(f"{100 * n / total:5.1f}" if n else "    -" for n in row)
        lines.append(f"{code:>6}{cells}")
    return lines


def _sample(planner: BatchPlanner, steps: int, budget: int) -> tuple[DrawCounts, str]:
    """Counts of some steps, and what they say about padding."""
    store, counts = planner.store, DrawCounts(planner.store)
    tokens = padded = unsorted = given = encoded = 0
    for step in np.unique(np.linspace(0, steps - 1, min(SAMPLE, steps)).astype(int)).tolist():
        plan = planner.plan(step)
        counts.add(plan)
        source = store.sources[plan.source]
        batch = rank_batch(plan, source, np.arange(len(plan.rows)), budget)
        tokens += batch.tokens
        padded += sum(micro.cost for micro in batch.micro_batches)
        lengths = source.token_offsets[batch.texts + 1] - source.token_offsets[batch.texts]
        unsorted += int(lengths.max()) * len(lengths)
        given += len(batch.texts)
        encoded += sum(len(micro.index) for micro in batch.micro_batches)
    pairs = int(counts.pairs.sum())
    again = f"; {given - encoded:,} of {given:,} texts come twice and are encoded once" if encoded < given else ""
    padding = f"{1 - tokens / padded:.1%} of micro-batches is padding ({1 - tokens / unsorted:.1%} of whole batches)"
    return counts, f"{tokens / pairs:.1f} tokens per pair; {padding}{again}"


if __name__ == "__main__":
    main()
