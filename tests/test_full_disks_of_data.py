"""A disk that is full, read-only or gone: what it is, where, what room there is and what to do; no half of a file."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hbt_fast.base.errors import FileError
from hbt_fast.data import growing
from hbt_fast.data.align import Entry
from hbt_fast.data.align import write as write_lexicon
from hbt_fast.data.build import build_source
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import Role, SourceStore
from hbt_fast.encoder.vector_file import VectorFile
from hbt_fast.evaluation.cache import CachedEncoder
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.report import write_report
from hbt_fast.evaluation.results import Results

ROLE = Role("", 9)
ROWS = [Row({"en": f"which {i}"}, {"en": f"the {i}"}, where=f"f:{i}") for i in range(40)]
NUMBERS = pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])


def failing(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


class Full:
    """A file on a disk that takes so many bytes."""

    def __init__(self, file, most):
        self.file, self.left = file, most

    def write(self, raw):
        if len(raw) > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= len(raw)
        return self.file.write(raw)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(bytes)`: the arrays that grow are on a disk that takes so many each; None: it has room again."""

    def limit(most):
        monkeypatch.undo()
        if most is not None:
            monkeypatch.setattr(growing, "open", lambda path, mode: Full(Path(path).open(mode), most), raising=False)  # noqa: SIM115

    return limit


def build(folder, tokenizer):
    return build_source(folder, "made", ROWS, tokenizer, ROLE, ROLE, progress=False, workers=0, chunk_rows=10)


def test_a_store_on_a_full_disk_says_so_and_goes_on_when_there_is_room(tmp_path, tokenizer, full_disk):
    full_disk(500)
    with pytest.raises(FileError, match=r"s.partial could not be written: No space left on device \(.* MiB free\); "
                       "make room and start again, it goes on where it stopped; or set data.store_dir"):  # fmt: skip
        build(tmp_path / "s", tokenizer)
    full_disk(None)
    one, other = build(tmp_path / "s", tokenizer), build(tmp_path / "t", tokenizer)
    assert (one.folder / "source.json").read_bytes() == (other.folder / "source.json").read_bytes()


@NUMBERS
def test_a_folder_of_stores_that_cannot_be_written_is_named(tmp_path, tokenizer, monkeypatch, number):
    monkeypatch.setattr(Path, "mkdir", failing(number))
    with pytest.raises(FileError, match=rf"s.partial could not be written: {os.strerror(number)}.*data.store_dir"):
        build(tmp_path / "s", tokenizer)


def test_a_store_that_memory_cannot_map_is_not_called_damaged(tmp_path, tokenizer, monkeypatch):
    build(tmp_path / "s", tokenizer)
    monkeypatch.setattr(np, "load", failing(errno.ENOMEM))
    with pytest.raises(DataError, match=r"cannot be opened \(Cannot allocate memory\)") as told:
        SourceStore.open(tmp_path / "s")
    assert "delete" not in str(told.value)

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np, "load", no_memory)
    with pytest.raises(MemoryError):
        SourceStore.open(tmp_path / "s")


def test_a_tokenizer_that_could_not_be_kept_leaves_nothing(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    from hbt_fast.config import parse
    from hbt_fast.prepare import prepare

    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "Where?", "passage": "Here.", "language": "en"}))
    sources = json.dumps([{"path": str(tmp_path / "a.jsonl")}])
    settings = [f"data.store_dir={tmp_path / 'stores'}", "model.path=null", "model.scratch.vocabulary=99"]
    config = parse("test", "", [*settings, f"data.sources={sources}"])

    def half(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{")
        failing(errno.ENOSPC)()

    original = PreTrainedTokenizerFast.save_pretrained
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", half)
    with pytest.raises(FileError, match=r"tokenizer-\w+ could not be written: No space left on device"):
        prepare(config)
    assert not list((tmp_path / "stores").iterdir())
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", original)
    assert prepare(config)[0].rows == 1


def test_vectors_on_a_full_disk_are_gone_on_with(tmp_path, full_disk):
    path, pieces = tmp_path / "v.npy", [["a", "b"], ["c", "d"]]
    full_disk(160)
    file = VectorFile(path, 4, "float32", {})
    left = file.left(iter(pieces))
    next(left)
    file.append(np.ones((2, 4), np.float32))
    next(left)
    with pytest.raises(FileError, match=r"v.npy could not be written: No space left.*goes on where it stopped"):
        file.append(np.ones((2, 4), np.float32))
    file.close()
    assert not path.exists()
    full_disk(None)
    file = VectorFile(path, 4, "float32", {})
    for _ in file.left(iter(pieces)):
        file.append(np.ones((2, 4), np.float32))
    assert file.finish().shape == (4, 4)


@NUMBERS
def test_an_evaluation_goes_on_without_a_cache_that_cannot_be_written(tmp_path, make_encoder, monkeypatch, number):
    said = []
    encoder = make_encoder()
    cached = CachedEncoder(encoder, tmp_path / "cache", log=said.append)
    expected = encoder.encode(["red cat", "blue dog"])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", failing(number))
        for _ in range(2):
            assert np.array_equal(cached.encode(["red cat", "blue dog"]), expected)
    assert len(said) == 1
    assert os.strerror(number) in said[0]


RESULTS = Results("t", "m", ["en"], 1, 1, 0.5, float("nan"), 0.5, float("nan"), [[0.5]], [0.5], [float("nan")])


@pytest.mark.parametrize("what", ["lexicon", "results", "values"])
def test_files_of_results_are_whole_or_not_there(tmp_path, monkeypatch, what):
    def write():
        values = PerQuery("t", ["1"], ["en"], {"mo": np.array([0.5])})
        if what == "lexicon":
            return write_lexicon([Entry("a", "b", 1.0, 1)], tmp_path / "sub" / "en_de.tsv")
        return (
            write_report(RESULTS, tmp_path / "sub" / "r.json")
            if what == "results"
            else values.write(tmp_path / "v.npz")
        )

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing(errno.ENOSPC))
        with pytest.raises(FileError, match=r"could not be written: No space left on device \(.* MiB free\)"):
            write()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    before = os.umask(0o027)
    try:
        write()
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o640}
