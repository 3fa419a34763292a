"""Which tokens of a model were kept when its vocabulary was cut: a field of tokenizer_config.json.

Everything that saves a tokenizer writes that field again, so it survives training and exporting, by whatever program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from hbt_fast.encoder.checkpoint_files import Fields, read_fields
from hbt_fast.encoder.model import EncoderError

KEPT = "kept_tokens"  # the field
RUNS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


@dataclass(frozen=True)
class Kept:
    """Which tokens of which model were kept; written as JSON.

    Attributes:
        model: name of the whole model, for messages.
        rows: of its table of embeddings.
        vocabulary: hash of its tokens and their ids.
        table: hash of its table of embeddings.
        ids: the old ids of the new ones 0, 1, ..., ascending, as "0-4,7,9-11".
    """

    model: str
    rows: int
    vocabulary: str
    table: str
    ids: str

    @property
    def old_k(self) -> np.ndarray:
        """(k,) int64: the old ids of the new ones."""
        runs = [[int(end) for end in run.split("-")] for run in self.ids.split(",")]
        return np.concatenate([np.arange(run[0], run[-1] + 1) for run in runs])

    @staticmethod
    def runs(old_k: np.ndarray) -> str:
        """Ascending ids as `ids` has them."""
        starts = np.flatnonzero(np.diff(old_k, prepend=-2) != 1)
        ends = old_k[np.append(starts[1:], len(old_k)) - 1]
        pairs = zip(old_k[starts].tolist(), ends.tolist(), strict=True)
        return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)

    @classmethod
    def read(cls, path: str) -> Kept:
        """What was kept of the model that a folder was cut from.

        Raises:
            EncoderError: nothing is written there, or something that is not of this form.
        """
        settings = read_fields(path, "tokenizer_config.json") or Fields(f"{path}/tokenizer_config.json", {})
        if not settings.object(KEPT).values:
            raise EncoderError(
                f'{settings.where}: it has no "{KEPT}", so it is not known which tokens of which model these are; give '
                f"a model that was trained from a folder which `cut` wrote, or copy the field from there"
            )
        fields = settings.object(KEPT)
        texts = {key: fields.text(key) for key in ("model", "vocabulary", "table", "ids")}
        made = cls(rows=fields.whole("rows"), **texts)
        if None in asdict(made).values() or not RUNS.fullmatch(made.ids):
            raise EncoderError(f"{fields.where} is damaged; copy it from the folder that the model was trained from")
        bounds = np.array(re.findall(r"\d+", made.ids), dtype=np.float64)  # a number of 100 digits is no reason to fail
        if (np.diff(bounds) < 0).any() or bounds[-1] >= made.rows or (np.diff(made.old_k) <= 0).any():
            raise EncoderError(
                f'{fields.where}: "ids" must be ascending numbers below {made.rows:,} (its "rows"); copy the '
                "field from the folder that the model was trained from"
            )
        return made


def vocabulary_hash(names: Mapping[int, str]) -> str:
    """A hash of tokens and their ids."""
    return xxhash.xxh3_128_hexdigest("\n".join(f"{number}\t{names[number]}" for number in sorted(names)).encode())


def table_hash(table_Vd: Tensor) -> str:
    """A hash of a table of embeddings: its bytes, in its dtype."""
    return xxhash.xxh3_128_hexdigest(table_Vd.contiguous().view(torch.uint8).numpy())
