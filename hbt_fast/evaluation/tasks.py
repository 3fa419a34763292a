"""Retrieval tasks: questions, one pool of candidates in all languages, and which candidates answer which question.

Two sources: LAReQA-style folders (XQuAD-R, MLQA-R; arXiv 2004.05484) and any iterable of `Row`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbt_fast.data.rows import DataError, Row


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """Questions and candidates of all languages, with the relevant candidates of each question.

    Translations of one question have equal `query_ids` and the same relevant candidates: its answers in every language.

    Args:
        name: shown in reports.
        queries: N question texts.
        query_languages: N language codes.
        query_ids: N ids; parallel questions share one.
        candidates: M passage texts; their order decides ties (see `ranks`).
        candidate_languages: M language codes.
        offsets: (N + 1,) int64. The relevant candidates of query i are ``relevant[offsets[i]:offsets[i + 1]]``.
        relevant: (R,) int64 candidate indices, ascending and without repeats within a query.

    Raises:
        DataError: lengths that do not match, a query without a relevant candidate, an index outside the candidates.
    """

    name: str
    queries: list[str]
    query_languages: list[str]
    query_ids: list[str]
    candidates: list[str]
    candidate_languages: list[str]
    offsets: np.ndarray
    relevant: np.ndarray

    def __post_init__(self) -> None:
        n, m = len(self.queries), len(self.candidates)
        if n == 0 or m == 0:
            raise DataError(f"{self.name}: {n} queries and {m} candidates; at least one of each is needed")
        if len(self.query_languages) != n or len(self.query_ids) != n or len(self.candidate_languages) != m:
            raise DataError(
                f"{self.name}: {n} queries with {len(self.query_languages)} languages and {len(self.query_ids)} ids, "
                f"{m} candidates with {len(self.candidate_languages)} languages; one of each per text is needed"
            )
        offsets, relevant = self.offsets, self.relevant
        if offsets.shape != (n + 1,) or offsets[0] != 0 or offsets[-1] != len(relevant):
            raise DataError(f"{self.name}: offsets must run from 0 to len(relevant) = {len(relevant)} in {n + 1} steps")
        empty = np.flatnonzero(np.diff(offsets) < 1)
        if len(empty):
            raise DataError(f"{self.name}: query {self.query_ids[empty[0]]!r} has no relevant candidate")
        if relevant.min() < 0 or relevant.max() >= m:
            raise DataError(f"{self.name}: relevant candidates must lie in 0 .. {m - 1}")
        starts_query = np.zeros(len(relevant), dtype=bool)
        starts_query[offsets[:-1]] = True
        out_of_order = np.flatnonzero((np.diff(relevant) <= 0) & ~starts_query[1:])
        if len(out_of_order):
            query = int(np.searchsorted(offsets, out_of_order[0], side="right")) - 1
            raise DataError(
                f"{self.name}: the relevant candidates of query {self.query_ids[query]!r} repeat or do not ascend"
            )

    @property
    def languages(self) -> list[str]:
        """Languages of queries and candidates, sorted: the rows and columns of every table."""
        return sorted(set(self.query_languages) | set(self.candidate_languages))


def xquad_r(folder: str | Path, context: bool = False, languages: Sequence[str] | None = None) -> RetrievalTask:
    """XQuAD-R: 13,090 questions and 13,014 candidate sentences in 11 languages, 11 relevant sentences per question.

    Every question id must exist in every language that is loaded: a missing one is an error, since the parallel
    answers are what the task measures. Data with holes (MLQA-R) load with `mlqa_r`.

    Args:
        folder: holds one <language>.json per language (github.com/google-research-datasets/lareqa, folder xquad-r).
        context: append the paragraph to each candidate sentence (sentence first, so that truncation spares it).
        languages: load these only; None: every file in the folder.

    Raises:
        DataError: naming file and question.
    """
    return _lareqa("xquad-r", Path(folder), context, languages, complete=True)


def mlqa_r(folder: str | Path, context: bool = False, languages: Sequence[str] | None = None) -> RetrievalTask:
    """MLQA-R, or any LAReQA-style folder whose questions exist in some of the languages only.

    The relevant candidates of a question are its answers in the languages that have its id; a language without it
    does not count for that question. Arguments and errors as in `xquad_r`.
    """
    return _lareqa("mlqa-r", Path(folder), context, languages, complete=False)


def task_from_rows(name: str, rows: Iterable[Row]) -> RetrievalTask:
    """A task from n-way rows, for instance a held-out part of the training data.

    Every (row, language) with a query becomes a query. Candidates are the passages, one per (language, content, text)
    so that questions on one passage share a candidate; rows without a content id share candidates of equal text.
    Relevant are the passages of the query's own row, in every language that has one. Hard negatives are not used.

    Raises:
        DataError: no rows, or a row without passages (named by its `where`).
    """
    queries, query_languages, query_ids, relevant = [], [], [], []
    index: dict[tuple[str, str | None, str], int] = {}
    for number, row in enumerate(rows):
        if not row.passages:
            raise DataError(f"{row.where or f'row {number}'}: no passage, so nothing can be relevant to its query")
        own = [index.setdefault((lang, row.content, text), len(index)) for lang, text in row.passages.items()]
        for language, text in row.queries.items():
            queries.append(text)
            query_languages.append(language)
            query_ids.append(str(number))
            relevant.append(own)
    if not queries:
        raise DataError(f"{name}: no row has a query")
    return RetrievalTask(
        name, queries, query_languages, query_ids, [key[2] for key in index], [key[0] for key in index], *_csr(relevant)
    )


def _csr(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in lists], out=offsets[1:])
    return offsets, np.fromiter((i for part in lists for i in sorted(part)), dtype=np.int64, count=offsets[-1])


def _lareqa(
    name: str, folder: Path, context: bool, languages: Sequence[str] | None, *, complete: bool
) -> RetrievalTask:
    files = _language_files(folder, languages)
    candidates, candidate_languages = [], []
    questions: dict[str, dict[str, str]] = {}  # language -> question id -> text
    answers: dict[str, dict[str, int]] = {}  # question id -> language -> candidate
    for language, file in files.items():
        questions[language] = {}
        for where, paragraph in _paragraphs(file):
            first = len(candidates)
            sentences, breaks, text = paragraph["sentences"], paragraph["sentence_breaks"], paragraph["context"]
            if len(sentences) != len(breaks):
                raise DataError(f"{where}: {len(sentences)} sentences but {len(breaks)} sentence_breaks")
            # Equal sentences stay separate candidates, as in LAReQA: only so does XQuAD-R have its 13,014.
            candidates += [f"{sentence}\n{text}" if context else sentence for sentence in sentences]
            candidate_languages += [language] * len(sentences)
            for qa in paragraph["qas"]:
                if qa["id"] in questions[language]:
                    raise DataError(f"{where}: question id {qa['id']!r} occurs twice in this file")
                questions[language][qa["id"]] = qa["question"]
                answers.setdefault(qa["id"], {})[language] = first + _answer_sentence(qa, breaks, where)
        if not questions[language]:
            raise DataError(f"{file}: no questions in it")
    if complete:
        for language, file in files.items():
            missing = [question for question in answers if question not in questions[language]]
            if missing:
                raise DataError(
                    f"{file}: question id {missing[0]!r} is missing ({len(missing)} missing in all), which other "
                    "languages have; every language needs its answer. For data with holes take the task mlqa-r."
                )
    queries, query_languages, query_ids, relevant = [], [], [], []
    for language, texts in questions.items():
        queries += texts.values()
        query_ids += texts
        query_languages += [language] * len(texts)
        relevant += [list(answers[question].values()) for question in texts]
    return RetrievalTask(name, queries, query_languages, query_ids, candidates, candidate_languages, *_csr(relevant))


def _language_files(folder: Path, languages: Sequence[str] | None) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold one <language>.json per language, as en.json")
    files = {file.stem: file for file in sorted(folder.glob("*.json"))}
    if not files:
        raise DataError(f"{folder}: no .json file in it; one <language>.json per language is needed, as en.json")
    if languages is None:
        return files
    unknown = [language for language in languages if language not in files]
    if unknown or not languages:
        raise DataError(f"{folder}: no file for languages {unknown or 'none given'}; there are {', '.join(files)}")
    return {language: files[language] for language in files if language in languages}


def _paragraphs(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yields (where, paragraph) with the keys that LAReQA adds to SQuAD checked."""
    try:
        articles = json.loads(file.read_text(encoding="utf-8"))["data"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    except (KeyError, TypeError) as error:
        raise DataError(f'{file}: not SQuAD JSON, the top level needs a "data" list') from error
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(article.get("paragraphs", [])):
            where = f"{file}: article {a}, paragraph {p}"
            for key in ("context", "qas", "sentences", "sentence_breaks"):
                if key not in paragraph:
                    raise DataError(
                        f'{where}: no "{key}"; LAReQA files are SQuAD JSON with "sentences" and "sentence_breaks"'
                    )
            yield where, paragraph


def _answer_sentence(qa: dict[str, Any], breaks: list[list[int]], where: str) -> int:
    """The sentence in which the answer starts (an answer may run over its end; LAReQA goes by the start)."""
    if not qa.get("answers"):
        raise DataError(f"{where}: question {qa['id']!r} has no answer")
    start = qa["answers"][0]["answer_start"]
    for number, (begin, end) in enumerate(breaks):
        if begin <= start < end:
            return number
    raise DataError(f"{where}: the answer of question {qa['id']!r} starts at {start}, which is in no sentence")
