"""Queries, documents, judgements (qrels), triples and runs, as the files of retrieval collections have them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np

from hbt_fast.data.problems import Strict
from hbt_fast.data.reading import lines, records, refuse_half_pairs
from hbt_fast.data.rows import DataError

_IDS = ("_id", "docid", "id", "query_id", "qid", "pid", "corpus-id", "query-id")
_TEXTS = ("text", "contents", "query", "passage")
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def read_texts(paths: Iterable[Path], wanted: Collection[str] | None = None) -> dict[str, str]:
    """Texts by id, of queries or documents.

    Args:
        paths: JSON Lines (.jsonl, .json) with an id, "text" and perhaps "title", which is put before the text with a
            space; else lines of an id, a tab and the text, the first one perhaps of their names. Any may be .gz.
        wanted: take these ids only; None: all.

    Raises:
        DataError: a line without id or text, an id that occurs twice, nothing in the files; names file and line.
    """
    found: dict[str, str] = {}
    paths = list(paths)
    for path in paths:
        for where, key, text in _jsonl(path) if ".json" in path.name else _tsv(path):
            if wanted is not None and key not in wanted:
                continue
            if key in found:
                raise DataError(f"{where}: id {key!r} occurs twice")
            found[key] = text
    if not found and wanted is None:
        raise DataError(f"{paths[0]}: nothing in it")
    return found


def _jsonl(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, record in records(str(path), Strict()):
        key = next((record[name] for name in _IDS if name in record), None)
        text = next((record[name] for name in _TEXTS if name in record), None)
        title = record.get("title") or ""
        if (
            not isinstance(key, str | int)
            or isinstance(key, bool)
            or not isinstance(text, str)
            or not isinstance(title, str)
        ):
            raise DataError(
                f'{where}: an "_id" and a "text" are needed (and "title", if it is there, must be text); '
                f"the fields are {', '.join(record) or 'none'}"
            )
        refuse_half_pairs([key, title, text], where)
        yield where, str(key), f"{title} {text}".strip()


def _tsv(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in lines(str(path)):
        key, tab, text = line.partition("\t")
        if number == 1 and key.strip().lower() in _IDS:
            continue  # id, text
        if not tab or not key.strip():
            if not line.strip():
                continue
            raise DataError(f"{path}:{number}: an id, a tab and a text are needed, not {line[:60]!r}")
        yield f"{path}:{number}", key.strip(), text.strip()


def read_qrels(path: Path) -> dict[str, dict[str, float]]:
    """Query id -> document id -> gain, of judgements above 0.

    Args:
        path: lines of "query document gain" (BEIR; with a first line of names or without) or "query 0 document gain"
            (TREC), separated by tabs or spaces. May be .gz.

    Raises:
        DataError: a malformed line, or two judgements that contradict each other; names file and line.
    """
    found: dict[str, dict[str, float]] = {}
    for where, query, document, gain in judgements(path):
        gain = max(gain, 0.0)
        if found.setdefault(query, {}).setdefault(document, gain) != gain:
            raise DataError(
                f"{where}: query {query!r} and document {document!r} were judged {found[query][document]:g} before"
            )
    above = {query: {key: gain for key, gain in judged.items() if gain} for query, judged in found.items()}
    above = {query: judged for query, judged in above.items() if judged}
    if not above:
        raise DataError(f"{path}: no judgement above 0, so nothing is relevant to any query")
    return above


def judgements(path: Path) -> Iterator[tuple[str, str, str, float]]:
    """("file:line", query id, document id, gain) of each line; see `read_qrels`."""
    for number, line in lines(str(path)):
        cells = _cells(line)
        if not cells:
            continue
        gain = _number(cells[-1])
        if number == 1 and len(cells) == 3 and gain is None:
            continue  # query-id corpus-id score
        if len(cells) not in (3, 4) or gain is None or not is_gain(gain):
            raise DataError(
                f'{path}:{number}: "query document gain" or "query 0 document gain", the gain a number that 32 bits '
                f"hold, is needed, not {line[:60]!r}"
            )
        yield f"{path}:{number}", cells[0], cells[-2], gain


def triples(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """("file:line", query id, id of a document that answers it, id of one that does not) of each line.

    Args:
        path: lines of three ids, separated by tabs or spaces, as MS MARCO's triples.train.ids.small.tsv. May be .gz.

    Raises:
        DataError: a malformed line; names file and line.
    """
    for number, line in lines(str(path)):
        cells = _cells(line)
        if cells and len(cells) != 3:
            raise DataError(
                f"{path}:{number}: the ids of a query, of a document that answers it and of one that does not are "
                f"needed, not {line[:60]!r}"
            )
        if cells:
            yield f"{path}:{number}", cells[0], cells[1], cells[2]


def read_run(path: Path) -> dict[str, list[str]]:
    """Query id -> the documents that a first retriever found for it.

    Args:
        path: lines of "query Q0 document rank score name" (TREC), "query document rank" (MS MARCO), or query id,
            document id, query and passage between tabs (top1000.dev). May be .gz.

    Raises:
        DataError: a malformed line, or a document twice for one query; names file and line.
    """
    found: dict[str, dict[str, None]] = {}
    for where, query, document in _run(path):
        documents = found.setdefault(query, {})
        if document in documents:
            raise DataError(f"{where}: document {document!r} occurs twice for query {query!r}")
        documents[document] = None
    return {query: list(documents) for query, documents in found.items()}


def _run(path: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in lines(str(path)):
        cells = _cells(line)
        if not cells:
            continue
        if len(cells) not in (3, 4, 6):
            raise DataError(
                f'{path}:{number}: "query Q0 document rank score name" (TREC) or "query document rank" (MS MARCO) is '
                f"needed, not {line[:60]!r}"
            )
        yield f"{path}:{number}", cells[0], cells[2 if len(cells) == 6 else 1]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def is_gain(number: float) -> bool:
    """Whether a task, which holds gains as float32, can hold it: not NaN, not infinite, nor 0 only there.

    Args:
        number: how relevant a document is, perhaps 0 or below.
    """
    return abs(number) <= _MOST and not 0 < number < _LEAST


def refuse_unknown_in_qrels(
    path: Path, queries: Collection[str], documents: Collection[str], of: Collection[str] | None = None
) -> None:
    """See that judgements above 0 name no query and no document that is not there.

    Args:
        path: of qrels.
        queries: ids that there are.
        documents: ids that there are.
        of: look at the judgements of these queries only; None: all.

    Raises:
        DataError: one does; names the line.
    """
    rows = ((where, query, document) for where, query, document, gain in judgements(path) if gain > 0)
    _refuse(rows if of is None else (row for row in rows if row[1] in of), queries, documents)


def refuse_unknown_in_run(path: Path, queries: Collection[str], documents: Collection[str]) -> None:
    """The same for a run.

    Args:
        path: of the run.
        queries: ids that there are.
        documents: ids that there are.

    Raises:
        DataError: it names others; names the line.
    """
    _refuse(_run(path), queries, documents)


def _refuse(rows: Iterable[tuple[str, str, str]], queries: Collection[str], documents: Collection[str]) -> None:
    for where, query, document in rows:
        for kind, key, known in (("query", query, queries), ("document", document, documents)):
            if key not in known:
                raise DataError(f"{where}: there is no {kind} {key!r} among the {kind} ids that were read")
