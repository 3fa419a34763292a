"""The figures of a log line: what a step was made of, how fast it was, and where its time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hbt_fast.data.feed import RankBatch
    from hbt_fast.data.plan import BatchPlan
    from hbt_fast.data.store import SourceStore

PHASES = ("data", "embed", "loss", "re-embed", "optimizer")
OTHER = "other"
NOTABLE = 5  # percent of the time that no phase timed, from which on a log line tells


def negatives_per_query(plan: BatchPlan) -> int:
    """How many passages of the global batch are negatives of a query: all but its own, as no two have one content.

    loss.false_negative_margin may leave out some of them.
    """
    return len(plan.passages) + len(plan.negatives) - 1


def tokens_of_all(batch: RankBatch, source: SourceStore) -> int:
    """Tokens that the encoders of all ranks read in a step, found without asking the others.

    Of one rank that is `batch.tokens`. Of several it is this rank's number over its share of the stored tokens of the
    global batch: exact where no text comes twice in a rank's share and none is code-switched.

    Args:
        batch: this rank's part of the global batch.
        source: that the batch is drawn from.
    """
    plan = batch.plan
    if len(batch.rows) == len(plan.rows):
        return batch.tokens
    lengths = [_tokens(source, texts) for texts in (plan.queries, plan.passages, plan.negatives)]
    return round(batch.tokens * sum(lengths) / _tokens(source, batch.texts))


def _tokens(source: SourceStore, texts: np.ndarray) -> int:
    return int((source.token_offsets[texts + 1] - source.token_offsets[texts]).sum())


def phase_shares(records: Sequence[dict]) -> dict[str, float]:
    """Share of the steps' time by phase; they add up to 1.

    Waiting for the batch is "data"; "other" is what no phase timed, an attempt that ran out of memory for one.

    Args:
        records: of steps, as metrics.jsonl has them.
    """
    spent: dict[str, float] = {}
    for record in records:
        for name, took in record["phases"].items():
            spent[name] = spent.get(name, 0.0) + took
    totals = (sum(record[name] for record in records) for name in ("seconds", "waited"))
    return {name: float(share) for name, share in shares(*totals, spent).items()}


def shares(
    seconds: float | np.ndarray, waited: float | np.ndarray, phases: Mapping[str, float | np.ndarray]
) -> dict[str, np.ndarray]:
    """What `phase_shares` gives, of one step or of (n,) each on its own.

    Args:
        seconds: that steps took.
        waited: for their batches.
        phases: seconds by phase.
    """
    spent = {**dict.fromkeys(PHASES, 0.0), **phases}
    spent["data"] = spent["data"] + waited
    timed = sum(spent.values())
    total = np.maximum(seconds, timed)  # a GPU's clock may be ahead of the program's
    total = np.where(total > 0, total, 1.0)
    return {name: took / total for name, took in {**spent, OTHER: total - timed}.items()}


def log_line(records: Sequence[dict], *, pairs: int, done: int, total: int, left: float) -> str:
    """A line for people: means over some steps.

    Args:
        records: of the steps since the last line, as metrics.jsonl has them.
        pairs: of a global batch.
        done: steps done.
        total: steps of the run.
        left: seconds that the rest is expected to take.
    """
    mean = {name: float(np.mean([r[name] for r in records])) for name in ("loss", "accuracy", "negatives", "seconds")}
    seconds = max(sum(record["seconds"] for record in records), 1e-9)
    percents = _percent(phase_shares(records))
    if percents[OTHER] < NOTABLE:
        del percents[OTHER]
    spent = " ".join(f"{'opt' if name == 'optimizer' else name} {percent}" for name, percent in percents.items())
    parts = [
        f"step {done:>{len(str(total))}}/{total}",
        f"loss {mean['loss']:.4f}",
        f"acc {mean['accuracy']:.3f}",
        f"neg {mean['negatives']:,.0f}",
        f"lr {records[-1]['learning_rate']:.1e}",
        f"{short(pairs * len(records) / seconds)} pairs/s",
        f"{short(sum(record['tokens'] for record in records) / seconds)} tok/s",
        f"{spent}%",
        f"{records[-1]['memory_gib']:.1f} GiB",
        f"eta {clock(left)}",
    ]
    return " | ".join(parts)


def short(number: float) -> str:
    """A rate in a few characters: 7.3, 1,234, 12.3k, 123k, 1.23M."""
    if number < 9.95:
        return f"{number:.1f}"
    if number < 9_999.5:
        return f"{number:,.0f}"
    if number < 999_500:
        return f"{number / 1e3:.{1 if number < 99_950 else 0}f}k"
    return f"{number / 1e6:,.2f}M"


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds: 2:05, 3:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _percent(shares: dict[str, float]) -> dict[str, int]:
    """Shares in whole percents that add up to 100: what rounding down loses goes to the largest remainders."""
    percent = {name: int(100 * share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: percent[name] - 100 * shares[name])
    for name in by_remainder[: 100 - sum(percent.values())]:
        percent[name] += 1
    return percent
