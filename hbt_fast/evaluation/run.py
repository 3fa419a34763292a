"""Encoder and task in, results out: encode, rank, search, with the time of each phase."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, Protocol

import numpy as np

from hbt_fast.base.errors import UserError
from hbt_fast.evaluation.bias import language_bias
from hbt_fast.evaluation.made import Made, made_on
from hbt_fast.evaluation.metrics import found_metrics, in_pools, per_query, summarise, summarise_pools
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.ranks import exact_ranks
from hbt_fast.evaluation.results import Results
from hbt_fast.evaluation.search import search
from hbt_fast.evaluation.tasks import RetrievalTask

ROWS = 65_536  # of vectors that are looked at together


class EvaluationError(UserError):
    """The encoder returned something that cannot be ranked. The message says what and for which text."""


class TextEncoder(Protocol):
    """What `evaluate` needs of an encoder."""

    def encode(self, texts: Sequence[str], prompt: str = "", progress: bool = False) -> np.ndarray:
        """float32 (len(texts), d), L2-normalised."""


def evaluate(
    encoder: TextEncoder, task: RetrievalTask, query_prompt: str = "Query: ", passage_prompt: str = "Passage: ",
    **options: Any,
) -> Results:  # fmt: skip
    """The results of `measure`, without its table of queries; the arguments are the same."""
    return measure(encoder, task, query_prompt, passage_prompt, **options)[0]


def measure(
    encoder: TextEncoder,
    task: RetrievalTask,
    query_prompt: str = "Query: ",
    passage_prompt: str = "Passage: ",
    *,
    passage_encoder: TextEncoder | None = None,
    model: str = "",
    made: Made | None = None,
    device: str = "auto",
    top_k: int = 10,
    index: str = "flat",
    progress: bool = False,
    log: Callable[[str], None] | None = print,
) -> tuple[Results, PerQuery]:
    """Evaluates an encoder on a task: in the settings Mo, Cr and Mul, or, if the task has pools, within these.

    Args:
        encoder: anything with `TextEncoder.encode`; vectors are compared by inner product.
        task: what to retrieve.
        query_prompt: put before every query (by the encoder).
        passage_prompt: put before every candidate.
        passage_encoder: encodes the candidates; None: the same.
        model: name for reports.
        made: of the encoder, see `made.made_with`; recorded with the results, beside index, data and version.
        device: where ranks and search run: "auto", "cpu" or "cuda".
        top_k: depth at which language bias is measured; cut to the number of candidates.
        index: "ivf" or "ivf-pq": search by it too (see `search.search`); the cut-offs of what it finds become a further
            line of `Results.cutoffs`. All else is exact.
        progress: passed on to the encoder.
        log: gets one line per phase with its time; None: silent.

    Returns:
        the results, and every measure of every query.

    Raises:
        EvaluationError: NaN or infinite vectors, a wrong shape, dimensions of queries and candidates that differ.
    """
    clock = Clock(log)
    with clock.phase("encode queries") as done:
        q_Nd = encode_distinct(encoder, task.queries, query_prompt, "query", progress)
        done(f"{len(q_Nd):,} texts, {q_Nd.shape[1]} dimensions")
    with clock.phase("encode candidates") as done:
        p_Md = encode_distinct(passage_encoder or encoder, task.candidates, passage_prompt, "candidate", progress)
        done(f"{len(p_Md):,} texts")
    if q_Nd.shape[1] != p_Md.shape[1]:
        raise EvaluationError(f"query vectors have {q_Nd.shape[1]} dimensions, candidate vectors {p_Md.shape[1]}")
    about = {
        "groups": task.groups,
        "left_out": task.left_out,
        "prompts": {"query": query_prompt, "passage": passage_prompt},
        "notes": _notes(task),
        "settings": {**(made or {}), **({} if task.pools else {"index": index}), **made_on(task)},
        "seconds": clock.seconds,
    }
    if task.pools is not None:
        measures = _in_pools(q_Nd, p_Md, task, clock)
        results = summarise_pools(measures, task.query_languages, len(p_Md), task.name, model, **about)
    else:
        with clock.phase("rank") as done:
            ranks = exact_ranks(
                q_Nd, p_Md, task.query_languages, task.candidate_languages, task.offsets, task.relevant,
                ignored=task.ignored, device=device,
            )  # fmt: skip
            done(f"{len(ranks.query):,} exact ranks, matrix products {ranks.product_seconds:.1f} s")
        measures = per_query(ranks, task.gains)
        approximate = {}
        # Ranks may run on a GPU that this FAISS cannot use: search falls back to the CPU by itself.
        where = "cpu" if device == "cpu" else "auto"
        with clock.phase("search") as done:
            k = min(top_k, len(p_Md))
            _, indices = search_without(q_Nd, p_Md, k, task.ignored, device=where)
            measures |= language_bias(indices, task.query_languages, task.candidate_languages)
            done(f"top {k} of {len(p_Md):,}")
        if index != "flat":
            with clock.phase(f"search by {index}") as done:
                k = min(100, len(p_Md))
                _, indices = search_without(q_Nd, p_Md, k, task.ignored, device=where, index=index)
                approximate = {f"all, by {index}": found_metrics(ranks, indices, task.gains)}
                done(f"top {k} of {len(p_Md):,}")
        results = summarise(ranks, task.name, model, measures=measures, gains=task.gains, **about)
        results = replace(results, cutoffs={**results.cutoffs, **approximate})
    measured = {name: values for name, values in measures.items() if not np.isnan(values).all()}
    return results, PerQuery(task.name, task.query_ids, task.query_languages, measured)


def _in_pools(q_Nd: np.ndarray, p_Md: np.ndarray, task: RetrievalTask, clock: Clock) -> dict[str, np.ndarray]:
    from hbt_fast.evaluation.ranks import pool_ranks

    with clock.phase("rank") as done:
        ranks = pool_ranks(q_Nd, p_Md, task.offsets, task.relevant, task.pools)
        done(f"{len(task.pools[1]):,} candidates in {len(q_Nd):,} pools")
    query = np.repeat(np.arange(len(q_Nd)), np.diff(task.offsets))
    return in_pools(ranks, query, len(q_Nd), task.gains)


def _notes(task: RetrievalTask) -> list[str]:
    notes = []
    if many := 0 if task.ignored is None else int((task.ignored >= 0).sum()):
        notes.append(
            f"{many:,} queries are documents themselves (equal ids and texts). Each is left out of its own ranking, as "
            "BEIR's tool does."
        )
    if task.missing:
        notes.append(
            f"Judgements of documents that the corpus lacks: {task.missing:,}. They do not count (trec_eval counts "
            "them as never found)."
        )
    return notes


def search_without(
    queries: np.ndarray, candidates: np.ndarray, k: int, ignored: np.ndarray | None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`search.search` for the best k, of which the ignored candidate of each query is not one.

    Args:
        queries: (N, d) float32.
        candidates: (M, d) float32.
        k: at most M.
        ignored: (N,) int64; -1: none. None: nothing is.
        options: of `search`.

    Returns:
        (N, k) float32 scores and int64 candidates; -1, with a score of minus infinity, where there are no more.
    """
    if ignored is None:
        return search(queries, candidates, k, **options)
    scores_Nk, found_Nk = search(queries, candidates, min(k + 1, len(candidates)), **options)
    gone_Nk = (found_Nk == ignored[:, None]) | (found_Nk < 0)
    order_Nk = np.argsort(gone_Nk, axis=1, kind="stable")[:, :k]
    scores_Nk, found_Nk = np.where(gone_Nk, -np.inf, scores_Nk), np.where(gone_Nk, -1, found_Nk)
    return np.take_along_axis(scores_Nk, order_Nk, axis=1), np.take_along_axis(found_Nk, order_Nk, axis=1)


