"""SQuAD and its translations: questions with the sentence (or paragraph) that answers them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hbt_fast.data.containers import ending
from hbt_fast.data.problems import EXCLUDED, NO_ANSWER, Problems
from hbt_fast.data.reading import described, document
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, expand
from hbt_fast.data.store import folded

# a terminator with closing quotes or brackets, then white space and no small letter; CJK ones need no white space
BOUNDARY = re.compile(r"(?:[.!?؟।॥…]+[\"'”’»)\]]*\s+(?![a-zà-ÿа-я])|[。！？｡]+[」』”’）]*|\n+)")
NO_TERMINATORS = re.compile(
    r"[\u0E00-\u0EFF\u1780-\u17FF\u1000-\u109F]"
)  # Thai, Lao, Khmer, Burmese: spaces end phrases
PIECE = 150  # characters: about a sentence in those scripts


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text are, as (begin, end) offsets, white space around them left out.

    By terminators of Latin, Cyrillic, Greek, Arabic, Devanagari and CJK scripts; abbreviations followed by a capital
    do split. In scripts without terminators (Thai, Lao, Khmer, Burmese) phrases between spaces are joined up to about
    150 characters.
    """
    edges = [0, *(m.end() for m in BOUNDARY.finditer(text)), len(text)]
    spans = []
    for begin, end in pairwise(edges):
        if end - begin > PIECE and NO_TERMINATORS.search(text, begin, end):
            for space in re.finditer(r"\s+", text[begin:end]):
                at = edges[0] if not spans else spans[-1][1]
                at = max(at, begin)
                if begin + space.end() - at >= PIECE:
                    spans.append((at, begin + space.end()))
            begin = max(begin, spans[-1][1] if spans else begin)
        if end > begin:
            spans.append((begin, end))
    trimmed = []
    for begin, end in spans:
        piece = text[begin:end]
        if piece.strip():
            trimmed.append((begin + len(piece) - len(piece.lstrip()), begin + len(piece.rstrip())))
    return trimmed


def read(source: Source, problems: Problems) -> Iterator[Row]:
    """The rows of a SQuAD source: one per question, or one per question id over several languages."""
    if source.path and ending(source.path) in (".jsonl", ".ndjson"):
        from hbt_fast.data.formats import read_records

        yield from read_records(source, problems)
        return
    files = source.files or {source.language: source.path}
    if None in files:
        raise DataError(f"{source.path}: SQuAD files do not say their language; set the source's language")
    ids, texts = _excluded(source.exclude_paragraphs_of)
    if ids:  # a paragraph that is out in one language is out in all
        for path in files.values():
            for _, paragraph in paragraphs(path):
                own = {str(qa.get("id")) for qa in paragraph["qas"]}
                if own & ids or folded(paragraph["context"]) in texts:
                    ids |= own
    joined: dict[str, tuple[dict[str, str], dict[str, str], str]] = {}
    for language, path in files.items():
        for where, paragraph in paragraphs(path):
            excluded = folded(paragraph["context"]) in texts
            spans = paragraph.get("sentence_breaks") or (
                sentences(paragraph["context"]) if source.passage == "sentence" else []
            )
            for qa in paragraph["qas"]:
                if excluded or str(qa.get("id")) in ids:
                    problems.tally.leave_out(EXCLUDED, language, not source.files)
                    continue
                here = f"{where}, question {qa.get('id')!r}"
                found = _question(qa, paragraph["context"], spans, source, language, here, problems)
                if found is None:
                    continue
                if not source.files:
                    yield Row({language: found[0]}, {language: found[1]}, {}, None, here)
                    continue
                if not isinstance(qa.get("id"), str | int):
                    problems.report(here, "an id is needed: it joins the languages' questions")
                    continue
                queries, passages, _ = joined.setdefault(str(qa["id"]), ({}, {}, here))
                queries.setdefault(language, found[0])
                passages.setdefault(language, found[1])
    for queries, passages, where in joined.values():
        yield Row(queries, passages, {}, None, where)


