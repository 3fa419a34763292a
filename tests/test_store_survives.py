"""A token store is whole or not there: kills, damage, several builders at once; and its building takes no memory."""

import filecmp
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hbt_fast.data.build import build_source
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import ARRAYS, Role, SourceStore

PROGRAM = Path(__file__).with_name("store_builder.py")
SETTINGS = {"rows": 2000, "chunk": 64, "block": 500}
CHUNKS = 32


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A quick tokenizer's file."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*"0123456789", "Query", ":", "Passage", "which", "the", "of", "small", "birds", "die", "[UNK]"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    split = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    path = tmp_path_factory.mktemp("core") / "tokenizer.json"
    made.save(str(path))
    return path


def start(folder, core, **settings):
    command = [sys.executable, str(PROGRAM), str(folder), str(core), json.dumps(SETTINGS | settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.split("\n")[:-1]


@pytest.fixture(scope="module")
def whole(core, tmp_path_factory):
    """What an undisturbed build gives."""
    folder = tmp_path_factory.mktemp("whole") / "made"
    said = finish(start(folder, core, seconds=100))
    assert said.count("chunk") == CHUNKS
    assert said.count("united") >= 10  # the content keys do not fit one block
    return folder


def files(folder):
    return sorted(p.name for p in folder.iterdir())


def assert_same(folder, other):
    assert files(folder) == files(other) == sorted(["source.json", *(f"{name}.npy" for name in ARRAYS)])
    _, different, broken = filecmp.cmpfiles(folder, other, files(folder), shallow=False)
    assert different == broken == []


def test_processes_do_not_change_a_byte(whole, core, tmp_path):
    said = finish(start(tmp_path / "made", core, workers=2, alone=3))
    assert said.count("chunk") == CHUNKS
    assert_same(tmp_path / "made", whole)


def test_kills_at_any_moment_lose_little_and_change_nothing(whole, core, tmp_path):
    # seven kills of one build: after some chunks, in the middle of numbering the contents, before the last rename
    folder, moments = tmp_path / "made", random.Random(7)
    done = 0
    for word, count in [
        *(("chunk", moments.randrange(2, 7)) for _ in range(4)),
        ("united", 3),
        ("united", 9),
        ("naming", 1),
    ]:
        process = start(folder, core, pause=0.02, naming=60, workers=2 * (count % 2), alone=1)
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if said.count(word) == count:
                break
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not folder.exists()
        with pytest.raises(DataError, match="no whole token store there"):
            SourceStore.open(folder.with_name("made.partial") if word != "naming" else folder)
        done += said.count("chunk")
        lines = (folder.with_name("made.partial") / "journal.jsonl").read_bytes().splitlines()
        assert json.loads(lines[-1] if lines[-1].endswith(b"}") else lines[-2])["rows"] >= min(2000, (done - 7) * 64)
    said = finish(start(folder, core))
    assert said.count("chunk") == said.count("united") == 0  # it was whole but for its name
    assert done <= CHUNKS + 5  # each kill loses one chunk at most: each chunk has its line in the journal
    assert_same(folder, whole)


def test_a_torn_line_of_the_journal_is_passed_over(whole, core, tmp_path):
    folder, journal = tmp_path / "made", tmp_path / "made.partial" / "journal.jsonl"
    for before, chunks in ((0, 6), (4, 9)):  # the second time lines follow the place of the torn one
        process = start(folder, core, pause=0.02)
        for _ in range(chunks):
            process.stdout.readline()
        process.kill()
        process.wait()
        lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) >= before + chunks - 1
        if not before:
            journal.write_bytes(b"".join(lines[:4]) + lines[4][:100])
    assert finish(start(folder, core)).count("chunk") <= CHUNKS - 4 - 8
    assert_same(folder, whole)


def test_a_draft_that_was_damaged_or_is_of_other_settings_is_not_gone_on_from(tmp_path, tokenizer):
    def build(chunk_rows=10):
        rows = (Row({"en": f"q{i}"}, {"en": f"p{i}"}) for i in range(100))
        roles = Role("", 9), Role("", 9)
        build_source(tmp_path / "s", "s", rows, tokenizer, *roles, progress=False, chunk_rows=chunk_rows)

    def stopping(*_):
        raise RuntimeError

    work = tmp_path / "s.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hbt_fast.data.draft.label_contents", stopping)
        with pytest.raises(RuntimeError):
            build()
    assert json.loads((work / "journal.jsonl").read_text().splitlines()[-1])["complete"]
    path = work / "tokens.npy"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokens.npy: damaged since an interrupted run wrote it; delete .*s.partial"):
        build()
    build(chunk_rows=20)  # other settings: nothing of the draft is used
    assert SourceStore.open(tmp_path / "s").rows == 100


