"""How a loss will be computed, decided from shapes alone: which backend, how many products, how much memory.

Shapes: N queries of this rank, M passages of all ranks.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from hbt_fast.loss import tiles
from hbt_fast.loss.terms import BLOCK

PANEL_ROWS = 1024
TILE_ELEMENTS = 2**22
GPU_ROWS = 256  # panels on a GPU are multiples of it
VECTOR_BYTES = 64  # per query and passage: keys, statistics, and what sorting them takes
WAY: str | None = None  # "fused" or "sweep", for benchmarks that compare them; None: what is thought faster
MEMORY_SHARE = 8  # the default workspace is this part of free memory ...
SMALLEST_WORKSPACE, LARGEST_WORKSPACE = 64 * 2**20, 2**30  # ... within these bounds


@dataclass(frozen=True, slots=True)
class Plan:
    """A loss call's way. `str()` of it is a sentence or two for people.

    `passes` counts N x M x D products for the loss and both gradients, of all `matrices`: S, and one for each further
    direction but doc_to_query, by their columns. Of each, `panel_rows` are worked on at a time, in tiles of
    `tile_columns`; with `keep` all logits are held until the end. `operands` is what the products take, `way` how
    "triton" makes logits. `logit_bytes` is held at a time, `extra_bytes` all memory beyond inputs and gradients,
    further positives and own negatives left out.
    """

    backend: str
    passes: int
    panel_rows: int
    tile_columns: int
    keep: bool
    operands: torch.dtype
    way: str
    logit_bytes: int
    extra_bytes: int
    reason: str
    matrices: dict[str, int]

    def __str__(self) -> str:
        way = "all logits at once" if self.backend == "torch" else f"panels of {self.panel_rows:,} rows"
        kept = ", all kept" if self.keep and self.backend != "torch" else ""
        of = f" ({self.passes // len(self.matrices)} each of {', '.join(self.matrices)})" * (len(self.matrices) > 1)
        return (
            f'backend "{self.backend}" ({self.reason}): {self.passes} products{of}, {way}{kept}; beyond inputs and '
            f"gradients {self.extra_bytes / 2**20:,.1f} MiB, of them {self.logit_bytes / 2**20:,.1f} MiB logits"
        )


def explain(
    n: int,
    m: int,
    *,
    d: int = 768,
    dtype: torch.dtype = torch.float32,
    operands: torch.dtype | None = None,
    symmetric: bool = False,
    device: str | torch.device = "cpu",
    workspace_bytes: int | None = None,
    backend: str = "auto",
    beside: int | None = None,
    joint: tuple[str, ...] = (),
    queries: int | None = None,
) -> Plan:
    """The plan for a loss with its gradients. It depends on the arguments and, without `workspace_bytes`, free memory.

    Args:
        n: queries of this rank.
        m: passages of all ranks.
        d: width of the embeddings. It decides memory where these are halves, or the backend is "triton".
        dtype: of the embeddings; logits are float64 for float64, else float32.
        operands: of the products, for "triton": float16, bfloat16 or float32; None: dtype.
        symmetric: whether the passage-to-query half is computed too.
        device: of the embeddings.
        workspace_bytes: limit of logits and temporaries; None: an eighth of the free memory, 64 MiB to 1 GiB.
        backend: as for `info_nce`.
        beside: bytes of matrices of embeddings that are made besides: operands in another dtype, and sums of gradients
            that are not returned themselves. None: those of one process, positives being 0, 1, 2 ...
        joint: as for `info_nce`.
        queries: of all ranks, for "query_to_query"; None: n.

    Raises:
        ValueError: the backend cannot be had here, or `joint` is no tuple of directions; the message says why.
    """
    from hbt_fast.loss.arguments import check_joint

    check_joint(joint, symmetric)
    device = torch.device(device)
    backend, reason = backend_for(backend, device, dtype)
    operands = operands or dtype
    workspace = default_workspace(device) if workspace_bytes is None else workspace_bytes
    element = 8 if dtype == torch.float64 else 4
    columns = symmetric or "doc_to_query" in joint
    matrices = {"query_to_doc": m}
    if "doc_to_query" in joint:
        matrices = {"query_to_doc and doc_to_query": m}
    if "query_to_query" in joint:
        matrices["query_to_query"] = queries or n
    if "doc_to_doc" in joint:
        matrices["doc_to_doc"] = m
    statistics = element * 8 * (n + (m if columns else 0))
    in_all = sum(matrices.values())
    whole, row = element * n * in_all, element * in_all
    if backend == "torch":
        extra = (5 + 2 * columns) * whole + statistics
        return Plan(backend, 3 * len(matrices), n, m, True, dtype, "dense", whole, extra, reason, matrices)
    apart = dtype.itemsize < element  # results are halves: what is summed up lies apart from them
    if beside is None:
        held_as = operands.itemsize if backend == "triton" else element
        beside = (0 if dtype.itemsize == held_as else held_as * (n + m) * d) + (element * m * d if apart else 0)
        beside += element * 2 * n * d * ("query_to_query" in joint)  # gradients as columns beside those as rows
        beside += element * (2 * n + m) * d * ("doc_to_doc" in joint)
    if backend == "triton":
        beside += VECTOR_BYTES * (n + m)
        workspace -= beside

        def row_bytes(way: str) -> tuple[int, int]:
            """Of a row of a panel its matrix: exp(S) or, symmetric, the gradient; a sweep reads fp32 logits besides.
            And all that it takes: also statistics of tiles, weighted queries and the products."""
            matrix = operands.itemsize if way == "fused" or operands.itemsize == 4 else operands.itemsize + 4
            return matrix * in_all, matrix * in_all + 5 * in_all // 16 + (operands.itemsize + (4 if apart else 0)) * d

        keep = columns and n * row_bytes("sweep")[1] <= workspace
        way = "sweep" if keep else WAY or "fused"
        matrix, all_of_it = row_bytes(way)
        rows = min(n, n if keep else max(GPU_ROWS, workspace // all_of_it // GPU_ROWS * GPU_ROWS))
        passes, finishing = (
            len(matrices) * (4 if columns and not keep else 3),
            4 * (min(BLOCK, n * d) + (rows * d if apart else 0)),
        )
        extra = beside + max(rows * all_of_it, finishing)
        return Plan(backend, passes, rows, m, keep, operands, way, rows * matrix, extra, reason, matrices)

    # the compiled form needs no temporaries, torch three as large as a tile
    copies, tile = (0, TILE_ELEMENTS) if backend == "cpu" else (3, TILE_ELEMENTS // 4)

    def temporaries(rows: int) -> int:
        return copies * min(rows * row, element * tile)

    rows = min(n, PANEL_ROWS)
    while rows > 1 and rows * row + temporaries(rows) > workspace:
        rows = (rows + 1) // 2
    keep = columns and whole + temporaries(rows) <= workspace
    held = whole if keep else rows * row
    return Plan(
        backend=backend,
        passes=len(matrices) * (4 if columns and not keep else 3),
        panel_rows=rows,
        tile_columns=min(max(matrices.values()), max(1, tile // rows)),
        keep=keep,
        operands=dtype,
        way="tiles",
        logit_bytes=held,
        extra_bytes=held + temporaries(rows) + statistics + beside + (element * rows * d if apart else 0),
        reason=reason,
        matrices=matrices,
    )


def default_workspace(device: torch.device) -> int:
    """An eighth of the free memory, within bounds. It decides what is kept, and not a bit of the result."""
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return LARGEST_WORKSPACE  # a plan for another machine, or in a graph, where nothing is asked
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(free // MEMORY_SHARE, SMALLEST_WORKSPACE), LARGEST_WORKSPACE)


def backend_for(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend to use and why. Raises ValueError for one that cannot be had."""
    if backend in ("torch", "torch-chunked"):
        return backend, "as asked"
    no_cpu = no_triton = None
    if device.type != "cpu":
        no_cpu = f"the embeddings are on {device.type}"
    elif tiles.compiled() is None:
        no_cpu = "csrc/ was not built; install with a C++ compiler, torch and --no-build-isolation"
    if dtype == torch.float64:
        no_triton = "it computes in float32, and an embedding is float64"
    elif device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        no_triton = f"the embeddings are on {device.type}"
    elif importlib.util.find_spec("triton") is None:
        no_triton = "triton is not installed"
    elif device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        no_triton = "the GPU is older than Ampere (compute capability 8.0)"
    if backend == "auto" and device.type == "cuda":
        return ("torch-chunked", f"no Triton: {no_triton}") if no_triton else ("triton", "on a GPU")
    if backend == "auto":
        return ("torch-chunked", f"not compiled: {no_cpu}") if no_cpu else ("cpu", "compiled")
    for name, why_not in (("cpu", no_cpu), ("triton", no_triton)):
        if backend == name and why_not:
            raise ValueError(f"backend={name!r} cannot be used: {why_not}")
    return backend, "as asked"
