"""A program that builds a store of made-up rows, for tests that kill it, run it twice or measure its memory.

python tests/store_builder.py FOLDER TOKENIZER.json SETTINGS, the settings as JSON: rows, chunk, workers, alone, seconds
(between journal lines), block (pairs sorted at a time), negatives, pause (seconds of sleep per chunk and sorted block),
naming (seconds of sleep before the store gets its name), measure. It prints a word when a chunk is in, when a block of
content keys is united, and when the store is about to get its name; then the number of rows and, if it was to measure,
its peak of anonymous memory.
"""

import json
import sys
import threading
import time
import types
from pathlib import Path

package = types.ModuleType("hbt_fast")  # its __init__ imports torch, which no part of this needs: 2 s less to start
package.__path__ = [str(Path(__file__).resolve().parents[1] / "hbt_fast")]
sys.modules["hbt_fast"] = package

from tokenizers import Tokenizer  # noqa: E402

from hbt_fast.data import build, contents, draft  # noqa: E402
from hbt_fast.data.rows import Row  # noqa: E402
from hbt_fast.data.store import Role  # noqa: E402


def made_up(count, negatives):
    """Rows that are a function of their number: some share passages, some content ids, some have more languages."""
    for i in range(count):
        passages = {"en": f"the {i if i % 7 else i // 2} of small birds"}
        if i % 97 == 96:
            passages["de"] = f"die {i // 3}"
        hard = {"en": tuple(f"the {j} of small birds" for j in range(i, i + 2))} if negatives and i % 3 == 0 else {}
        yield Row({"en": f"which {i % 1000}"}, passages, hard, f"c{i // 5}" if i % 11 == 0 else None, f"made:{i}")


def anonymous():
    """Bytes of memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def main(folder, tokenizer, settings):
    build.JOURNAL_SECONDS, contents.BLOCK = settings.get("seconds", 0.0), settings.get("block", 1 << 20)
    build.ALONE = settings.get("alone", build.ALONE)

    def saying(word, function, pause="pause"):
        def call(*arguments):
            result = function(*arguments)
            print(word, flush=True)
            time.sleep(settings.get(pause, 0.0))
            return result

        return call

    draft.Draft.add = saying("chunk", draft.Draft.add)
    contents._united = saying("united", contents._united)
    naming, publish = saying("naming", lambda: None, "naming"), build._publish
    build._publish = lambda *arguments: naming() or publish(*arguments)
    peak = [0]
    if settings.get("measure"):

        def watch():
            while True:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.002)

        threading.Thread(target=watch, daemon=True).start()
    backend = types.SimpleNamespace(
        backend_tokenizer=Tokenizer.from_file(tokenizer), split_special_tokens=False, truncation_side="right"
    )
    rows = made_up(settings["rows"], settings.get("negatives", True))
    roles = Role("Query: ", 12), Role("Passage: ", 12)
    made = build.build_source(
        folder, "made", rows, backend, *roles,
        workers=settings.get("workers", 0), progress=False, chunk_rows=settings.get("chunk", 64),
    )  # fmt: skip
    print(json.dumps({"rows": made.rows, "peak": peak[0]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
