"""Collections in the layouts of BEIR, MIRACL and Mr. TyDi: a corpus, queries, and judgements of which answer which.

scifact/      corpus.jsonl  queries.jsonl  qrels/test.tsv
miracl/       miracl-v1.0-sw/topics/*-dev.tsv  miracl-v1.0-sw/qrels/*-dev.tsv  miracl-corpus-v1.0-sw/docs-0.jsonl.gz
mr-tydi/      mrtydi-v1.1-swahili/  topic.test.tsv  qrels.test.txt  collection/docs.jsonl.gz
own/          sw/ en/ ..., each as one of these
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hbt_fast.data.collection_files import files_by_kind, language_folders, of_split, queries_of_split
from hbt_fast.data.judgements import read_qrels, read_run, read_texts, refuse_unknown_in_qrels, refuse_unknown_in_run
from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.judged import Judged, judged_task
from hbt_fast.evaluation.tasks import RetrievalTask

MISSING = 0.01  # of judgements, whose documents the corpus may lack: more of them, and it is another corpus


def beir(
    folder: str | Path,
    split: str | None = None,
    languages: Sequence[str] | None = None,
    name: str | None = None,
    rerank: bool = False,
) -> RetrievalTask:
    """A task of one collection, or of one per language, in whose common pool queries search too.

    Args:
        folder: see `collection_files.language_folders`.
        split: of the judgements; None: the only one that there is, else test, else dev.
        languages: load these only; of a folder without a folder per language: its language.
        name: shown in reports; None: the folder's name.
        rerank: take each query's candidates from a run file beside the others.

    Raises:
        DataError: names file and line, or the folder and what it lacks.
    """
    folder = Path(folder)
    parts, splits = [], {}
    for language, folders in language_folders(folder, languages).items():
        files = files_by_kind(folders)
        if not files["corpus"]:
            raise DataError(f"{folders[0]}: no corpus file; its name must begin with corpus, docs or collection")
        qrels, found = of_split(files["qrels"], split, "qrels", folders[0])
        splits[found] = None
        queries = queries_of_split(files["queries"], found, folders[0])
        run = None
        if rerank:
            # A run has no split in its name more often than not; then there is one.
            run = queries_of_split(files["run"], found, folders[0]) if files["run"] else None
            if run is None:
                raise DataError(f"{folders[0]}: no run file to re-rank; its name must begin with run or top1000")
        parts.append(read_part(language, files["corpus"], queries, qrels, run))
    ending = ", ".join(filter(None, splits))
    return judged_task(f"{name or folder.resolve().name}{f' ({ending})' if ending else ''}", parts)


def read_part(language: str, corpus: Sequence[Path], queries: Path, qrels: Path, run: Path | None) -> Judged:
    """The files of one language, read and seen to fit together.

    Args:
        language: its code.
        corpus: files of documents.
        queries: a file of them.
        qrels: judgements; they may not name a query that is not there, nor a document but for one in a hundred.
        run: what a first retriever found, to be re-ranked; None: all documents are candidates.

    Raises:
        DataError: names file and line.
    """
    judgements, pools = read_qrels(qrels), read_run(run) if run else None
    texts = read_texts([queries])
    wanted = None
    if pools is not None:
        # Judgements of queries that nobody re-ranks are those of another split.
        judgements = {query: judged for query, judged in judgements.items() if query in pools}
        wanted = {document for part in (*pools.values(), *judgements.values()) for document in part}
    documents = read_texts(corpus, wanted)
    if pools is not None and not (pools.keys() <= texts.keys() and wanted <= documents.keys()):
        refuse_unknown_in_run(run, texts, documents)
    there = {
        query: {document: gain for document, gain in judged.items() if document in documents}
        for query, judged in judgements.items()
    }
    total, found = (sum(map(len, judged.values())) for judged in (judgements, there))
    if total - found > MISSING * total or not judgements.keys() <= texts.keys():
        refuse_unknown_in_qrels(qrels, texts, documents, pools)
    return Judged(language, texts, documents, there, pools, total - found)
