"""Re-ranking: every query has a pool of its own, which a first retriever found, as BM25 did for mMARCO.

mmarco/     collections/german_collection.tsv  queries/dev/german_queries.dev.small.tsv
            runs/run.bm25_german-msmarco.txt   qrels.dev.small.tsv (one for all languages)
own/        any layout of `beir` with a run*.txt in it
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hbt_fast.data.collection_files import chosen, files_of, of_split, parallel_collections, queries_of_split
from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.beir import beir, read_part
from hbt_fast.evaluation.judged import judged_task
from hbt_fast.evaluation.tasks import RetrievalTask


def reranking(
    folder: str | Path, split: str | None = None, languages: Sequence[str] | None = None, name: str | None = None
) -> RetrievalTask:
    """A task with pools. Only documents that are in a pool or relevant become candidates: 7 of mMARCO's 9 million.

    Args:
        folder: in mMARCO's layout, in which documents and queries are parallel over languages, or in one of `beir`.
        split: of the judgements, as "dev.small"; None: the only one that there is, else test, else dev.
        languages: load these only; None: all.
        name: shown in reports; None: the folder's name.

    Raises:
        DataError: names file and line, or the folder and what it lacks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold queries, collection, qrels and run files")
    files, named = parallel_collections(folder)
    if not named:
        return beir(folder, split, languages, name, rerank=True)
    qrels, found = of_split([p for p in files if p.name.startswith("qrels")], split, "qrels", folder)
    parts = []
    for code, word in chosen(folder, named, languages).items():
        of_language = files_of(files, word)
        if not of_language["run"]:
            raise DataError(f"{folder}: no run of {word}; its name must be as run.bm25_{word}.txt")
        queries, run = (queries_of_split(of_language[kind], found, folder) for kind in ("queries", "run"))
        parts.append(read_part(code, of_language["corpus"], queries, qrels, run))
    return judged_task(f"{name or folder.resolve().name} ({found})", parts, parallel=True)
