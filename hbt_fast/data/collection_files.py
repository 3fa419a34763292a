"""Which file of a folder is what: corpus, queries, qrels, run; of which language and of which split.

Names decide, of a file or of the folder that it is in: ``corpus*``, ``docs*`` or ``collection*``; ``queries*`` or
``topic*``; ``qrels*``; ``run*`` or ``top1000*``; ``triples*``. So BEIR, MIRACL and Mr. TyDi are read as they
are unpacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from hbt_fast.data.languages import is_language, normalise
from hbt_fast.data.rows import DataError

KINDS = {
    "qrels": ("qrels",),
    "queries": ("queries", "topic"),
    "run": ("run", "top1000"),
    "triples": ("triples",),
    "corpus": ("corpus", "docs", "collection"),
}
ENDINGS = (".jsonl", ".json", ".tsv", ".txt", ".trec")
UNKNOWN = "und"  # ISO 639's code for a language that nobody named
NAMES = {"bengali": "bn"}  # Babel calls it Bangla
T = TypeVar("T")
_SPLITS = ("train", "dev", "test", "testA", "testB", "validation")


def files_by_kind(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of folders and of the folders in them, by what they are.

    Args:
        folders: of one language. In one that holds a collection itself, folders that are called as a language (a
            backup in "old" too) are left out.
    """
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for folder in folders:
        whole = _is_collection(folder)
        for kind, path in _named(folder):
            if not whole or _is_in(path, folder) or not language_code(path.parent.name):
                found[kind].append(path)
    return {kind: sorted(paths, key=lambda p: (len(p.name), p)) for kind, paths in found.items()}


