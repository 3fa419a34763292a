"""Plan batches without training: what the run would draw.

python -m hbt_fast.plan --config configs/demo.yaml
"""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np

from hbt_fast.config import parse
from hbt_fast.data.pack import pack
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError
from hbt_fast.data.store import Store
from hbt_fast.encoder import EncoderError
from hbt_fast.prepare import prepare


def main(arguments: list[str] | None = None) -> None:
    """Report from the command line."""
    config = parse("hbt_fast.plan", __doc__.splitlines()[0], arguments)
    from hbt_fast.train import make_planner

    try:
        store, _ = prepare(config)
        planner = make_planner(store, config)
    except (DataError, EncoderError) as error:
        print(f"hbt_fast.plan: {error}", file=sys.stderr)
        sys.exit(2)
    print(report(planner, store, config.train.steps, config.train.micro_batch_tokens))


def report(planner: BatchPlanner, store: Store, steps: int, budget: int, sample: int = 200) -> str:
    """Batches per stratum, epochs through each, language pairs and padding, as text.

    Args:
        planner: of the run.
        store: its data.
        steps: of the run.
        budget: tokens per micro-batch, padding included.
        sample: language pairs and padding are counted over at most so many steps, spread over the run.
    """
    lines = [f"{steps:,} steps of {planner.batch_size:,} pairs", ""]
    lines.append(f"{'batches':>8} {'share':>7} {'contents':>9} {'epochs':>7}  drawn from")
    for number, stratum in enumerate(planner.strata):
        batches = planner.schedule.visits(number, steps)
        epochs = batches / (stratum.contents // planner.batch_size)
        share = batches / max(steps, 1)
        lines.append(f"{batches:>8,} {share:>7.1%} {stratum.contents:>9,} {epochs:>7.2f}  {planner.name(stratum)}")
    pairs: Counter[tuple[int, int]] = Counter()
    tokens = padded = unsorted = 0
    chosen = np.unique(np.linspace(0, max(steps - 1, 0), min(sample, max(steps, 1))).astype(int))
    for step in chosen.tolist():
        plan = planner.plan(step)
        pairs.update(zip(plan.query_languages.tolist(), plan.passage_languages.tolist(), strict=True))
        texts = np.concatenate([plan.queries, plan.passages, plan.negatives])
        for micro in pack(texts, store.tokens, store.token_offsets, budget):
            tokens += len(micro.tokens)
            padded += micro.cost
        lengths = np.diff(store.token_offsets)[texts]
        unsorted += int(lengths.max()) * len(texts)
    total = sum(pairs.values())
    lines.append("")
    shown = f"{tokens / total:.1f} tokens per pair, {1 - tokens / padded:.1%} padding"
    lines.append(f"over {len(chosen)} of these steps: {shown}")
    lines.append(f"(it would be {1 - tokens / unsorted:.1%} without sorting by length); query -> passage language:")
    for (query, passage), count in pairs.most_common():
        lines.append(f"  {store.languages[query]:>6} -> {store.languages[passage]:<6} {count / total:7.2%}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
