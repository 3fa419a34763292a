"""Settings of batches, and how they share out the steps of a run among kinds, languages and sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hbt_fast.base.ranges import check, ranges, real, whole
from hbt_fast.data.code_switch import CodeSwitch
from hbt_fast.data.draws import KroneckerSchedule
from hbt_fast.data.languages import LANGUAGE, normalise
from hbt_fast.data.rows import DataError
from hbt_fast.data.store import Store
from hbt_fast.data.strata import ANY, CROSS, KINDS, MIXED, MONO, Stratum

PLATEAUS = 100  # a changing alpha is constant over so many parts of the run


@ranges(
    size=whole(1),
    alpha=real(0, 1),
    alpha_end=real(0, 1),
    language_gamma=real(-10, 10),
    language_weights=(LANGUAGE, real(0, 1e9)),
    source_gamma=real(-10, 10),
    hard_negatives=whole(0, 2**16),
)
@dataclass(frozen=True)
class BatchConfig:
    """How global batches are made.

    Args:
        size: pairs per batch, all ranks together.
        strategy: mono (the whole batch in one language; X-X-mono of LAReQA, arXiv 2004.05484, and X-X of arXiv
            2408.10536), mixed-mono (query and passage in one language, which differs from row to row; LAReQA's X-X),
            cross (query and passage in different languages; X-Y), hybrid (arXiv 2408.10536; mono with share alpha,
            else cross) or code-switched (arXiv 2305.05295; mono, with words replaced as code_switch says).
        alpha: share of monolingual batches of the hybrid strategy.
        alpha_end: the share moves linearly from alpha to this over the run; null keeps alpha.
        cross_pairs: mixed draws the language pair of a cross-lingual batch row by row; one gives each batch one pair.
        language_gamma: languages of monolingual batches (and pairs, where each batch has one) are drawn with weight
            size ** gamma; 0 draws them equally.
        language_weights: weights of single languages instead (language: weight); 0 leaves a language out of all
            batches. A cross-lingual pair has the product of both, 1 for a language without.
        source_gamma: sources without a weight of their own are drawn with weight size ** gamma.
        hard_negatives: hard negatives per pair at most, where the data has them in the language of its passage. They
            are drawn anew each time; none has the content of a row of the batch, or comes twice in it.
        code_switch: replace words through bilingual lexicons, under any strategy.
    """

    size: int = 128
    strategy: Literal["mono", "mixed-mono", "cross", "hybrid", "code-switched"] = "hybrid"
    alpha: float = 0.5
    alpha_end: float | None = None
    cross_pairs: Literal["mixed", "one"] = "mixed"
    language_gamma: float = 0.0
    language_weights: dict[str, float] = field(default_factory=dict)
    source_gamma: float = 0.5
    hard_negatives: int = 0
    code_switch: CodeSwitch = field(default_factory=CodeSwitch)


def check_settings(batch: BatchConfig, steps: int | None) -> None:
    """Raise DataError for a setting that is out of range."""
    check(batch, "batch.", DataError)
    named: dict[str, str] = {}
    for code in batch.language_weights:
        if (first := named.setdefault(normalise(code), code)) != code:
            raise DataError(
                f"batch.language_weights names {normalise(code)} twice, as {first} and as {code}; leave one out"
            )
    if batch.alpha_end is not None and not steps:
        raise DataError("batch.alpha_end needs the number of steps of the run")


def language_weights(batch: BatchConfig, store: Store) -> np.ndarray:
    """(languages,) float64: the given weights, 1 for a language without."""
    weights = np.ones(len(store.languages))
    for code, weight in batch.language_weights.items():
        language = normalise(code)
        if language not in store.languages:
            raise DataError(f"batch.language_weights: the data has no {code}; it has {', '.join(store.languages)}")
        weights[store.languages.index(language)] = weight
    if not weights.any():
        raise DataError("batch.language_weights: every language has weight 0; leave at least one")
    return weights


def kinds_of(batch: BatchConfig) -> list[int]:
    """The kinds of batches that a strategy has."""
    if batch.strategy == "hybrid":
        ends = (batch.alpha, batch.alpha if batch.alpha_end is None else batch.alpha_end)
        return [MONO] * (max(ends) > 0) + [CROSS] * (min(ends) < 1)
    return [{"mono": MONO, "mixed-mono": MIXED, "cross": CROSS, "code-switched": MONO}[batch.strategy]]


def kind_schedule(kinds: list[int], batch: BatchConfig, seed: int, steps: int | None) -> KroneckerSchedule:
    """Which of the kinds a step has; plateaus where alpha changes."""
    if len(kinds) == 1:
        return KroneckerSchedule([1.0], seed)
    if batch.alpha_end is None:
        return KroneckerSchedule([batch.alpha, 1 - batch.alpha], seed)
    count = min(PLATEAUS, steps)
    middles = [(k + 0.5) / count for k in range(count)]
    alphas = [batch.alpha + (batch.alpha_end - batch.alpha) * middle for middle in middles]
    phases = [(steps * k // count, [alpha, 1 - alpha]) for k, alpha in enumerate(alphas)]
    return KroneckerSchedule(phases[0][1], seed, phases[1:])


def nothing_for(kind: int) -> str:
    """What to say when no row can serve a kind."""
    what = {
        MONO: "no row has query and passage in one language, which monolingual batches need",
        MIXED: "no row has query and passage in one language, which mixed-mono batches need",
        CROSS: "no row has query and passage in different languages, which cross-lingual batches need",
    }[kind]
    return what + "; choose another batch.strategy or add a source that has such pairs"


def shares_of(strata: list[Stratum], batch: BatchConfig, store: Store) -> list[float]:
    """Share out a kind's steps: first among languages (or pairs), then within each among its sources."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for n, stratum in enumerate(strata):
        codes = store.sources[stratum.source].languages
        _, a, b, _ = stratum.wanted
        groups.setdefault(() if a == ANY else (codes[a],) if a == b else (codes[a], codes[b]), []).append(n)
    given = {normalise(code): weight for code, weight in batch.language_weights.items()}
    shares = [0.0] * len(strata)
    for codes, group in groups.items():
        sizes = [strata[n].contents for n in group]
        if any(code in given for code in codes):
            part = float(np.prod([given.get(code, 1.0) for code in codes]))
        else:
            part = float(sum(sizes)) ** batch.language_gamma
        own = [store.weights[strata[n].source] for n in group]
        weights = [size**batch.source_gamma if w is None else w for size, w in zip(sizes, own, strict=True)]
        for n, weight in zip(group, weights, strict=True):
            shares[n] = part * weight / sum(weights) if weight else 0.0
    total = sum(shares)
    if not total:
        raise DataError(f"every source of {KINDS[strata[0].wanted.kind]} batches has weight 0; give one a weight")
    return [share / total for share in shares]