def _named(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a folder and of the folders in it whose names say what they are."""
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        parts = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        if (kind := kind_of_file(Path(*parts))) is not None:
            yield kind, path


def _is_collection(folder: Path) -> bool:
    return {"corpus", "qrels"} <= {kind for kind, path in _named(folder) if _is_in(path, folder)}


def _has_collection(folder: Path) -> bool:
    """The same, but its files may lie in a folder of any other name too, if no language is called so."""
    own = (kind for kind, path in _named(folder) if _is_in(path, folder) or not language_code(path.parent.name))
    return {"corpus", "qrels"} <= set(own)


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a file is the folder's own: in it, or in one as qrels/."""
    return path.parent == folder or kind_of(path.parent.name) is not None


def kind_of(name: str) -> str | None:
    """What a file or folder of this name holds; None if its name does not say.

    Args:
        name: without the folders above it.
    """
    return next((kind for kind, starts in KINDS.items() if name.lower().startswith(starts)), None)


def kind_of_file(path: Path) -> str | None:
    """What a file holds, by its name or that of a folder above it; None if they do not say.

    Args:
        path: within the folder of a collection.
    """
    kind = next(filter(None, map(kind_of, reversed(path.parts))), None)
    return kind if path.name.removesuffix(".gz").endswith(ENDINGS) else None


def language_folders(folder: Path, languages: Sequence[str] | None) -> dict[str, list[Path]]:
    """Language -> folders of its files.

    Args:
        folder: holds a corpus and qrels itself, and is then of the one language named or of an unknown one; or
            folders, one or more per language, whose names are its code or English name or end in it: sw, swahili,
            miracl-v1.0-sw, miracl-corpus-v1.0-sw, mrtydi-v1.1-swahili.
        languages: keep these only; None: all.

    Raises:
        DataError: no such folder, nothing in it, not these languages, two collections of one language, or a collection
            in a folder that no language is called by.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold corpus, queries and qrels, or a folder per language")
    found = {} if _is_collection(folder) else _per_language(folder)
    if not found and files_by_kind([folder])["qrels"]:
        if languages and len(languages) > 1:
            raise DataError(f"{folder}: holds one collection, so one language can be named, not {', '.join(languages)}")
        return {languages[0] if languages else language_code(folder.resolve().name) or UNKNOWN: [folder]}
    if not found:
        raise DataError(
            f"{folder}: no corpus, queries and qrels in it, and no folder per language that has them; the names must "
            "begin with corpus (or docs, collection), queries (or topics) and qrels, a folder of a language by "
            "its code, as sw"
        )
    return chosen(folder, found, languages)


def _per_language(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    nameless = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if kind_of(path.name):
            continue
        if code := language_code(path.name):
            if any(files_by_kind([path]).values()):
                found.setdefault(code, []).append(path)
        elif _has_collection(path):
            nameless.append(path.name)
    if nameless:  # as of CQADupStack: a figure over those that happen to be called as a language would pass for all
        raise DataError(
            f"{folder}: holds collections in {', '.join(nameless)}, which are no names of languages; name the folder "
            "of a language by its code, as sw, move away what is no part of the task, or give the folder of one "
            "collection"
        )
    for language, paths in found.items():
        judged = [path.name for path in paths if files_by_kind([path])["qrels"]]
        if len(judged) > 1:
            raise DataError(
                f"{folder}: {' and '.join(judged)} hold qrels of one language, {language}; keep one of them"
            )
    return {language: paths for language, paths in found.items() if files_by_kind(paths)["qrels"]}


def parallel_collections(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """All files of a folder in mMARCO's layout, and language -> how their names call it; {} of another layout.

    german_collection.tsv, german_queries.dev.small.tsv, run.bm25_german.txt: documents, queries and ids are parallel
    over languages, and the judgements are the same for all.

    Raises:
        DataError: two collections of one language.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    named: dict[str, str] = {}
    for path in files:
        if match := re.match(r"(.+)_collection\b", path.name):
            code = language_code(match[1]) or match[1]
            if named.setdefault(code, match[1]) != match[1]:
                raise DataError(
                    f"{folder}: {named[code]}_collection and {match[1]}_collection are of one language, {code}; keep "
                    "one of them"
                )
    return files, named


def files_of(files: Sequence[Path], word: str) -> dict[str, list[Path]]:
    """The corpus, queries and run of a language in mMARCO's layout, by what they are.

    Args:
        files: of all languages.
        word: how their names call it.
    """
    patterns = {"corpus": r"{}_collection\b", "queries": r"{}_queries\b", "run": r"run.*[_.]{}\b"}
    return {
        kind: [path for path in files if re.match(pattern.format(re.escape(word)), path.name)]
        for kind, pattern in patterns.items()
    }


def language_code(name: str) -> str | None:
    """The language that a folder or file is called by; None if by none.

    Args:
        name: a code, or English name, perhaps with what MIRACL and Mr. TyDi put before it. A code comes first: "ga" is
            Irish, not the language Ga.
    """
    import langcodes

    name = re.sub(r"^(miracl(-corpus)?|mrtydi)-v[\d.]+-", "", name)
    return name if langcodes.tag_is_valid(name) else _names().get(re.sub("[_-]", " ", name.lower()))


@cache
def _names() -> dict[str, str]:
    """English name of a language, in small letters -> its code; Mr. TyDi and mMARCO write names."""
    from babel import Locale

    no_language = ("mul", "und", "zxx")
    found = {name.lower(): code for code, name in Locale("en").languages.items() if code not in no_language}
    return {name: code.replace("_", "-") for name, code in found.items()} | NAMES


def chosen(folder: str | Path, found: Mapping[str, T], languages: Sequence[str] | None) -> dict[str, T]:
    """Those of the wanted languages.

    Args:
        folder: or file, named where one is missing.
        found: by language.
        languages: that are wanted; None: all.

    Raises:
        DataError: one is missing.
    """
    missing = [language for language in languages or () if language not in found]
    if missing:
        meant = [code for code in found if any(same_language(code, language) for language in missing)]
        hint = f"; did you mean {', '.join(meant)}?" if meant else ""
        raise DataError(
            f"{folder}: nothing for languages {', '.join(missing)}; there are {', '.join(sorted(found))}{hint}"
        )
    return {language: paths for language, paths in found.items() if languages is None or language in languages}


def same_language(code: str, other: str) -> bool:
    """Whether two codes are of one language, whatever their spelling and region."""
    return is_language(code) and is_language(other) and normalise(code) == normalise(other)


def of_split(paths: Sequence[Path], split: str | None, what: str, folder: Path) -> tuple[Path, str]:
    """The file of a split, and the split's name.

    Args:
        paths: that there are of this kind.
        split: such as "dev"; None: the only one that there is, else test, else dev.
        what: the kind, for messages.
        folder: the same.

    Raises:
        DataError: none, or it is unclear which.
    """
    if not paths:
        raise DataError(f"{folder}: no {what} file; its name, or that of its folder, must begin with {what}")
    if split is None and len(paths) == 1:
        return paths[0], _split(paths[0])
    for name in (split,) if split else ("test", "dev"):
        found = [path for path in paths if is_of(name, path)]
        if found:
            path = min(found, key=lambda path: len(path.name))
            return path, split or _split(path)
    raise DataError(
        f"{folder}: no {what} of the split {split or 'test or dev'}; there are {', '.join(p.name for p in paths)}"
        + ("" if split else "; name one with --split")
    )


def queries_of_split(paths: Sequence[Path], split: str, folder: Path) -> Path:
    """The queries of a split: its own file, else (of dev.small) that of the split it is part of, else the one for all.

    Args:
        paths: of queries.
        split: whose.
        folder: for messages.

    Raises:
        DataError: there is none.
    """
    own = [path for path in paths if split and is_of(split, path)]
    if split and not own:
        own = [path for path in paths if is_of(split.split(".")[0], path)]
    for_all = [path for path in paths if not _tokens(path) & set(_SPLITS)]
    if not own and not for_all:
        raise DataError(
            f"{folder}: no queries of the split {split}; there are {', '.join(p.name for p in paths) or 'none'}"
        )
    return min(own or for_all, key=lambda path: len(path.name))


def is_of(split: str, path: Path) -> bool:
    """Whether a file's name says that it is of a split, as qrels.dev.small.tsv of "dev" and of "dev.small"."""
    return set(split.split(".")) <= _tokens(path)


def _split(path: Path) -> str:
    """The split in a file's name, in full: dev.small of qrels.dev.small.tsv."""
    tokens = re.split(r"[._-]", re.sub(rf"({'|'.join(map(re.escape, ENDINGS))})?(\.gz)?$", "", path.name))
    first = next((i for i, token in enumerate(tokens) if token in _SPLITS), len(tokens))
    return ".".join(tokens[first:])


def _tokens(path: Path) -> set[str]:
    return set(re.split(r"[._-]", path.name))
