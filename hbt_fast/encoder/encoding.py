"""Encoding many texts: an iterable of any length in, vectors out, in its order.

Texts are taken a piece at a time: tokenised (while the piece before is embedded), sorted by length, packed into
micro-batches and embedded, here or in processes of their own. Vectors go into an array, or into a file that an
interrupted encoding goes on with.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from hbt_fast.data.pack import MicroBatch, pack
from hbt_fast.data.rows import DataError
from hbt_fast.data.tokenise import RowError
from hbt_fast.data.workers import Workers
from hbt_fast.encoder.model import Encoder, EncoderError
from hbt_fast.encoder.vector_file import VectorFile
from hbt_fast.heap import trim_heap

if TYPE_CHECKING:
    from tqdm import tqdm

PIECE = 4096  # texts
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class How:
    """What is asked for.

    Args:
        prompt: put before every text.
        batch_tokens: tokens per micro-batch, padding included.
        dimensions: the first so many are kept, and normalised (Matryoshka embeddings, arXiv 2205.13147).
        dtype: of the vectors, "float32" or "float16".
    """

    prompt: str
    batch_tokens: int
    dimensions: int
    dtype: str


def encode(
    encoder: Encoder,
    texts: Iterable[str],
    how: How,
    *,
    devices: Sequence[str] | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> np.ndarray:
    """See `Encoder.encode`."""
    from tqdm import tqdm

    _check(encoder, texts, how, devices, out)
    total = len(texts) if hasattr(texts, "__len__") else None
    rows = _Rows(total, how) if out is None else VectorFile(out, how.dimensions, how.dtype, identity(encoder, how))
    options = {"total": total, "initial": rows.done, "unit": "text", "unit_scale": True, "disable": not progress}
    training = encoder.training
    encoder.eval()
    try:
        with tqdm(desc="encoding", **options) as bar:
            pieces = _numbered(rows.left(_pieces(texts)), rows.done)
            made = _in_processes(encoder, devices, pieces, how, bar) if devices else _here(encoder, pieces, how, bar)
            with closing(made):
                for vectors_nd in made:
                    rows.append(vectors_nd)
        return rows.finish()
    finally:
        rows.close()
        encoder.train(training)


def embed(encoder: Encoder, texts: list[str], how: How, first: int = 0) -> np.ndarray:
    """The vectors of texts that fit the memory, (n, dimensions).

    Args:
        encoder: in evaluation mode.
        texts: at least one.
        how: what is asked for.
        first: number of the first, for messages.

    Raises:
        EncoderError: a text has no token, or more than the model has positions for; or its vector is not finite.
    """
    return _embedded(encoder, _packed(encoder, first, texts, how), how)


def identity(encoder: Encoder, how: How) -> dict[str, str | int]:
    """What the vectors of a text depend on, as JSON.

    Args:
        encoder: what encodes.
        how: what is asked for.
    """
    state = json.loads(encoder.tokenizer.backend_tokenizer.to_str())
    for remembered in ("truncation", "padding"):  # of its last texts
        state.pop(remembered, None)
    tokenizer = xxhash.xxh3_128_hexdigest(json.dumps(state).encode())
    volatile = ("_name_or_path", "transformers_version", "dtype")
    config = {name: value for name, value in encoder.model.config.to_dict().items() if name not in volatile}
    shape = json.dumps([config, str(encoder.dense)], sort_keys=True, default=str)
    settings = {"pooling": encoder.pooling, "max_length": encoder.max_length, "autocast": str(encoder.autocast)}
    return {
        "weights": weights_checksum(dict(encoder.named_parameters())),
        "model's config": xxhash.xxh3_128_hexdigest(shape.encode()),
        "tokenizer": tokenizer,
        **settings,
        **{name: value for name, value in asdict(how).items() if name != "batch_tokens"},
    }


def weights_checksum(parameters: dict[str, Tensor]) -> str:
    """A checksum of weights, names included.

    Args:
        parameters: by name.
    """
    state = xxhash.xxh3_128()
    for name, p in sorted(parameters.items()):
        state.update(name.encode())
        state.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


class _Rows:
    """Vectors in memory: in one array, if their number is known."""

    done = 0

    def __init__(self, total: int | None, how: How) -> None:
        self.whole_nd = None if total is None else np.empty((total, how.dimensions), how.dtype)
        self.parts = [] if total is not None else [np.empty((0, how.dimensions), how.dtype)]

    def left(self, pieces: Iterator[list[str]]) -> Iterator[list[str]]:
        return pieces

    def append(self, vectors_nd: np.ndarray) -> None:
        if self.whole_nd is None:
            self.parts.append(vectors_nd)
        else:
            self.whole_nd[self.done : self.done + len(vectors_nd)] = vectors_nd
        self.done += len(vectors_nd)

    def finish(self) -> np.ndarray:
        return np.concatenate(self.parts) if self.whole_nd is None else self.whole_nd[: self.done]

    def close(self) -> None:
        pass


def _check(encoder: Encoder, texts: Iterable[str], how: How, devices: Sequence[str] | None, out: Path | None) -> None:
    if isinstance(texts, str | bytes):
        raise EncoderError("texts is one string; give a list of them: [text]")
    if not 1 <= how.dimensions <= encoder.dimension:
        raise EncoderError(f"dimensions is {how.dimensions}; the encoder has {encoder.dimension}")
    if how.batch_tokens < 1:
        raise EncoderError(f"batch_tokens is {how.batch_tokens}; it must be at least 1")
    if how.dtype not in ("float32", "float16"):
        raise EncoderError(f"dtype is {how.dtype}; it can be float32 or float16")
    if out is not None and out.suffix != ".npy":
        raise EncoderError(f"out is {out}; its name must end in .npy")
    if isinstance(devices, str):
        raise EncoderError(f'devices is "{devices}"; give a list, one entry per process: ["cuda:0", "cuda:1"]')
    check_devices(devices or ())
    if devices and not hasattr(encoder.model, "save_pretrained"):
        raise EncoderError("devices: an encoder in 8 bits runs in this process alone; leave devices out")


def check_devices(names: Iterable[str]) -> None:
    """See that torch has these devices.

    Args:
        names: such as "cuda:1" or "cpu".

    Raises:
        EncoderError: it does not.
    """
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise EncoderError(f"devices: {name!r}: {str(error).splitlines()[0]}") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise EncoderError(f"devices: {name!r}, but torch sees {torch.cuda.device_count()} GPUs")


def _pieces(texts: Iterable[str]) -> Iterator[list[str]]:
    source, begin = iter(texts), 0
    while piece := list(islice(source, PIECE)):
        for i, text in enumerate(piece, begin):
            if not isinstance(text, str):
                raise EncoderError(f"text {i} is of type {type(text).__name__}, not a string")
        yield piece
        begin += len(piece)


def _numbered(pieces: Iterator[list[str]], first: int) -> Iterator[tuple[int, list[str]]]:
    """Each piece after the number of its first text."""
    for piece in pieces:
        yield first, piece
        first += len(piece)


def _here(encoder: Encoder, pieces: Iterator[tuple[int, list[str]]], how: How, bar: tqdm) -> Iterator[np.ndarray]:
    """The vectors of each piece; the next one is tokenised meanwhile."""
    ahead: deque[Future[_Packed]] = deque()
    with ThreadPoolExecutor(1) as threads:
        for piece in pieces:
            ahead.append(threads.submit(_packed, encoder, *piece, how))
            if len(ahead) == 2:
                yield _embedded(encoder, ahead.popleft().result(), how, bar)
                trim_heap()
        while ahead:
            yield _embedded(encoder, ahead.popleft().result(), how, bar)


class _Packed(NamedTuple):
    """A piece, tokenised: the number of its first text, its texts, and its micro-batches."""

    first: int
    piece: list[str]
    micro_batches: list[MicroBatch]


def _packed(encoder: Encoder, first: int, piece: list[str], how: How) -> _Packed:
    tokens, offsets = encoder.tokenise(piece, how.prompt, first)
    return _Packed(first, piece, pack(np.arange(len(piece)), tokens, offsets, how.batch_tokens))


@torch.inference_mode()
def _embedded(encoder: Encoder, packed: _Packed, how: How, bar: tqdm | None = None) -> np.ndarray:
    """The vectors of a piece, in the order of its texts."""
    first, piece, micro_batches = packed
    texts, tokens = len(piece), sum(len(m.tokens) for m in micro_batches)
    device = encoder.device
    out_nd = torch.empty(texts, how.dimensions, device=device, dtype=getattr(torch, how.dtype))
    for micro in micro_batches:
        vectors_nd = encoder(torch.from_numpy(micro.tokens).to(device), torch.from_numpy(micro.cu_seqlens))
        if how.dimensions < encoder.dimension:
            vectors_nd = torch.nn.functional.normalize(vectors_nd[:, : how.dimensions], dim=-1)
        out_nd[torch.from_numpy(micro.index).to(device)] = vectors_nd.to(out_nd.dtype)
        if bar is not None:
            bar.update(texts * len(micro.tokens) / tokens)
    finite_n = out_nd.isfinite().all(1)
    if not finite_n.all():
        bad = int(finite_n.int().argmin())
        raise EncoderError(
            f"the vector of text {first + bad} ({piece[bad][:60]!r}) holds NaN or infinity: the model is damaged, "
            f"or its numbers are too large for {encoder.autocast or _dtype(encoder)}; encode in "
            "fp32, or take another model"
        )
    return out_nd.cpu().numpy()


def _dtype(encoder: Encoder) -> str:
    return _name(next(encoder.parameters()).dtype)


def _in_processes(
    encoder: Encoder, devices: Sequence[str], pieces: Iterator[tuple[int, list[str]]], how: How, bar: tqdm
) -> Iterator[np.ndarray]:
    """As `_here`, by a process on each device, which gets the encoder as an exported folder."""
    from hbt_fast.encoder.export import export

    share = str(max(1, len(os.sched_getaffinity(0)) // len(devices)))
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = dict.fromkeys(threads, share) | {"PYTHONPATH": os.pathsep.join(paths)}
    died = "a process that encodes ended with status {status} (-9: killed, perhaps for memory); its output says why"
    with TemporaryDirectory(prefix="hbt-encode-") as folder:
        export(encoder, folder)
        setup = {"folder": folder, "weights": _name(next(encoder.parameters()).dtype), **asdict(how)}
        setup["autocast"] = encoder.autocast and _name(encoder.autocast)
        command = (sys.executable, "-m", "hbt_fast.encoder.worker")
        workers = Workers([((*command, str(device)), environment) for device in devices], setup, died)
        try:
            with closing(workers.map(pieces)) as answers:
                for answer in answers:
                    vectors_nd = answer["vectors"].reshape(-1, how.dimensions)
                    bar.update(len(vectors_nd))
                    yield vectors_nd
        except (RowError, DataError) as error:
            raise EncoderError(str(error)) from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