def row_of_record(record: dict[str, Any], source: Source, where: str, problems: Problems) -> Row | None:
    """The row of a SQuAD-like record of JSON Lines: context, question, answers {text: [...], answer_start: [...]}."""
    language = source.language or record.get("language")
    if not language:
        problems.report(where, "no language; set the source's language")
        return None
    if not isinstance(language, str):
        problems.report(where, f"'language' is {described(language)}; a language code is needed, as 'en'")
        return None
    context, answers = record.get("context"), record.get("answers") or []
    if isinstance(answers, dict):
        found, starts = answers.get("text"), answers.get("answer_start") or answers.get("answer_begin_position")
        lists = [found or [], starts or []]
        answers = next((part for part in lists if not isinstance(part, list)), None) or [
            {"text": text, "answer_start": at} for text, at in zip(*lists, strict=False)
        ]
    if not isinstance(context, str):
        there = f"'context' is {described(context)}; the fields are {', '.join(record)}"
        problems.report(where, f"a text 'context' is needed: {there}")
        return None
    spans = sentences(context) if source.passage == "sentence" else []
    found = _question({**record, "answers": answers}, context, spans, source, language, where, problems)
    return None if found is None else Row({language: found[0]}, {language: found[1]}, {}, None, where)


def _question(
    qa: dict[str, Any], context: str, spans: list, source: Source, language: str, where: str, problems: Problems
) -> tuple[str, str] | None:
    """(question, passage), or None where there is no answer to go by."""
    question, answers = qa.get("question"), qa.get("answers") or []
    if not isinstance(question, str) or not question.strip():
        problems.report(where, f"a text 'question' is needed, it is {described(question)}")
        return None
    if not isinstance(answers, list):
        problems.report(where, f"'answers' must be a list of {{'answer_start': ...}}, it is {described(answers)}")
        return None
    times = qa.get("answer_occurrences")
    if qa.get("is_impossible") or not answers:
        problems.tally.leave_out(NO_ANSWER, language, not source.files)
        return None
    if source.passage == "paragraph":
        return question, context
    if isinstance(times, int | float) and times > 1:  # the offset is that of the first one
        problems.tally.leave_out(NO_ANSWER, language, not source.files)
        return None
    start = answers[0].get("answer_start") if isinstance(answers[0], dict) else answers[0]
    for begin, end in spans:
        if isinstance(start, int) and begin <= start < end:
            return question, context[begin:end]
    problems.report(
        where,
        f"answer_start is {described(start)}, which is in no sentence of its paragraph of {len(context)} characters",
    )
    return None


def _excluded(paths: list[str]) -> tuple[set[str], set[str]]:
    """Question ids and folded texts of the paragraphs to leave out."""
    ids, texts = set(), set()
    for path in paths:
        for _, paragraph in paragraphs(path):
            ids |= {str(qa["id"]) for qa in paragraph["qas"] if qa.get("id") is not None}
            texts.add(folded(paragraph["context"]))
    return ids, texts


def paragraphs(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: article title, paragraph n", paragraph) of SQuAD JSON files, seen to have what a paragraph has.

    Raises:
        DataError: not JSON, or not SQuAD.
    """
    names = expand(path)
    for name in names:
        if len(names) > 1 and ending(name) != ".json":
            continue  # of a folder: what lies beside the data
        found = document(name)
        if not isinstance(found, dict) or not isinstance(found.get("data"), list):
            raise DataError(f'{name}: not SQuAD JSON; it must be {{"data": [{{"paragraphs": [...]}}]}}')
        for article, entry in enumerate(found["data"]):
            several = (entry.get("paragraphs") or []) if isinstance(entry, dict) else None
            if not isinstance(several, list) or not all(isinstance(p, dict) for p in several):
                raise DataError(f"{name}: article {article}: not an object with a list 'paragraphs' of objects")
            for number, paragraph in enumerate(several):
                where = f"{name}: article {entry.get('title') or article}, paragraph {number}"
                _check(paragraph, where)
                yield where, paragraph


def _check(paragraph: dict[str, Any], where: str) -> None:
    if not isinstance(paragraph.get("context"), str) or not isinstance(paragraph.get("qas"), list):
        raise DataError(f"{where}: needs a text 'context' and a list 'qas'; it has {', '.join(paragraph)}")
    if not all(isinstance(qa, dict) for qa in paragraph["qas"]):
        raise DataError(f"{where}: its 'qas' must be objects")
    breaks = paragraph.get("sentence_breaks") or []
    if not isinstance(breaks, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(at, int) for at in pair) for pair in breaks
    ):
        raise DataError(f"{where}: its 'sentence_breaks' must be a list of [begin, end]")
