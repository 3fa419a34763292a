"""Bitext retrieval: does a sentence find its translation among all sentences of the other language?

The accuracy in both directions of every pair of languages. The files are read in `bitext_data`, the neighbours of a
pair found in `bitext_neighbours`; what a report says is in `bitext_report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hbt_fast.evaluation.bitext_data import XTREME_36, BitextTask, load_bitext, n_way
from hbt_fast.evaluation.bitext_neighbours import Neighbours, mutual_neighbours
from hbt_fast.evaluation.bitext_report import MEASURES, BitextResults, are_varieties, macro_means
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.ranks import full_precision
from hbt_fast.evaluation.run import Clock, EvaluationError, TextEncoder, encode_distinct

__all__ = ["XTREME_36", "BitextTask", "evaluate_bitext", "load_bitext", "n_way"]

NEIGHBOURS = 4  # of the margin (arXiv 1811.01136)
WORKSPACE = 2**21  # scores in memory at a time
MOST_QUERIES = 500_000  # that are written one by one


def evaluate_bitext(
    encoder: TextEncoder,
    task: BitextTask,
    prompt: str = "",
    *,
    target_prompt: str | None = None,
    model: str = "",
    device: str = "auto",
    cache: str | Path | None = None,
    progress: bool = False,
    log: Callable[[str], None] | None = print,
) -> BitextResults:
    """How often a sentence's nearest neighbour in the other language is its translation.

    A hit is counted in three ways:

    - "accuracy", by line number, as LASER, XTREME and mteb count: of several targets with one text, only the right
      line is a hit. The nearest is the target with the highest inner product; of equal ones that with the lower number.
    - "same text": a target with the text of the right one is a hit as well.
    - "margin": by line number, of the 4 nearest that with the highest ratio margin: the cosine over the mean of the
      cosines of both sentences with their 4 nearest on the other side. It holds back hubs (arXiv 1811.01136; what
      LASER's xsim does).

    Each distinct text is encoded once, and a pair's two directions come out of one product (two, if targets have a
    prompt of their own), of which 8 MiB are in memory at a time.

    Args:
        encoder: anything with `TextEncoder.encode`.
        task: what to retrieve.
        prompt: put before every sentence (by the encoder).
        target_prompt: put before those that are searched, instead; None: the same.
        model: name for reports.
        device: where the search runs: "auto", "cpu" or "cuda".
        cache: folder in which vectors are kept (see `cache.CachedEncoder`); None: nowhere.
        progress: passed on to the encoder.
        log: gets one line per phase with its time; None: silent.

    Raises:
        EvaluationError: vectors with NaN or infinity, or of a wrong shape.
    """
    clock = Clock(log)
    if cache is not None:
        from hbt_fast.evaluation.cache import CachedEncoder

        encoder = CachedEncoder(encoder, cache, log=clock.log)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    row = {text: i for i, text in enumerate(dict.fromkeys(t for part in task.sentences.values() for t in part))}
    prompts = list(dict.fromkeys([prompt, prompt if target_prompt is None else target_prompt]))
    with clock.phase("encode") as done:
        vectors = [
            torch.from_numpy(encode_distinct(encoder, list(row), text, "sentence", progress)).to(device)
            for text in prompts
        ]
        done(f"{len(row):,} texts, {vectors[0].shape[1]} dimensions")
    if len({v_nd.shape[1] for v_nd in vectors}) > 1:
        raise EvaluationError(f"source vectors have {vectors[0].shape[1]} dimensions, targets {vectors[1].shape[1]}")
    with clock.phase("search") as done:
        search = _Search(task, row, vectors, device)
        hits = {(task.languages[a], task.languages[b]): found for a, b, found in search.directions()}
        done(f"{len(hits):,} directions, matrix products {search.product_seconds:.1f} s")
    clock.seconds["products"] = round(search.product_seconds, 3)
    prompts = {"source": prompts[0], "target": prompts[-1]}
    return _summary(task, hits, model=model, prompts=prompts, seconds=clock.seconds)


@dataclass(frozen=True, eq=False)
class _Side:
    """One file: its distinct texts in the order of their first lines, so that equal texts tie exactly.

    Args:
        rows: (u,) the vector of each distinct text.
        first: (u,) the line that it is on first.
        text: (n,) the distinct text of each line.
    """

    rows: torch.Tensor
    first: np.ndarray
    text: np.ndarray


def _side(sentences: list[str], row: dict[str, int], device: str) -> _Side:
    number: dict[str, int] = {}
    text = np.array([number.setdefault(sentence, len(number)) for sentence in sentences])
    first = np.unique(text, return_index=True)[1]
    return _Side(torch.tensor([row[sentence] for sentence in number], device=device), first, text)


class _Search:
    """Walks through the pairs of a task; the vectors of the first file of a pair stay while they are needed."""

    def __init__(self, task: BitextTask, row: dict[str, int], vectors: list[torch.Tensor], device: str) -> None:
        self.task, self.sources, self.targets = task, vectors[0], vectors[-1]
        self.sides = {file: _side(sentences, row, device) for file, sentences in task.sentences.items()}
        self.workspace = torch.empty(WORKSPACE, device=device)
        self.product_seconds = 0.0
        self.last: tuple[str, torch.Tensor] | None = None

    def directions(self) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
        """(source, target, measure -> (n,) bool hits): both directions of each pair."""
        for a, b in self.task.pairs:
            from_a, into_a = self._neighbours(a, b)
            yield a, b, _hits(from_a, into_a, self.sides[a], self.sides[b])
            # With a prompt for targets, b as a source has other vectors than b as a target.
            from_b, into_b = (into_a, from_a) if self.sources is self.targets else self._neighbours(b, a)
            yield b, a, _hits(from_b, into_b, self.sides[b], self.sides[a])

    def _neighbours(self, source: str, target: str) -> tuple[Neighbours, Neighbours]:
        if self.last is None or self.last[0] != source:
            self.last = source, self.sources[self.sides[source].rows]
        target_md = self.targets[self.sides[target].rows]
        with full_precision():
            found, back, seconds = mutual_neighbours(self.last[1], target_md, NEIGHBOURS, workspace_c=self.workspace)
        self.product_seconds += seconds
        return found, back


def _hits(found: Neighbours, back: Neighbours, source: _Side, target: _Side) -> dict[str, np.ndarray]:
    """Which lines of the source find their translation, by measure."""
    around_nk = (
        found.scores.mean(1, dtype=np.float64)[:, None] + back.scores.mean(1, dtype=np.float64)[found.index]
    ) / 2
    # A ratio to nothing, or to less, would put the farthest first; such a neighbour comes last.
    margin_nk = np.divide(found.scores, around_nk, out=np.full(around_nk.shape, -np.inf), where=around_nk > 0)
    by_margin = found.index[np.arange(len(found.index)), margin_nk.argmax(1)]
    nearest, lines = found.index[source.text, 0], np.arange(len(source.text))
    return {
        "accuracy": target.first[nearest] == lines,
        "same text": target.text == nearest,
        "margin": target.first[by_margin[source.text]] == lines,
    }


def _summary(task: BitextTask, hits: dict[tuple[str, str], dict[str, np.ndarray]], **about: object) -> BitextResults:
    sources, targets = (list(side) for side in zip(*hits, strict=True))
    measures = {name: [float(found[name].mean()) for found in hits.values()] for name in MEASURES}
    means = macro_means(sources, targets, measures, task.groups)
    sentences = [len(found["accuracy"]) for found in hits.values()]
    return BitextResults(
        task.name, sources=sources, targets=targets, sentences=sentences, measures=measures, means=means,
        groups=task.groups, queries=_per_query(task, hits), **about,
    )  # fmt: skip


def _per_query(task: BitextTask, hits: dict[tuple[str, str], dict[str, np.ndarray]]) -> PerQuery:
    """Hits line by line; of very many directions, the share of the targets that a line is right in.

    Another variety of the language is no target then, as in `macro_means`, unless there is no other.
    """
    n_way = len(task.sentences) < 2 * len(task.pairs)  # lines of one number are translations in all files then
    if sum(len(found["accuracy"]) for found in hits.values()) > MOST_QUERIES and n_way:
        rows = {}
        for source in dict.fromkeys(source for source, _ in hits):
            found = {target: found for (s, target), found in hits.items() if s == source}
            others = [x for target, x in found.items() if not are_varieties(source, target)] or list(found.values())
            rows[f"{source}>*"] = {m: np.mean([x[m] for x in others], axis=0) for m in MEASURES}
    else:
        rows = {f"{source}>{target}": found for (source, target), found in hits.items()}
    ids, languages = [], []
    for language, found in rows.items():
        pair = "" if n_way else "-".join(sorted(language.split(">"))) + ":"
        ids += [f"{pair}{line}|{language}" for line in range(1, len(found["accuracy"]) + 1)]
        languages += [language] * len(found["accuracy"])
    return PerQuery(
        task.name, ids, languages,
        {name: np.concatenate([found[name] for found in rows.values()]).astype(np.float64) for name in MEASURES},
    )  # fmt: skip
