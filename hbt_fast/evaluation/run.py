"""Encoder and task in, results out: encode, rank, search, with the time of each phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from hbt_fast.evaluation.metrics import Results, summarise
from hbt_fast.evaluation.ranks import exact_ranks
from hbt_fast.evaluation.search import language_bias, search
from hbt_fast.evaluation.tasks import RetrievalTask


class EvaluationError(ValueError):
    """The encoder returned something that cannot be ranked. The message says what and for which text."""


class TextEncoder(Protocol):
    """What `evaluate` needs of an encoder."""

    def encode(self, texts: Sequence[str], prompt: str = "", progress: bool = False) -> np.ndarray:
        """float32 (len(texts), d), L2-normalised."""


def evaluate(
    encoder: TextEncoder,
    task: RetrievalTask,
    query_prompt: str = "Query: ",
    passage_prompt: str = "Passage: ",
    *,
    passage_encoder: TextEncoder | None = None,
    model: str = "",
    device: str = "auto",
    top_k: int = 10,
    progress: bool = False,
    log: Callable[[str], None] | None = print,
) -> Results:
    """Evaluates an encoder on a task in the settings Mo, Cr and Mul.

    Args:
        encoder: anything with `TextEncoder.encode`; vectors are compared by inner product.
        task: what to retrieve.
        query_prompt: put before every query (by the encoder).
        passage_prompt: put before every candidate.
        passage_encoder: encodes the candidates; None: the same.
        model: name for reports.
        device: where ranks and search run: "auto", "cpu" or "cuda".
        top_k: depth at which language bias is measured; cut to the number of candidates.
        progress: passed on to the encoder.
        log: gets one line per phase with its time; None: silent.

    Raises:
        EvaluationError: NaN or infinite vectors, a wrong shape, dimensions of queries and candidates that differ.
    """
    seconds: dict[str, float] = {}
    log = log or (lambda line: None)

    def phase(name: str, what: str, started: float) -> None:
        seconds[name] = round(time.perf_counter() - started, 3)
        log(f"{name:<18} {seconds[name]:9.1f} s   {what}")

    started = time.perf_counter()
    q_Nd = _encode(encoder, task.queries, query_prompt, "query", progress)
    phase("encode queries", f"{len(q_Nd):,} texts, {q_Nd.shape[1]} dimensions", started)
    started = time.perf_counter()
    p_Md = _encode(passage_encoder or encoder, task.candidates, passage_prompt, "candidate", progress)
    phase("encode candidates", f"{len(p_Md):,} texts", started)
    if q_Nd.shape[1] != p_Md.shape[1]:
        raise EvaluationError(f"query vectors have {q_Nd.shape[1]} dimensions, candidate vectors {p_Md.shape[1]}")

    started = time.perf_counter()
    ranks = exact_ranks(
        q_Nd, p_Md, task.query_languages, task.candidate_languages, task.offsets, task.relevant, device=device
    )
    phase("rank", f"{len(ranks.query):,} exact ranks, matrix products {ranks.product_seconds:.1f} s", started)

    started = time.perf_counter()
    k = min(top_k, len(p_Md))
    # Ranks may run on a GPU that this FAISS cannot use: search falls back to the CPU by itself.
    _, indices = search(q_Nd, p_Md, k, device="cpu" if device == "cpu" else "auto")
    bias = language_bias(indices, task.query_languages, task.candidate_languages, task.offsets, task.relevant)
    phase("search", f"top {k} of {len(p_Md):,}", started)
    return summarise(
        ranks,
        task.name,
        model,
        bias=bias,
        prompts={"query": query_prompt, "passage": passage_prompt},
        seconds=seconds,
    )


def _encode(encoder: TextEncoder, texts: list[str], prompt: str, kind: str, progress: bool) -> np.ndarray:
    """Encodes each distinct text once: equal texts then have bit-equal vectors, whatever batch they would have met."""
    distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    vectors = np.asarray(encoder.encode(list(distinct), prompt=prompt, progress=progress))
    if vectors.ndim != 2 or len(vectors) != len(distinct):
        raise EvaluationError(
            f"the encoder must return one vector per {kind}, ({len(distinct)}, d); it returned shape {vectors.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        text = list(distinct)[bad[0]]
        raise EvaluationError(
            f"{len(bad)} of {len(distinct)} {kind} vectors hold NaN or infinity, the first for {text[:80]!r}. "
            "A diverged training run or half precision that overflows are the usual causes."
        )
    return vectors.astype(np.float32, copy=False)[[distinct[text] for text in texts]]
