"""Retrieval tasks by name, for the evaluation program and for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hbt_fast.evaluation.tasks import RetrievalTask


def load_retrieval(
    task: str,
    data: str | Path,
    *,
    split: str | None = None,
    context: bool = False,
    languages: Sequence[str] | None = None,
) -> RetrievalTask:
    """The task of a name.

    Args:
        task: "xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "rerank" or "jsonl".
        data: its folder, or the file of jsonl.
        split: of the judgements, where there are several; see `layouts`.
        context: xquad-r and mlqa-r: candidates are sentence and paragraph.
        languages: of these alone; None: of all.

    Raises:
        DataError: the data cannot be read; names file and line.
    """
    if task in ("xquad-r", "mlqa-r"):
        from hbt_fast.evaluation import lareqa

        load = lareqa.xquad_r if task == "xquad-r" else lareqa.mlqa_r
        return load(data, context=context, languages=languages)
    if task == "jsonl":
        from hbt_fast.evaluation.jsonl import jsonl

        return jsonl(data, languages)
    if task == "rerank":
        from hbt_fast.evaluation.reranking import reranking

        return reranking(data, split, languages)
    from hbt_fast.evaluation.beir import beir

    return beir(data, split, languages)
