"""A chunk of rows becomes arrays: the part of building a token store that runs in many processes.

It needs numpy, tokenizers and xxhash alone. Run as a file it is a worker: it reads chunks as lines of JSON from
standard input and writes arrays to standard output, each a line of JSON and their bytes. A worker is started by its
path rather than by `multiprocessing`, whose spawned processes import the caller's main module and the whole package,
torch included: 3 s and 400 MB for each, where a worker takes 0.5 s and 60 MB before it loads its tokenizer.
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from tokenizers import Tokenizer

PASSAGE_KEY, CONTENT_KEY = 1, 2  # seeds: a source's content ids and passage texts are different key spaces
NO_SCORE = float("nan")
AT_ONCE = 1 << 22  # characters that are tokenised at a time: the tokenizers library takes some 40 bytes for each


class PlainRow(NamedTuple):
    """A `hbt_fast.data.rows.Row` on its way to another process; see there."""

    queries: dict[str, str]
    passages: dict[str, str]
    negatives: dict[str, tuple[str, ...]]
    content: str | None
    where: str
    score: float | None = None
    negative_scores: dict[str, tuple[float, ...]] = {}


class RowError(ValueError):
    """A row that cannot be stored; the message names its place."""


class _RefusedError(Exception):
    """Rows of a chunk that cannot be stored: why, by their numbers in it."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def folded(text: str) -> str:
    """The form in which passage texts are compared: compatibility-composed, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def mark(row: PlainRow) -> str:
    """A hash by which a row is known again."""
    return xxhash.xxh3_64_hexdigest(line_of(row))


def line_of(value: object) -> bytes:
    """A line of JSON; half of a surrogate pair goes through, to be named by ChunkEncoder."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def value_of(line: bytes) -> Any:
    """What `line_of` wrote; tuples have become lists."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


class ChunkEncoder:
    """Turns chunks of rows into arrays.

    Args:
        core: a tokenizer of the tokenizers library, as JSON.
        options: its settings that the JSON does not hold: split_special_tokens (bool) and truncation_side.
        roles: (prompt, length limit in tokens) of queries and of passages.
        skip: leave out rows that cannot be stored, and say which, rather than raise.
    """

    def __init__(
        self, core: str, options: dict[str, Any], roles: Sequence[tuple[str, int]], skip: bool = False
    ) -> None:
        self.core, self.side, self.roles = Tokenizer.from_str(core), options["truncation_side"], tuple(roles)
        self.skip = skip
        self.core.no_padding()
        self.core.encode_special_tokens = options["split_special_tokens"]

    def __call__(self, rows: Sequence[PlainRow]) -> dict[str, Any]:
        """The arrays of a chunk.

        Text numbers count from 0 within the chunk, in the order in which the texts occur; a text that occurs twice in
        one role is one text. Language numbers are places in `languages`.

        Args:
            rows: or lists of their values.

        Returns:
            taken: number of rows; tail: the mark of the last; refused: [number in the chunk, languages, "where: why"]
            of those that are left out. And of the others, if there are any: languages: list of codes; field_counts,
            negative_counts: (rows,) int64; token_counts, character_counts: (texts,) int64; keys: uint64, with the row
            of each in key_rows: what makes rows one content; negative_keys: (negatives,) uint64; question_keys,
            question_key_rows: what makes rows one question; the rest is described in `hbt_fast.data.store`.

        Raises:
            RowError: a row without query or passage, a text without any token or with half of a surrogate pair.
        """
        rows = [PlainRow(*row) for row in rows]
        numbers, kept, refused, made = range(len(rows)), rows, [], {}
        while kept and not made:
            try:
                made = self._arrays(kept)
            except _RefusedError as error:
                reasons = {i: f"{kept[i].where}: {why}" for i, why in error.reasons.items()}
                if not self.skip:
                    raise RowError(next(iter(reasons.values()))) from None
                for i, why in reasons.items():
                    refused.append([numbers[i], sorted({*kept[i].queries, *kept[i].passages}), why])
                numbers = [n for i, n in enumerate(numbers) if i not in reasons]
                kept = [row for i, row in enumerate(kept) if i not in reasons]
        return {"taken": len(rows), "tail": mark(rows[-1]), "refused": sorted(refused), **made}

    def _arrays(self, rows: Sequence[PlainRow]) -> dict[str, Any]:
        if bad := [i for i, row in enumerate(rows) if not row.queries or not row.passages]:
            raise _RefusedError(dict.fromkeys(bad, "a row needs at least one query and one passage"))
        try:
            return self._made(rows)
        except UnicodeEncodeError:
            bad = _with_text(rows, _half_pair, "the text {!r} holds half of a surrogate pair; mend it")
            if not bad:
                raise
            raise _RefusedError(bad) from None

    def _made(self, rows: Sequence[PlainRow]) -> dict[str, Any]:
        raw: list[bytes] = []  # the texts in UTF-8, in the order of their numbers
        queries_seen: dict[str, tuple[int, int]] = {}  # text -> number, key
        passages_seen: dict[str, tuple[int, int]] = {}

        def entry(seen: dict[str, tuple[int, int]], text: str) -> tuple[int, int]:
            found = seen.get(text)
            if found is None:
                raw.append(text.encode())
                found = seen[text] = len(raw) - 1, _key(text)
            return found

        languages: dict[str, int] = {}
        fields: tuple[list[int], list[int], list[int], list[bool]] = ([], [], [], [])
        negatives: tuple[list[int], list[int], list[int], list[float]] = ([], [], [], [])
        field_counts, negative_counts, keys, key_rows, question_keys, question_rows = [], [], [], [], [], []
        for index, (queries, passages, hard, content, _, _, scores) in enumerate(rows):
            own, asked = set(), set()
            codes = queries.keys() if queries.keys() == passages.keys() else queries.keys() | passages.keys()
            for code in codes if len(codes) == 1 else sorted(codes):
                query, passage = queries.get(code), passages.get(code)
                fields[0].append(languages.setdefault(code, len(languages)))
                number, question = (-1, 0) if query is None else entry(queries_seen, query)
                fields[1].append(number)
                if query is not None:
                    asked.add(question)
                if passage is None:
                    fields[2].append(-1)
                    fields[3].append(False)
                    continue
                number, key = entry(passages_seen, passage)
                own.add(key)
                fields[2].append(number)
                fields[3].append(query is not None and query != passage and question != key)
            field_counts.append(len(codes))
            if content is not None:
                own.add(xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass"), CONTENT_KEY))
            for key in own:
                keys.append(key)
                key_rows.append(index)
            for key in asked:
                question_keys.append(key)
                question_rows.append(index)
            count = 0
            for code, several in hard.items():
                negatives[3].extend(scores.get(code) or [NO_SCORE] * len(several))
                for text in several:
                    number, key = entry(passages_seen, text)
                    negatives[0].append(languages.setdefault(code, len(languages)))
                    negatives[1].append(number)
                    negatives[2].append(key)
                    count += 1
            negative_counts.append(count)

        count = len(raw)
        ids: list[list[int]] = [[]] * count
        for role, seen in zip(self.roles, (queries_seen, passages_seen), strict=True):
            self._encode(role, seen, (number for number, _ in seen.values()), ids, rows)
        token_counts = np.fromiter(map(len, ids), np.int64, count)
        tokens = np.fromiter(chain.from_iterable(ids), np.int32, int(token_counts.sum()))
        in_bytes = memoryview(tokens).cast("B")
        ends = [0, *(4 * token_counts.cumsum()).tolist()]
        hashes = (xxhash.xxh3_64_intdigest(in_bytes[a:b]) for a, b in pairwise(ends))
        return {
            "languages": list(languages),
            "tokens": tokens,
            "token_counts": token_counts,
            "token_hashes": np.fromiter(hashes, np.uint64, count),
            "characters": np.frombuffer(b"".join(raw), np.uint8),
            "character_counts": np.fromiter(map(len, raw), np.int64, count),
            "field_counts": np.array(field_counts, np.int64),
            "field_languages": np.array(fields[0], np.int32),
            "field_queries": np.array(fields[1], np.int64),
            "field_passages": np.array(fields[2], np.int64),
            "field_mono": np.array(fields[3], np.bool_),
            "negative_counts": np.array(negative_counts, np.int64),
            "negative_languages": np.array(negatives[0], np.int32),
            "negative_texts": np.array(negatives[1], np.int64),
            "negative_scores": np.array(negatives[3], np.float32),
            "row_scores": np.array([NO_SCORE if row.score is None else row.score for row in rows], np.float32),
            "negative_keys": np.array(negatives[2], np.uint64),
            "keys": np.array(keys, np.uint64),
            "key_rows": np.array(key_rows, np.int64),
            "question_keys": np.array(question_keys, np.uint64),
            "question_key_rows": np.array(question_rows, np.int64),
        }

    def encode(self, role: int, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts of one role (0: queries, 1: passages), with its prompt and cut to its length."""
        prompt, limit = self.roles[role]
        self.core.enable_truncation(limit, direction=self.side)
        return [one.ids for one in self.core.encode_batch_fast([prompt + text for text in texts])]

    def _encode(
        self,
        role: tuple[str, int],
        texts: Collection[str],
        numbers: Iterable[int],
        ids: list[list[int]],
        rows: Sequence[PlainRow],
    ) -> None:
        """Put the token ids of a role's texts into `ids`, at their numbers."""
        prompt, limit = role
        self.core.enable_truncation(limit, direction=self.side)
        encoded = map(self.core.encode_batch_fast, _parts(prompt + text for text in texts))
        nothing = set()
        for text, number, one in zip(texts, numbers, chain.from_iterable(encoded), strict=True):
            ids[number] = found = one.ids
            if not found:
                nothing.add(text)
        if nothing:
            raise _RefusedError(
                _with_text(rows, nothing.__contains__, "no token is left of the text {!r}; leave it out")
            )


