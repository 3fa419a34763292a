"""How an evaluation was made: what its figures depend on besides the model, for `hbt_fast.compare` to remark on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from hbt_fast.evaluation.bitext_data import BitextTask
    from hbt_fast.evaluation.tasks import RetrievalTask

QUESTIONS, DATA = "questions", "passages and judgements"  # checksums in a result's settings

Made = dict[str, str | int]


def made_with(encoder: Any, precision: str, dimensions: int | None = None) -> Made:
    """What is to be recorded of an encoder.

    Args:
        encoder: anything that encodes; what it does not say of itself is left out.
        precision: of its products.
        dimensions: that were kept of its vectors; None: all.
    """
    known = {name: getattr(encoder, name, None) for name in ("pooling", "max_length")}
    found = {"precision": precision, **known, "dimensions": dimensions or getattr(encoder, "dimension", None)}
    return {name: value for name, value in found.items() if value is not None}


def made_on(task: RetrievalTask | BitextTask) -> Made:
    """Checksums of a task's texts and judgements, and the version of hbt_fast that evaluates."""
    if hasattr(task, "candidates"):
        questions = [task.queries, task.query_languages, task.query_ids]
        data = [task.candidates, task.candidate_languages, task.offsets, task.relevant, task.gains, task.ignored]
        data += [None, None] if task.pools is None else list(task.pools)
        found = {QUESTIONS: _checksum(questions), DATA: _checksum(data)}
    else:
        parts = [part for name in sorted(task.sentences) for part in ([name], task.sentences[name])]
        found = {QUESTIONS: _checksum([*parts, sorted(map(str, task.pairs))])}
    with suppress(PackageNotFoundError):  # of a source tree that is not installed
        found["version of hbt_fast"] = version("hbt_fast")
    return found


def _checksum(parts: Iterable[Iterable[str] | np.ndarray | None]) -> str:
    """Of lists of texts and of arrays; None is another than an empty one."""
    state = xxhash.xxh3_64()
    for part in parts:
        if part is None:
            state.update(b"\xff")
        elif isinstance(part, np.ndarray):
            state.update(np.ascontiguousarray(part).tobytes())
        else:
            for text in part:
                raw = text.encode("utf-8", "surrogatepass")
                state.update(len(raw).to_bytes(8, "little"))
                state.update(raw)
        state.update(b"\xfe")
    return state.hexdigest()