class Clock:
    """Times phases and says how long they took.

    Args:
        log: gets a line for each; None: silent.
    """

    def __init__(self, log: Callable[[str], None] | None) -> None:
        self.log, self.seconds = log or (lambda line: None), {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[str], None]]:
        """Within it, the time is that of the phase; gives a function that takes what is to be said of it.

        Args:
            name: of the phase, in `seconds` and in its line.
        """
        started, said = time.perf_counter(), []
        yield said.append
        self.seconds[name] = round(time.perf_counter() - started, 3)
        self.log(f"{name:<18} {self.seconds[name]:9.1f} s   {' '.join(said)}")


def encode_distinct(encoder: TextEncoder, texts: list[str], prompt: str, kind: str, progress: bool) -> np.ndarray:
    """Encodes each distinct text once: equal texts then have bit-equal vectors, whatever batch they would have met.

    Args:
        encoder: of the texts.
        texts: n strings.
        prompt: put before each.
        kind: what they are, for messages.
        progress: passed on to the encoder.

    Returns:
        (n, d) float32.

    Raises:
        EvaluationError: NaN or infinite vectors, a wrong shape.
    """
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    vectors = np.asanyarray(encoder.encode(list(distinct), prompt=prompt, progress=progress))
    if vectors.ndim != 2 or len(vectors) != len(distinct):
        raise EvaluationError(
            f"the encoder must return one vector per {kind}, ({len(distinct)}, d); it returned shape {vectors.shape}"
        )
    pieces = range(0, len(vectors), ROWS)  # the vectors may be a file larger than the memory
    bad = np.concatenate([np.flatnonzero(~np.isfinite(vectors[i : i + ROWS]).all(axis=1)) + i for i in pieces])
    if len(bad):
        text = list(distinct)[bad[0]]
        raise EvaluationError(
            f"{len(bad)} of {len(distinct)} {kind} vectors hold NaN or infinity, the first for {text[:80]!r}. "
            "A diverged training run or half precision that overflows are the usual causes."
        )
    vectors = vectors.astype(np.float32, copy=False)
    return vectors if len(distinct) == len(texts) else _repeated(vectors, [distinct[text] for text in texts])


def _repeated(vectors: np.ndarray, rows: list[int]) -> np.ndarray:
    """vectors[rows]; where the vectors are a file, these are one too, without a name."""
    if not isinstance(vectors, np.memmap):
        return vectors[rows]
    out = unnamed_file((len(rows), vectors.shape[1]), vectors)
    for i in range(0, len(rows), ROWS):
        out[i : i + ROWS] = vectors[rows[i : i + ROWS]]
    return out


def unnamed_file(shape: tuple[int, int], beside: np.memmap) -> np.memmap:
    """float32 zeros mapped from a file that has no name and goes with them.

    Args:
        shape: of the array.
        beside: an array in a file, in whose folder there is room for another.

    Raises:
        OSError: there is none.
    """
    folder, size = Path(beside.filename).parent if beside.filename else None, 4 * math.prod(shape)
    with TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # or the process is killed where it writes to a full disk
        except OSError as error:
            where = folder or gettempdir()
            raise OSError(error.errno, f"{error.strerror}: {size / 2**30:.2f} GiB more vectors", str(where)) from error
        return np.memmap(file, np.float32, "r+", shape=shape)
