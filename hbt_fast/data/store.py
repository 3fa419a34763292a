"""The token store: all texts of a training set, tokenised once, as memory-mapped arrays in one folder.

    tokens            int32   the token ids of every distinct text, one after the other
    token_offsets     int64   text t is tokens[token_offsets[t]:token_offsets[t + 1]]
    text_contents     int64   content id of a passage text, -1 for query texts; a hard negative that is nobody's
                              positive has a content id of its own
    row_sources       int32   which source a row is from
    row_contents      int64   content id of the row's passage, 0 .. number of contents - 1
    field_offsets     int64   row r has the fields field_offsets[r]:field_offsets[r + 1], one per language
    field_languages   int32   a field's language
    field_queries     int64   the field's query, as a text number, or -1
    field_passages    int64   the field's positive passage, as a text number, or -1
    field_mono        bool    query and passage are both there and differ: the field can serve a monolingual batch
    negative_offsets  int64   row r has the hard negatives negative_offsets[r]:negative_offsets[r + 1]
    negative_languages, negative_texts

Texts are stored as the model reads them: with the prompt of their role and the tokenizer's special tokens, cut to the
length limit. A text is stored once per role, however often it occurs. Rows whose passages have equal text (after
Unicode and case folding), or whose source gives them one content id, share a content id, transitively.

A store is written beside its final place and renamed when whole; its folder is named after the hash of everything
that went into it, so an unchanged input is found again and a changed one is built anew.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from hbt_fast.data.rows import DataError, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
ARRAYS = {
    "tokens": np.int32,
    "token_offsets": np.int64,
    "text_contents": np.int64,
    "row_sources": np.int32,
    "row_contents": np.int64,
    "field_offsets": np.int64,
    "field_languages": np.int32,
    "field_queries": np.int64,
    "field_passages": np.int64,
    "field_mono": np.bool_,
    "negative_offsets": np.int64,
    "negative_languages": np.int32,
    "negative_texts": np.int64,
}
QUERY, PASSAGE = 0, 1


@dataclass(frozen=True)
class Role:
    """How texts of one role are written: the prompt before them and their length limit in tokens, specials included."""

    prompt: str
    max_length: int


@dataclass(frozen=True)
class Store:
    """A token store on disk, opened read-only; the arrays are described in the module's docstring.

    Attributes:
        folder: where it lies.
        languages: the language codes, in the order of the language numbers.
        sources: the names of the sources, in the order of the source numbers.
        weights: per source, the sampling weight its configuration gave, or None.
    """

    folder: Path
    languages: tuple[str, ...]
    sources: tuple[str, ...]
    weights: tuple[float | None, ...]
    tokens: np.ndarray
    token_offsets: np.ndarray
    text_contents: np.ndarray
    row_sources: np.ndarray
    row_contents: np.ndarray
    field_offsets: np.ndarray
    field_languages: np.ndarray
    field_queries: np.ndarray
    field_passages: np.ndarray
    field_mono: np.ndarray
    negative_offsets: np.ndarray
    negative_languages: np.ndarray
    negative_texts: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Open a store that `build_store` wrote.

        Raises:
            DataError: no store there, a store of another version of this program, or an array that is cut short.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{folder}: no token store there (no store.json); build one with python -m hbt_fast.prepare"
            ) from None
        if meta["format"] != FORMAT:
            raise DataError(
                f"{folder}: a store of format {meta['format']}, this program reads {FORMAT}; delete the folder"
            )
        arrays = {}
        for name, dtype in ARRAYS.items():
            path = folder / f"{name}.npy"
            try:
                arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path}: missing or damaged ({error}); delete {folder} and prepare the data again"
                ) from None
            if arrays[name].dtype != dtype or len(arrays[name]) != meta["lengths"][name]:
                raise DataError(f"{path}: not the array that was written; delete {folder} and prepare the data again")
        return cls(folder, tuple(meta["languages"]), tuple(meta["sources"]), tuple(meta["weights"]), **arrays)

    @property
    def texts(self) -> int:
        """Number of distinct texts."""
        return len(self.token_offsets) - 1

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_sources)

    def text(self, number: int) -> np.ndarray:
        """The token ids of one text: (length,) int32."""
        return self.tokens[self.token_offsets[number] : self.token_offsets[number + 1]]


class _Contents:
    """Union-find over hashes: which rows are about the same content."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.parents = array("q")

    def number(self, key: str) -> int:
        """The node of a content key or of a folded passage text."""
        node = self.numbers.setdefault(xxhash.xxh3_128_intdigest(key.encode()), len(self.parents))
        if node == len(self.parents):
            self.parents.append(node)
        return node

    def root(self, node: int) -> int:
        """The representative of a node's class (path halving)."""
        parents = self.parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def union(self, nodes: list[int]) -> int:
        """Make the nodes one class; returns one of them."""
        first = self.root(nodes[0])
        for node in nodes[1:]:
            self.parents[self.root(node)] = first
        return first


