"""Building the token store of a source: rows stream in, arrays grow on disk, an interrupted run is gone on from.

A source is built in `FOLDER.partial`, which is renamed when whole. Every few seconds all its files are synced and one
line of journal.jsonl says how far they are; a new start cuts the files back to the journal's last line and passes over
the rows that it counts. The result is a function of the rows, the tokenizer and `chunk_rows`: neither interruptions nor
the number of processes change a byte of it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from hbt_fast.base.files import sync, write_whole, writing
from hbt_fast.data import tokenise
from hbt_fast.data.draft import HELPERS, INSTEAD, Draft
from hbt_fast.data.problems import MALFORMED, Tally
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import FORMAT, Role, SourceStore
from hbt_fast.data.tokenise import ChunkEncoder, PlainRow, RowError, mark
from hbt_fast.data.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_CHARACTERS = 1 << 27  # of the texts of a chunk of rows, which is closed early where they are very long
JOURNAL_SECONDS = 10.0  # between lines of the journal: the most work that a kill can lose
ALONE = 8  # so many chunks are tokenised here before processes are started
TOKENISER = (sys.executable, "-P", str(Path(tokenise.__file__)))  # -P: its folder stays off sys.path
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONE_THREAD = dict.fromkeys(THREADS, "1") | {"TOKENIZERS_PARALLELISM": "false"}
DIED = (
    "a tokenising process ended with status {status} (-9: killed, perhaps for memory); "
    "prepare the data again, it goes on where it stopped"
)


def build_source(
    folder: str | Path,
    name: str,
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerFast,
    query: Role,
    passage: Role,
    *,
    workers: int | None = None,
    progress: bool = True,
    chunk_rows: int = 4096,
    tally: Tally | None = None,
    skip: bool = False,
) -> SourceStore:
    """Tokenise the rows of one source and write its store; one that is there is opened instead.

    Of several processes that build one folder at once, one does and the others wait for it.

    Args:
        folder: where the store goes. Name it after all that goes in: what an interrupted build left is gone on from.
        name: of the source.
        rows: the same ones in the same order each time. They are held a few chunks at a time.
        tokenizer: a fast Hugging Face tokenizer; its special tokens are added.
        query: prompt and length limit of queries.
        passage: of passages.
        workers: processes that tokenise a large source; None takes one per core, 0 works in this process's threads.
        progress: show a progress bar on stderr.
        chunk_rows: rows tokenised at a time; a text is stored once per role and chunk.
        tally: what the reader of the rows left out, once it is through; kept with the store, and what is malformed in
            skipped.txt beside the arrays.
        skip: leave out, list and count rows that cannot be stored.

    Raises:
        DataError: no rows, a damaged draft; a row without query or passage, a text without any token and nothing is
            skipped.
        FileError: the folder cannot be written.
    """
    folder = Path(folder)
    with _alone(folder) as work:
        if work is not None:
            if not (work / "source.json").exists():
                roles = (query.prompt, query.max_length), (passage.prompt, passage.max_length)
                setup = tokenizer.backend_tokenizer.to_str(), tokenizer_options(tokenizer), roles, skip
                with closing(Draft(work, _identity(name, chunk_rows, setup))) as draft:
                    if not draft.complete:
                        _fill(draft, name, rows, setup, workers, progress, chunk_rows, tally)
                    draft.finish(name, (query, passage))
            _publish(work, folder)
    return SourceStore.open(folder)


def tokenizer_options(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What token ids depend on besides the tokenizer's JSON; see ChunkEncoder."""
    return {"split_special_tokens": tokenizer.split_special_tokens, "truncation_side": tokenizer.truncation_side}


def _identity(name: str, chunk_rows: int, setup: tuple) -> str:
    """Names what, besides the rows, goes into a draft."""
    return xxhash.xxh3_64_hexdigest(repr((FORMAT, name, chunk_rows, setup)).encode())


