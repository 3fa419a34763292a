"""An own task as JSON Lines, in the plainest way.

Questions with the passage that answers them, as in training data; the passages of all lines are the candidates:

    {"query": "Who wrote Faust?", "passage": "Goethe wrote ...", "language": "en"}

Or, where passages answer several questions, or none, lines of both kinds in any order, in one file or several:

    {"passage": "Goethe wrote ...", "id": "p1", "language": "en"}
    {"query": "Wer schrieb Faust?", "id": "q1", "language": "de", "relevant": ["p1"]}
    {"query": "Who wrote Faust?", "id": "q1", "language": "en", "relevant": {"p1": 2, "p7": 1}}

Questions of one id are translations of each other. Lines whose query has equal text in one language are one question:
what is relevant to one is relevant to all, and of those without an id there is one query. Gains (graded relevance) of 0
and below are not relevant.
"query_language" and "passage_language" go before "language", as in training data. Languages are codes of ISO 639 or
BCP 47, of which case and spelling do not count: "EN" and "eng" are "en".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hbt_fast.data.collection_files import UNKNOWN, chosen
from hbt_fast.data.formats import read_jsonl
from hbt_fast.data.judgements import is_gain
from hbt_fast.data.languages import standard
from hbt_fast.data.problems import Strict
from hbt_fast.data.reading import described, records, refuse_half_pairs
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, expand
from hbt_fast.data.tokenise import folded
from hbt_fast.evaluation.tasks import RetrievalTask, offsets_and_members, refuse_empty, task_from_rows, united


class _Query(NamedTuple):
    where: str
    text: str
    language: str
    id: str
    gains: dict[str, float]
    named: bool  # in the file, rather than by its line


def jsonl(path: str | Path, languages: Sequence[str] | None = None, name: str | None = None) -> RetrievalTask:
    """The task of a file, a folder of files, a glob, or a member of an archive as zip://MEMBER::ARCHIVE; .gz is read.

    Args:
        path: of it. N-way training data ("query": {"en": .., "de": ..}) do too.
        languages: keep only texts in these; None: all.
        name: shown in reports; None: the file's (or member's) name.

    Raises:
        DataError: names file and line, or the languages that there are.
    """
    files = expand(str(path))
    languages = None if languages is None else [standard(code) for code in languages]
    name = name or Path(str(path).partition("::")[0]).resolve().name
    first = next(records(files[0], Strict()), ("", {}))[1]
    if isinstance(first.get("query"), dict):
        rows = list(read_jsonl(Source(path=str(path), format="jsonl"), Strict()))
        for n, row in enumerate(rows):
            refuse_half_pairs([row.queries, row.passages], row.where)
            rows[n] = replace(row, queries=_by_code(row.queries, row.where), passages=_by_code(row.passages, row.where))
        _check_languages(path, languages, {code for row in rows for code in (*row.queries, *row.passages)})
        return task_from_rows(name, _in_languages(rows, languages))
    here = Path(path).expanduser()
    passages, queries = _read(files, here if here.is_dir() else None)
    if not passages:
        raise DataError(f'{path}: no line has a "passage", so there is nothing to find')
    there = {language for _, language in passages.values()} | {query.language for query in queries}
    _check_languages(path, languages, there)
    return _task(name, passages, queries, languages)


def _by_code(texts: dict[str, str], where: str) -> dict[str, str]:
    """Texts by standard code."""
    made = {}
    for code, text in texts.items():
        language = _code(code, where)
        if made.setdefault(language, text) != text:
            raise DataError(f"{where}: two texts of language {language!r}; leave one out")
    return made


def _code(code: str, where: str) -> str:
    try:
        return standard(code)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _check_languages(path: str | Path, languages: Sequence[str] | None, there: Iterable[str]) -> None:
    """Languages that are there in texts of one side alone are there: a query may have its answers in others."""
    chosen(path, dict.fromkeys(there), languages)


def _in_languages(rows: Iterable[Row], languages: Sequence[str] | None) -> Iterator[Row]:
    for row in rows:
        sides = [
            {code: text for code, text in side.items() if languages is None or code in languages}
            for side in (row.queries, row.passages)
        ]
        if all(sides):
            yield Row(*sides, content=row.content, where=row.where)


def _read(files: Sequence[str], folder: Path | None) -> tuple[dict[str, tuple[str, str]], list[_Query]]:
    """Passages: id -> text and language; and the queries. A query without an id is called by its file and line."""
    passages, queries, seen = {}, [], set()
    for where, record in (pair for file in files for pair in records(file, Strict())):
        refuse_half_pairs(record, where)
        there = [kind for kind in ("query", "passage") if kind in record]
        codes = {kind: record.get(f"{kind}_language") or record.get("language") or UNKNOWN for kind in there}
        if not there or not all(isinstance(text, str) for kind in there for text in (record[kind], codes[kind])):
            raise DataError(
                f'{where}: a line has a "query" or a "passage" or both, and a "language", all text; the fields are '
                f"{', '.join(record) or 'none'}"
            )
        for kind in there:
            codes[kind] = UNKNOWN if codes[kind] == UNKNOWN else _code(codes[kind], where)
            refuse_empty(record[kind], codes[kind], where)
        key, language = record.get("id"), codes.get("query")
        if there == ["passage"]:
            if not isinstance(key, str | int) or isinstance(key, bool) or str(key) in passages:
                raise DataError(f'{where}: a passage needs an "id" of its own, not {key!r}')
            passages[str(key)] = record["passage"], codes["passage"]
            continue
        if not (named := key is not None):  # equal wherever the data lie, and no other query's
            key = Path(where).name if folder is None else Path(where).relative_to(folder).as_posix()
        if not isinstance(key, str | int | float):
            raise DataError(f'{where}: "id" is {described(key)}; a text or a number is needed')
        key = str(key)
        if (key, language) in seen:
            raise DataError(f"{where}: another query before has the id {key!r}; only translations share one")
        seen.add((key, language))
        if len(there) == 2:
            answer = f"{codes['passage']}\t{record['passage']}"  # equal texts are one candidate
            passages[answer] = record["passage"], codes["passage"]
        gains = {answer: 1.0} if len(there) == 2 else _gains(record, where)
        queries.append(_Query(where, record["query"], language, key, gains, named))
    return passages, queries


def _gains(record: dict[str, Any], where: str) -> dict[str, float]:
    relevant = record.get("relevant")
    if isinstance(relevant, list):
        relevant = dict.fromkeys(relevant, 1) if all(isinstance(key, str | int) for key in relevant) else None
    if not isinstance(relevant, dict) or not all(isinstance(gain, int | float) for gain in relevant.values()):
        raise DataError(f'{where}: a query needs "relevant", a list of ids of passages, or {{id: gain}}')
    bad = next((gain for gain in relevant.values() if not is_gain(gain)), None)
    if bad is not None:
        raise DataError(f"{where}: {bad} is no gain; write a number that 32 bits hold, or 0 for what is not relevant")
    return {str(key): gain for key, gain in relevant.items() if gain > 0}


def _one_question(queries: list[_Query]) -> list[_Query]:
    """The queries, of repeated ones without an id the first; each with all that is relevant to its question."""
    groups = united([[(query.language, folded(query.text))] for query in queries])
    gains: dict[int, dict[str, float]] = {}
    for query, group in zip(queries, groups, strict=True):
        own = gains.setdefault(group, {})
        for key, gain in query.gains.items():
            own[key] = max(gain, own.get(key, gain))
    kept: dict[tuple, _Query] = {}
    for query, group in zip(queries, groups, strict=True):
        key = (query.language, query.id) if query.named else (query.language, folded(query.text))
        kept.setdefault(key, query._replace(gains=gains[group]))
    return list(kept.values())


def _task(
    name: str, passages: dict[str, tuple[str, str]], queries: list[_Query], languages: Sequence[str] | None
) -> RetrievalTask:
    for query in queries:
        unknown = [key for key in query.gains if key not in passages]
        if unknown:
            raise DataError(f"{query.where}: no passage has the id {unknown[0]!r}; add it, or leave it out of relevant")
    keys = [key for key, (_, language) in passages.items() if languages is None or language in languages]
    index = {key: i for i, key in enumerate(keys)}
    queries = _one_question(queries)
    wanted = [query for query in queries if languages is None or query.language in languages]
    found = [sorted((index[key], gain) for key, gain in query.gains.items() if key in index) for query in wanted]
    kept = [(query, pairs) for query, pairs in zip(wanted, found, strict=True) if pairs]
    if not kept:
        raise DataError(f"{name}: none of {len(wanted):,} queries has a relevant passage")
    gains = np.array([gain for _, pairs in kept for _, gain in pairs], np.float32)
    return RetrievalTask(
        name,
        [query.text for query, _ in kept],
        [query.language for query, _ in kept],
        [query.id for query, _ in kept],
        [passages[key][0] for key in keys],
        [passages[key][1] for key in keys],
        *offsets_and_members([[i for i, _ in pairs] for _, pairs in kept]),
        gains=None if (gains == 1).all() else gains,
        candidate_ids=keys,
        left_out=len(wanted) - len(kept),
    )
