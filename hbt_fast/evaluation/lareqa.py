"""LAReQA-style folders (XQuAD-R, MLQA-R; arXiv 2004.05484): parallel questions, answered in every language."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from hbt_fast.data.reading import described, document, refuse_half_pairs
from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.tasks import RetrievalTask, offsets_and_members

_FORMAT = 'LAReQA files are SQuAD JSON with "sentences" and "sentence_breaks"'


def xquad_r(folder: str | Path, context: bool = False, languages: Sequence[str] | None = None) -> RetrievalTask:
    """XQuAD-R: 13,090 questions and 13,014 candidate sentences in 11 languages, 11 relevant sentences per question.

    Every question id must exist in every language that is loaded: a missing one is an error, since the parallel
    answers are what the task measures. Data with holes (MLQA-R) load with `mlqa_r`.

    Args:
        folder: holds one <language>.json per language (github.com/google-research-datasets/lareqa, folder xquad-r).
        context: append the paragraph to each candidate sentence (sentence first, so that truncation spares it).
        languages: load these only; None: every file in the folder.

    Raises:
        DataError: naming file, paragraph and question.
    """
    return _lareqa("xquad-r", Path(folder), context, languages, complete=True)


def mlqa_r(folder: str | Path, context: bool = False, languages: Sequence[str] | None = None) -> RetrievalTask:
    """MLQA-R, or any LAReQA-style folder whose questions exist in some of the languages only.

    The relevant candidates of a question are its answers in the languages that have its id; a language without it
    does not count for that question. Arguments and errors as in `xquad_r`.
    """
    return _lareqa("mlqa-r", Path(folder), context, languages, complete=False)


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
            for number, qa in enumerate(paragraph["qas"]):
                key = str(_field(f"{where}, question {number}", qa, "id", str | int, "text"))
                if key in questions[language]:
                    raise DataError(f"{where}: question id {key!r} occurs twice in this file")
                here = f"{where}, question {key!r}"
                questions[language][key] = _field(here, qa, "question", str, "text")
                answers.setdefault(key, {})[language] = first + _answer_sentence(qa, breaks, here)
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
    return RetrievalTask(
        name, queries, query_languages, query_ids, candidates, candidate_languages, *offsets_and_members(relevant)
    )


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
    """Yields (where, paragraph) with what SQuAD and LAReQA have of a paragraph, but for its questions, checked."""
    top = document(str(file))
    for a, article in enumerate(_field(f"{file}", top, "data", list, "a list")):
        for p, paragraph in enumerate(_field(f"{file}: article {a}", article, "paragraphs", list, "a list")):
            where = f"{file}: article {a}, paragraph {p}"
            _field(where, paragraph, "context", str, "text")
            _field(where, paragraph, "qas", list, "a list")
            sentences = _field(where, paragraph, "sentences", list, "a list of texts")
            breaks = _field(where, paragraph, "sentence_breaks", list, "a list of [begin, end]")
            for number, (sentence, ends) in enumerate(zip(sentences, breaks, strict=False)):
                pair = isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int) for end in ends)
                if not isinstance(sentence, str) or not pair:
                    raise DataError(f"{where}, sentence {number}: a text and its [begin, end] are needed; {_FORMAT}")
            refuse_half_pairs(paragraph, where)
            yield where, paragraph


def _field(where: str, record: Any, name: str, kind: type | UnionType, what: str) -> Any:
    """What a record of a file has under a name, seen to be of the kind that it must be."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object is needed, this is {described(record)}; {_FORMAT}")
    if not isinstance(record.get(name), kind):
        raise DataError(f'{where}: no "{name}" that is {what}; {_FORMAT}')
    return record[name]


def _answer_sentence(qa: dict[str, Any], breaks: list[list[int]], where: str) -> int:
    """The sentence in which the answer starts (an answer may run over its end; LAReQA goes by the start)."""
    answers = _field(where, qa, "answers", list, "a list")
    if not answers:
        raise DataError(f"{where} has no answer")
    start = _field(f"{where}, answer 0", answers[0], "answer_start", int, "a number")
    for number, (begin, end) in enumerate(breaks):
        if begin <= start < end:
            return number
    raise DataError(f"{where}: its answer starts at {start}, which is in no sentence")