def folded(text: str) -> str:
    """The form in which passage texts are compared: compatibility-composed, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def build_store(
    folder: str | Path,
    sources: Iterable[tuple[str, float | None, Iterable[Row]]],
    tokenizer: PreTrainedTokenizerFast,
    query: Role,
    passage: Role,
    *,
    progress: bool = True,
    batch_rows: int = 8192,
) -> Store:
    """Tokenise the rows of all sources and write a store.

    Args:
        folder: where the store goes; an older one there is replaced.
        sources: (name, sampling weight or None, rows) of each source.
        tokenizer: a fast Hugging Face tokenizer (it works in parallel threads); its special tokens are added.
        query: prompt and length limit of queries.
        passage: of passages.
        progress: show a progress bar on stderr.
        batch_rows: rows tokenised at a time.

    Raises:
        DataError: no rows at all, a source without rows, or a text without any token.
    """
    from tqdm import tqdm

    folder = Path(folder)
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    writer = _Writer(work, tokenizer, (query, passage))
    names, weights = [], []
    with tqdm(desc="tokenising", unit=" rows", unit_scale=True, disable=not progress) as bar:
        for number, (name, weight, rows) in enumerate(sources):
            names.append(name)
            weights.append(weight)
            before, stream = writer.rows, iter(rows)
            while batch := list(islice(stream, batch_rows)):
                writer.add(number, batch)
                bar.update(len(batch))
                bar.set_postfix_str(name, refresh=False)
            if writer.rows == before:
                raise DataError(f"source {name!r} gave no rows; check its path and data.languages, or remove it")
    if not names:
        raise DataError("data.sources is empty; name at least one source")
    lengths = writer.finish()
    meta = {
        "format": FORMAT,
        "languages": writer.languages,
        "sources": names,
        "weights": weights,
        "lengths": lengths,
    }
    (work / "store.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
    return Store.open(folder)


class _Writer:
    """Collects the arrays of a store; tokens go to disk at once, the (much smaller) tables at the end."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, roles: tuple[Role, Role]) -> None:
        self.folder, self.tokenizer, self.roles = folder, tokenizer, roles
        self.languages: list[str] = []
        self.language_numbers: dict[str, int] = {}
        self.text_numbers: dict[tuple[int, int], int] = {}
        self.pending: tuple[list[str], list[str]] = ([], [])  # texts of each role not yet tokenised
        self.pending_numbers: tuple[list[int], list[int]] = ([], [])
        self.contents = _Contents()
        self.text_nodes = array("q")
        self.columns = {name: array("q") for name in ARRAYS if name not in ("tokens", "token_offsets", "text_contents")}
        self.columns["field_offsets"].append(0)
        self.columns["negative_offsets"].append(0)
        self.raw = open(folder / "tokens.raw", "wb")  # noqa: SIM115 - closed by finish
        self.offsets = array("q", [0])

    @property
    def rows(self) -> int:
        return len(self.columns["row_sources"])

    def add(self, source: int, rows: list[Row]) -> None:
        """Add the rows of one source and tokenise the texts that are new."""
        column = self.columns
        for row in rows:
            passages = {lang: self._text(PASSAGE, text) for lang, text in row.passages.items()}
            queries = {lang: self._text(QUERY, text) for lang, text in row.queries.items()}
            nodes = [self.text_nodes[number] for number in passages.values()]
            if not nodes or not queries:
                raise DataError(f"{row.where}: a row needs at least one query and one passage")
            if row.content is not None:
                nodes.append(self.contents.number(f"{source}\0{row.content}"))
            column["row_sources"].append(source)
            column["row_contents"].append(self.contents.union(nodes))
            for lang in sorted(queries.keys() | passages.keys()):
                mono = lang in queries and lang in passages and folded(row.queries[lang]) != folded(row.passages[lang])
                column["field_languages"].append(self._language(lang))
                column["field_queries"].append(queries.get(lang, -1))
                column["field_passages"].append(passages.get(lang, -1))
                column["field_mono"].append(mono)
            column["field_offsets"].append(len(column["field_languages"]))
            for lang, texts in row.negatives.items():
                for text in texts:
                    column["negative_languages"].append(self._language(lang))
                    column["negative_texts"].append(self._text(PASSAGE, text))
            column["negative_offsets"].append(len(column["negative_texts"]))
        self._tokenise()

    def _language(self, code: str) -> int:
        number = self.language_numbers.setdefault(code, len(self.languages))
        if number == len(self.languages):
            self.languages.append(code)
        return number

    def _text(self, role: int, text: str) -> int:
        key = (role, xxhash.xxh3_128_intdigest(text.encode()))
        number = self.text_numbers.setdefault(key, len(self.text_nodes))
        if number == len(self.text_nodes):
            self.text_nodes.append(self.contents.number("\0" + folded(text)) if role == PASSAGE else -1)
            self.pending[role].append(self.roles[role].prompt + text)
            self.pending_numbers[role].append(number)
        return number

    def _tokenise(self) -> None:
        """Tokenise what is pending and append it in the order of the text numbers."""
        first = len(self.offsets) - 1
        encoded: list[list[int] | None] = [None] * sum(map(len, self.pending))
        for role, texts in enumerate(self.pending):
            if texts:
                limit = self.roles[role].max_length
                output = self.tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)
                for number, ids in zip(self.pending_numbers[role], output["input_ids"], strict=True):
                    encoded[number - first] = ids
            self.pending[role].clear()
            self.pending_numbers[role].clear()
        for ids in encoded:
            self.raw.write(np.asarray(ids, np.int32).tobytes())
            self.offsets.append(self.offsets[-1] + len(ids))

    def finish(self) -> Mapping[str, int]:
        """Write every array as .npy; returns their lengths."""
        self.raw.close()
        root = self.contents.root
        dense: dict[int, int] = {}
        text_contents = [dense.setdefault(root(n), len(dense)) if n >= 0 else -1 for n in self.text_nodes]
        contents = [dense[root(n)] for n in self.columns["row_contents"]]
        tables = {
            **self.columns,
            "row_contents": contents,
            "token_offsets": self.offsets,
            "text_contents": text_contents,
        }
        raw = self.folder / "tokens.raw"
        size = raw.stat().st_size // 4
        tokens = np.memmap(raw, np.int32, "r", shape=(size,)) if size else np.empty(0, np.int32)
        for name, dtype in ARRAYS.items():
            np.save(self.folder / f"{name}.npy", tokens if name == "tokens" else np.asarray(tables[name], dtype))
        raw.unlink()
        return {name: size if name == "tokens" else len(tables[name]) for name in ARRAYS}


def fingerprint(parts: Iterable[object]) -> str:
    """A short hash of settings (anything with a stable repr) and of the contents of files (given as Path)."""
    state = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, Path):
            for block in _blocks(part):
                state.update(block)
        else:
            state.update(repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()[:16]


def _blocks(path: Path, size: int = 1 << 22) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block
