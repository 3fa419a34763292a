"""SQuAD and its translations: questions with the sentence (or paragraph) that answers them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Problems, Source, expand
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
    if source.path and source.path.split("::")[0].removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        from hbt_fast.data.formats import read_jsonl

        yield from read_jsonl(source, problems)
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
            if folded(paragraph["context"]) in texts:
                continue
            spans = paragraph.get("sentence_breaks") or (
                sentences(paragraph["context"]) if source.passage == "sentence" else []
            )
            for qa in paragraph["qas"]:
                if str(qa.get("id")) in ids:
                    continue
                found = _question(
                    qa, paragraph["context"], spans, source, f"{where}, question {qa.get('id')!r}", problems
                )
                if found is None:
                    continue
                if not source.files:
                    yield Row(
                        {language: found[0]}, {language: found[1]}, {}, None, f"{where}, question {qa.get('id')!r}"
                    )
                    continue
                queries, passages, _ = joined.setdefault(str(qa["id"]), ({}, {}, f"{where}, question {qa['id']!r}"))
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
    answers = record.get("answers") or {}
    if isinstance(answers, dict):
        starts = answers.get("answer_start") or answers.get("answer_begin_position") or []
        answers = [
            {"text": text, "answer_start": at} for text, at in zip(answers.get("text") or [], starts, strict=False)
        ]
    context, qa = record.get("context"), {**record, "answers": answers}
    if not isinstance(context, str):
        problems.report(where, f"no text 'context'; the fields are {', '.join(record)}")
        return None
    found = _question(qa, context, sentences(context) if source.passage == "sentence" else [], source, where, problems)
    return None if found is None else Row({language: found[0]}, {language: found[1]}, {}, None, where)


def _question(
    qa: dict[str, Any], context: str, spans: list, source: Source, where: str, problems: Problems
) -> tuple[str, str] | None:
    """(question, passage), or None where there is no answer to go by."""
    question, answers = qa.get("question"), qa.get("answers") or []
    if not isinstance(question, str) or not question.strip():
        problems.report(where, "no text 'question'")
        return None
    if qa.get("is_impossible") or not answers:
        return None
    if source.passage == "paragraph":
        return question, context
    if qa.get("answer_occurrences", 1) > 1:
        return None  # the offset is that of the first occurrence, and the sentence perhaps another
    start = answers[0].get("answer_start")
    for begin, end in spans:
        if isinstance(start, int) and begin <= start < end:
            return question, context[begin:end]
    problems.report(
        where, f"answer_start is {start!r}, which is in no sentence of its paragraph of {len(context)} characters"
    )
    return None


def _excluded(paths: list[str]) -> tuple[set[str], set[str]]:
    """Question ids and folded texts of the paragraphs to leave out."""
    ids, texts = set(), set()
    for path in paths:
        for _, paragraph in paragraphs(path):
            ids |= {str(qa["id"]) for qa in paragraph["qas"]}
            texts.add(folded(paragraph["context"]))
    return ids, texts


def paragraphs(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file: article title, paragraph n", paragraph) of SQuAD JSON files.

    Raises:
        DataError: not JSON, or not SQuAD.
    """
    import fsspec

    for name in expand(path):
        if not name.removesuffix(".gz").endswith(".json"):
            continue
        try:
            with fsspec.open(name, "rt", encoding="utf-8", compression="infer") as file:
                document = json.load(file)
        except json.JSONDecodeError as error:
            hint = "an empty file" if not error.doc.strip() else f"not JSON: {error.msg}"
            raise DataError(f"{name}:{error.lineno}: {hint}") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: not UTF-8 (byte {error.start}); convert it, for instance: iconv -f latin1 -t utf-8"
            ) from None
        if not isinstance(document, dict) or not isinstance(document.get("data"), list):
            raise DataError(f'{name}: not SQuAD JSON; it must be {{"data": [{{"paragraphs": [...]}}]}}')
        for article, entry in enumerate(document["data"]):
            if not isinstance(entry, dict) or not all(isinstance(p, dict) for p in entry.get("paragraphs") or []):
                raise DataError(f"{name}: article {article}: not an object with a list 'paragraphs' of objects")
            for number, paragraph in enumerate(entry.get("paragraphs") or []):
                where = f"{name}: article {entry.get('title') or article}, paragraph {number}"
                if not isinstance(paragraph.get("context"), str) or not isinstance(paragraph.get("qas"), list):
                    raise DataError(f"{where}: needs a text 'context' and a list 'qas'; it has {', '.join(paragraph)}")
                yield where, paragraph
