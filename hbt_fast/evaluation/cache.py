"""Vectors kept on disk between evaluations: one .npy file per encoder, prompt and list of texts.

Its name is a hash of what the vectors depend on (`encoding.identity`: weights, tokenizer, settings, prompt) and of the
texts, so a changed model or corpus never meets old vectors. An encoding that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.encoding import How, identity
from hbt_fast.evaluation.run import ROWS, unnamed_file


def default_folder() -> Path:
    """Where the desktop keeps caches: $XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hbt_fast" / "embeddings"


class CachedEncoder:
    """An encoder that looks in a folder first; what `hbt_fast.evaluation.run.evaluate` needs of one.

    Args:
        encoder: whose weights do not change meanwhile.
        folder: of the vectors; it is made, and may be emptied at any time. None: nothing is kept. One that cannot be
            written or read is said once, and done without.
        dimensions: the first so many are given back, normalised again; None: all. Kept are whole vectors.
        log: told what was reused, and where vectors went.

    Raises:
        EncoderError: fewer dimensions than 1, or more than the encoder has.
    """

    def __init__(
        self,
        encoder: Encoder,
        folder: str | Path | None,
        dimensions: int | None = None,
        log: Callable[[str], None] = print,
    ) -> None:
        self.encoder, self.log, self.dimensions = encoder, log, dimensions or encoder.dimension
        if not 1 <= self.dimensions <= encoder.dimension:
            raise EncoderError(f"dimensions is {dimensions}; the encoder has {encoder.dimension}")
        self.folder = None if folder is None else Path(folder)
        self.identity = {} if folder is None else self._identity()

    def encode(self, texts: Sequence[str], prompt: str = "", progress: bool = False) -> np.ndarray:
        """(n, d) float32 unit vectors of the texts, from the folder if they are there.

        Args:
            texts: n strings.
            prompt: put before each of them.
            progress: show a progress bar on stderr.

        Raises:
            EncoderError: as `Encoder.encode` does, or because another process encodes the same texts at this moment.
        """
        if self.folder is None or not len(texts):
            return self.encoder.encode(texts, prompt, dimensions=self.dimensions, progress=progress)
        path = self.folder / f"{self._key(texts, prompt)}.npy"
        shape = (len(texts), self.encoder.dimension)
        try:
            vectors_nd = _vectors(path, shape)
            if vectors_nd is not None:
                self.log(f"{len(texts):,} vectors from {path}")
            else:
                self.encoder.encode(texts, prompt, out=path, progress=progress)
                self.log(f"{len(texts):,} vectors kept in {path}")
                vectors_nd = _vectors(path, shape)
            return vectors_nd if self.dimensions == shape[1] else _shortened(vectors_nd, self.dimensions)
        except OSError as error:  # a FileError too
            self.log(f"vectors are not kept: {error}")
            self.folder = None
            return self.encode(texts, prompt, progress)

    def _identity(self) -> dict[str, str | int]:
        """Without the prompt: a checksum of all weights takes a second or so, and a prompt changes none of them."""
        return identity(self.encoder, How("", 0, self.encoder.dimension, "float32"))

    def _key(self, texts: Sequence[str], prompt: str) -> str:
        state = xxhash.xxh3_128(json.dumps({**self.identity, "prompt": prompt}, sort_keys=True).encode())
        for text in texts:
            raw = text.encode("utf-8", "surrogatepass")
            state.update(len(raw).to_bytes(8, "little"))  # so that ["ab", "c"] is not ["a", "bc"]
            state.update(raw)
        return state.hexdigest()


def _vectors(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The file mapped into memory; None if it is not there or is damaged."""
    try:
        # Copy on write: torch warns of arrays that cannot be written to. Nobody writes, so nothing is copied.
        vectors_nd = np.load(path, mmap_mode="c", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return vectors_nd if vectors_nd.shape == shape and vectors_nd.dtype == np.float32 else None


def _shortened(vectors_nd: np.ndarray, dimensions: int) -> np.ndarray:
    """The first dimensions of every vector, normalised, in a file as the vectors are."""
    out_nd = unnamed_file((len(vectors_nd), dimensions), vectors_nd)
    for i in range(0, len(vectors_nd), ROWS):
        part_nd = torch.from_numpy(vectors_nd[i : i + ROWS, :dimensions])
        out_nd[i : i + ROWS] = torch.nn.functional.normalize(part_nd, dim=-1)
    return out_nd