def _key(text: str) -> int:
    """Equal for texts that are the same passage."""
    return xxhash.xxh3_64_intdigest(folded(text).encode(), PASSAGE_KEY)


def _parts(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, so many at a time as have about AT_ONCE characters."""
    part, characters = [], 0
    for text in texts:
        part.append(text)
        characters += len(text)
        if characters >= AT_ONCE:
            yield part
            part, characters = [], 0
    yield part


def _half_pair(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _with_text(rows: Sequence[PlainRow], bad: Callable[[str], bool], why: str) -> dict[int, str]:
    """The rows that have a bad text, by number, and what is wrong with the first of these."""
    found = {}
    for i, row in enumerate(rows):
        texts = chain(row.queries.values(), row.passages.values(), *row.negatives.values())
        text = next(filter(bad, texts), None)
        if text is not None:
            found[i] = why.format(text[:60])
    return found


def send(target: BinaryIO, made: dict[str, Any] | str) -> None:
    """Write what a chunk became, or the message of its RowError."""
    arrays = {} if isinstance(made, str) else {key: value for key, value in made.items() if hasattr(value, "dtype")}
    rest = made if isinstance(made, str) else {key: value for key, value in made.items() if key not in arrays}
    shapes = {key: (array.dtype.str, len(array)) for key, array in arrays.items()}
    target.write(line_of([rest, shapes]))
    for array in arrays.values():
        target.write(array.view(np.uint8).data)
    target.flush()


def receive(source: BinaryIO) -> dict[str, Any]:
    """Read what `send` wrote.

    Raises:
        RowError: what was sent is its message.
        EOFError: the sender ended.
    """
    line = source.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    made, shapes = value_of(line)
    if isinstance(made, str):
        raise RowError(made)
    for key, (dtype, count) in shapes.items():
        made[key] = np.empty(count, dtype)
        if source.readinto(made[key].view(np.uint8).data) != made[key].nbytes:
            raise EOFError
    return made


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Encode chunks from `source` to `target` until there are no more; a RowError is sent in place of arrays."""
    encode = ChunkEncoder(*value_of(source.readline()))
    for line in source:
        try:
            send(target, encode(value_of(line)))
        except RowError as error:
            send(target, str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it by closing the pipe
    gc.disable()  # it makes no cycles, and would be looked through for them at every few hundred lists
    results, sys.stdout = sys.stdout.buffer, sys.stderr
    serve(sys.stdin.buffer, results)