def _fill(
    draft: Draft,
    name: str,
    rows: Iterable[Row],
    setup: tuple,
    workers: int | None,
    progress: bool,
    chunk_rows: int,
    tally: Tally | None,
) -> None:
    """Add the rows that a draft does not have yet."""
    from tqdm import tqdm

    stream = iter(rows)
    with tqdm(desc=f"tokenising {name}", unit=" rows", unit_scale=True, disable=not progress) as bar:
        _pass_over(draft, stream, name)
        bar.update(draft.taken)
        noted = time.monotonic()
        chunks = _chunks(stream, chunk_rows)
        with closing(_encoded(chunks, setup, workers)) as encoded:
            for chunk in encoded:
                draft.add(chunk)
                bar.update(chunk["taken"])
                if time.monotonic() - noted >= JOURNAL_SECONDS:
                    draft.note()
                    noted = time.monotonic()
    tally = Tally() if tally is None else tally
    tally.read = max(tally.read, draft.taken)  # where nobody counted
    for _, languages, why in draft.refused():
        tally.lose(MALFORMED, languages)
        tally.skipped.append(why)
    if not draft.rows:
        if tally.read and tally.left_out[MALFORMED] == tally.read:
            raise DataError(f"source {name!r}: {tally}")
        why = f": {tally}" if tally.read else ""
        raise DataError(f"source {name!r} gave no rows{why}; check its path and data.languages, or remove it")
    if tally.skipped:
        listing = "".join(f"{line}\n" for line in tally.skipped)
        write_whole(draft.folder / "skipped.txt", listing.encode(errors="backslashreplace"))
    draft.note(complete=True, tally=tally.plain())


def _chunks(stream: Iterator[Row], most: int) -> Iterator[list[PlainRow]]:
    """The rows, so many at a time, or fewer where their texts are very long."""
    chunk, characters = [], 0
    for row in stream:
        chunk.append(_plain(row))
        texts = chain(row.queries.values(), row.passages.values(), *row.negatives.values())
        characters += sum(map(len, texts))
        if len(chunk) == most or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _pass_over(draft: Draft, stream: Iterator[Row], name: str) -> None:
    """Read the rows that are in already, and see that the last of them is the one it was."""
    last = None
    for row in islice(stream, draft.taken):
        last = row
    if draft.taken and (last is None or mark(_plain(last)) != draft.tail):
        raise DataError(
            f"source {name!r} does not give the rows that it gave to an interrupted run; delete {draft.folder} and "
            "prepare the data again"
        )


def _encoded(chunks: Iterator[list[PlainRow]], setup: tuple, workers: int | None) -> Iterator[dict[str, Any]]:
    """The arrays of the chunks, in order; made in this process at first, in others if there are many."""
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    try:
        encode = ChunkEncoder(*setup)
        for chunk in islice(chunks, ALONE) if workers else chunks:
            yield encode(chunk)
        del encode
        for chunk in chunks:  # there is at least one more
            processes = Workers([(TOKENISER, ONE_THREAD)] * workers, setup, DIED)
            with closing(processes.map(chain([chunk], chunks))) as encoded:
                yield from encoded
    except RowError as error:
        raise DataError(str(error)) from None


def _plain(row: Row) -> PlainRow:
    return PlainRow(*(getattr(row, name) for name in PlainRow._fields))


@contextmanager
def _alone(folder: Path) -> Iterator[Path | None]:
    """The folder in which to build, for one process at a time; None once `folder` is there.

    The lock is a file in the folder of the build. Who gets it looks whether that folder still is where it was, or was
    renamed by who had the lock before.
    """
    work = folder.with_name(folder.name + ".partial")
    while not folder.exists():
        with writing(work, INSTEAD):
            work.mkdir(parents=True, exist_ok=True)
            try:
                lock = open(work / "lock", "a")  # noqa: SIM115 - closed below
            except FileNotFoundError:  # renamed just now
                continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process builds {folder}; waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                still_there = os.path.samestat(os.stat(work / "lock"), os.fstat(lock.fileno()))
            except FileNotFoundError:
                continue
            if still_there and folder.exists():  # made anew above, after the folder was renamed
                shutil.rmtree(work)
            elif still_there:
                yield work
                return
    yield None


def _publish(work: Path, folder: Path) -> None:
    """Give a whole store its name."""
    with writing(folder, INSTEAD):
        for name in ("journal.jsonl", *(f"{key}.npy" for key in HELPERS)):
            (work / name).unlink(missing_ok=True)
        work.rename(folder)
        sync(folder.parent)
        (folder / "lock").unlink()