def test_a_draft_is_not_continued_with_other_rows(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hbt_fast.data.build.JOURNAL_SECONDS", 0.0)

    def rows(first, bad):
        for i in range(first, first + 100):
            yield Row({"en": f"q{i}"}, {"en": f"p{i}"} if i != bad else {}, where=f"file:{i}")

    roles = Role("", 9), Role("", 9)
    with pytest.raises(DataError, match="file:57: a row needs at least one query and one passage"):
        build_source(tmp_path / "s", "s", rows(0, 57), tokenizer, *roles, progress=False, chunk_rows=10)
    for other in (rows(1, -1), iter(())):
        with pytest.raises(DataError, match=r"does not give the rows that it gave to an interrupted run; delete"):
            build_source(tmp_path / "s", "s", other, tokenizer, *roles, progress=False, chunk_rows=10)
    assert build_source(tmp_path / "s", "s", rows(0, -1), tokenizer, *roles, progress=False, chunk_rows=10).rows == 100


def test_of_several_builders_one_builds_and_the_others_wait_for_it(whole, core, tmp_path):
    processes = [start(tmp_path / "made", core, pause=0.01) for _ in range(3)]
    said = [finish(process) for process in processes]
    assert sorted(words.count("chunk") for words in said) == [0, 0, CHUNKS]
    assert [json.loads(words[-1])["rows"] for words in said] == [2000] * 3
    assert_same(tmp_path / "made", whole)
    assert files(tmp_path) == ["made"]


@pytest.mark.parametrize("name", ARRAYS)
def test_a_store_with_a_damaged_array_is_refused(whole, tmp_path, name):
    folder = tmp_path / "made"
    shutil.copytree(whole, folder)
    path, content = folder / f"{name}.npy", (whole / f"{name}.npy").read_bytes()
    if len(content) > 128:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{name}.npy: its checksum is not that of what was written.*delete .*made"):
            SourceStore.open(folder)
        SourceStore.open(folder, verify=False)
    path.write_bytes(content[:-3])
    with pytest.raises(DataError, match=f"{name}.npy: missing or damaged.*delete .*made"):
        SourceStore.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}.npy: missing or damaged.*delete .*made"):
        SourceStore.open(folder, verify=False)


def test_a_store_without_or_with_half_of_its_description_is_refused(whole, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(whole, folder)
    (folder / "source.json").write_text((whole / "source.json").read_text()[:-9])
    with pytest.raises(DataError, match="no whole token store there"):
        SourceStore.open(folder)
    (folder / "source.json").write_text((whole / "source.json").read_text().replace('"format": 4', '"format": 9'))
    with pytest.raises(DataError, match=r"format 9, this program reads 4; delete the folder"):
        SourceStore.open(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_four_times_the_rows_take_no_more_memory(core, tmp_path):
    peaks = []
    for rows in (40_000, 160_000):
        process = start(tmp_path / str(rows), core, rows=rows, chunk=1024, block=1 << 14, seconds=1, measure=True)
        peaks.append(json.loads(finish(process)[-1])["peak"])
    assert peaks[0] > 2**20
    on_disk = sum(path.stat().st_size for path in (tmp_path / "160000").iterdir())
    assert on_disk > 24 * 2**20  # what would be held if anything were
    assert peaks[1] - peaks[0] < 4 * 2**20
