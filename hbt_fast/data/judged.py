"""Retrieval collections as training data: BEIR, MIRACL, Mr. TyDi, mMARCO, and those of ir_datasets.

Every judgement above 0 is a row; documents that were judged 0 or below for a query are its hard negatives, and so are
those that triples name. Of the corpus only documents that are named are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hbt_fast.data.collection_files import (
    UNKNOWN,
    files_by_kind,
    files_of,
    is_of,
    kind_of_file,
    language_folders,
    of_split,
    parallel_collections,
    queries_of_split,
)
from hbt_fast.data.judgements import judgements, read_texts, triples
from hbt_fast.data.languages import is_language, normalise
from hbt_fast.data.problems import Problems
from hbt_fast.data.rows import DataError, Row

if TYPE_CHECKING:
    from hbt_fast.data.sources import Source

Judged = dict[
    str, tuple[dict[str, str], dict[str, str]]
]  # query -> document -> "file:line", of positives, of negatives
Texts = dict[str, dict[str, str]]  # language -> id -> text


def read_folder(source: Source, problems: Problems) -> Iterator[Row]:
    """The rows of a folder; its layouts are those of `hbt_fast.data.collection_files`."""
    folder = Path(source.path or "").expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold corpus, queries and qrels, or a folder per language")
    files, named = parallel_collections(folder)
    if named:
        yield from _parallel(folder, files, named, source, problems)
        return
    for code, folders in language_folders(folder, None).items():
        language = source.language or code if folders == [folder] else code
        if language == UNKNOWN:
            raise DataError(f"{folder}: no language; set the source's language")
        if problems.wants(language):
            found = files_by_kind(folders)
            judged, split = _judged(found["qrels"], found["triples"], source.split, folders[0])
            queries = read_texts([queries_of_split(found["queries"], split, folders[0])], judged)
            documents = read_texts(found["corpus"], _named(judged.values()))
            yield from _rows(judged, {language: queries}, {language: documents}, f"{language}:", problems)


def _parallel(
    folder: Path, files: list[Path], named: dict[str, str], source: Source, problems: Problems
) -> Iterator[Row]:
    """The rows of a collection whose documents and queries are translated: each in all languages that are wanted."""
    of_all = {
        kind: [path for path in files if kind_of_file(path.relative_to(folder)) == kind]
        for kind in ("qrels", "triples")
    }
    judged, split = _judged(of_all["qrels"], of_all["triples"], source.split, folder)
    documents_named, queries, documents = _named(judged.values()), {}, {}
    for code, word in named.items():
        if problems.wants(code):
            of_language = files_of(files, word)
            queries[code] = read_texts([queries_of_split(of_language["queries"], split, folder)], judged)
            documents[code] = read_texts(of_language["corpus"], documents_named)
    yield from _rows(judged, queries, documents, "", problems)


def _judged(qrels: list[Path], of_triples: list[Path], split: str, folder: Path) -> tuple[Judged, str]:
    """What is judged of a split, by its qrels, else by its triples; and the split's name."""
    by_qrels = not any(is_of(split, path) for path in of_triples) or any(is_of(split, path) for path in qrels)
    path, split = of_split(qrels if by_qrels else of_triples, split, "qrels", folder)
    judged: Judged = {}
    if by_qrels:
        for where, query, document, gain in judgements(path):
            judged.setdefault(query, ({}, {}))[gain <= 0].setdefault(document, where)
    else:
        known: dict[str, str] = {}  # one object for each id: there may be tens of millions of lines
        for where, query, positive, negative in triples(path):
            positives, negatives = judged.setdefault(query, ({}, {}))
            positives.setdefault(known.setdefault(positive, positive), where)
            negatives.setdefault(known.setdefault(negative, negative), "")
    return judged, split


def _named(judged: Iterable[tuple[dict[str, str], dict[str, str]]]) -> set[str]:
    """The documents that a row will have."""
    return {document for positives, negatives in judged if positives for document in (*positives, *negatives)}


def _rows(judged: Judged, queries: Texts, documents: Texts, prefix: str, problems: Problems) -> Iterator[Row]:
    """A row for each positive document of each query, in every language that has both.

    Args:
        judged: what is judged.
        queries: texts of queries.
        documents: texts of documents.
        prefix: of the content ids.
        problems: told of queries and documents that are not there.
    """
    for query, (positives, negatives) in judged.items():
        asked = {code: texts[query] for code, texts in queries.items() if query in texts}
        for document, where in positives.items():
            found = {code: texts[document] for code, texts in documents.items() if document in texts}
            if not asked or not found:
                kind, key = ("document", document) if asked else ("query", query)
                problems.report(where, f"there is no {kind} {key!r} among the {kind} ids that were read")
                continue
            hard = {code: tuple(documents[code][d] for d in negatives if d in documents[code]) for code in found}
            yield Row(asked, found, {code: own for code, own in hard.items() if own}, f"{prefix}{document}", where)


def read_named(source: Source, problems: Problems) -> Iterator[Row]:
    """The rows of a data set of ir_datasets, by its name."""
    try:
        import ir_datasets
    except ImportError:
        raise DataError(
            f'format ir_datasets needs the package of this name: pip install "hbt-fast[ir-datasets]", then read '
            f"{source.path}"
        ) from None
    name = str(source.path)
    try:
        data = ir_datasets.load(name)
    except KeyError:
        raise DataError(f"{name}: ir_datasets has no data set of this name; its catalogue lists them") from None
    language = source.language or (data.queries_lang() if data.has_queries() else None)
    if language is None:
        raise DataError(f"{name}: ir_datasets does not say its language; set the source's language")
    if not (data.has_queries() and data.has_docs() and (data.has_qrels() or data.has_docpairs())):
        raise DataError(
            f"{name}: it has no queries, documents, or judgements of them; name a part that has, as .../train"
        )
    judged: Judged = {}
    if data.has_qrels():
        for one in data.qrels_iter():
            where = f"{name}: query {one.query_id}, document {one.doc_id}"
            judged.setdefault(one.query_id, ({}, {}))[one.relevance <= 0].setdefault(one.doc_id, where)
    else:
        for one in data.docpairs_iter():
            where = f"{name}: query {one.query_id}, document {one.doc_id_a}"
            positives, negatives = judged.setdefault(one.query_id, ({}, {}))
            positives.setdefault(one.doc_id_a, where)
            negatives.setdefault(one.doc_id_b, where)
    queries = {one.query_id: one.default_text() for one in data.queries_iter() if one.query_id in judged}
    documents = {key: doc.default_text() for key, doc in data.docs_store().get_many(_named(judged.values())).items()}
    code = normalise(language) if is_language(language) else language
    yield from _rows(judged, {code: queries}, {code: documents}, "", problems)
