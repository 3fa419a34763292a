"""Queries, documents and judgements of them, and the task that they make.

Rules for what is not quite right: judgements of 0 and below do not make a document relevant; the same judgement twice
is one; a query without a relevant document (or, to re-rank, without a run) is left out and counted; a document that is
the query itself (equal ids, and it has the text) is no candidate for it; a judgement of a document that the corpus
lacks is left out and counted, up to one in a hundred (as one of ArguAna's is; trec_eval counts it as never found). All
else that does not fit together is an error that names file and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.tasks import RetrievalTask, offsets_and_members


@dataclass(frozen=True)
class Judged:
    """One language's queries and documents.

    Args:
        language: of both.
        queries: id -> text.
        documents: id -> text.
        judgements: query id -> document id -> gain above 0. It may name queries that are not there.
        pools: query id -> document ids to re-rank; None: all documents are candidates.
        missing: number of judgements that were left out, since their document is not there.
    """

    language: str
    queries: Mapping[str, str]
    documents: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, float]]
    pools: Mapping[str, Sequence[str]] | None = None
    missing: int = 0


def judged_task(name: str, parts: Sequence[Judged], *, parallel: bool = False) -> RetrievalTask:
    """One task of all languages; the documents that are relevant to a query are in its language.

    Args:
        name: shown in reports.
        parts: one for each language; all have pools, or none.
        parallel: whether equal query ids of two languages are translations of one query.

    Raises:
        DataError: no query has a relevant document.
    """
    texts, languages, ids, relevant, gains, pools = [], [], [], [], [], []
    candidates, candidate_languages, candidate_ids, ignored, left_out = [], [], [], [], 0
    for part in parts:
        prefix = f"{part.language}:" if len(parts) > 1 else ""  # ids of two languages are not the same document's
        index = {key: i for i, key in enumerate(part.documents, len(candidates))}
        candidates += part.documents.values()
        candidate_ids += [f"{prefix}{key}" for key in part.documents]
        candidate_languages += [part.language] * len(index)
        for key, text in part.queries.items():
            judged = part.judgements.get(key)
            if not judged or (part.pools is not None and key not in part.pools):
                left_out += 1
                continue
            ranked = sorted((index[document], gain) for document, gain in judged.items())
            texts.append(text)
            languages.append(part.language)
            ids.append(key if parallel else f"{prefix}{key}")
            relevant.append([document for document, _ in ranked])
            gains += [gain for _, gain in ranked]
            own = key if key not in judged and _is_own(text, part.documents.get(key)) else None
            ignored.append(index.get(own, -1))
            pools.append([index[d] for d in part.pools[key] if d != own] if part.pools is not None else [])
    if not texts:
        raise DataError(f"{name}: none of {left_out:,} queries has a relevant document")
    gains = np.array(gains, np.float32)
    return RetrievalTask(
        name, texts, languages, ids, candidates, candidate_languages, *offsets_and_members(relevant),
        gains=None if (gains == 1).all() else gains, candidate_ids=candidate_ids, left_out=left_out,
        missing=sum(part.missing for part in parts),
        pools=offsets_and_members(pools) if parts[0].pools is not None else None,
        ignored=np.array(ignored) if parts[0].pools is None and max(ignored) >= 0 else None,
    )  # fmt: skip


def _is_own(query: str, document: str | None) -> bool:
    """Whether a document of the query's id is its text. BEIR's tool asks for ids alone, but both may just be counted.

    ArguAna's documents have a title before it, which the queries lack.
    """
    return document is not None and " ".join(query.split()) in " ".join(document.split())
