"""Indexes of FAISS for `search`: which one, whether on GPUs, trained on a sample and filled shard by shard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbt_fast.evaluation.shards import Candidates, sample, shards

GPU_MAX_K = 2048  # FAISS's GPU kernels hold the top k in registers and shared memory and stop here; nprobe likewise
LEAST_PER_LIST = 39  # with fewer training vectors per cluster FAISS calls a clustering poor
TRAIN_PER_LIST = 64  # what is drawn; FAISS looks at no more than 256
MAX_CODES = 96  # the most codes per vector that FAISS's GPU kernels take


@dataclass(frozen=True)
class Plan:
    """What is searched in; `search` says what the options are.

    Args:
        index: "flat", "ivf" or "ivf-pq".
        d: dimension.
        rows: most rows of a shard.
        count: M; 0: not known yet ("flat" only).
        nlist: 0: not an IVF index.
        nprobe: 0: not an IVF index.
        m: 0: whole components are stored.
        bits: per component, or per code if m > 0.
    """

    index: str
    d: int
    rows: int
    count: int
    nlist: int = 0
    nprobe: int = 0
    m: int = 0
    bits: int = 32

    @property
    def factory(self) -> str:
        """The index in the language of faiss.index_factory."""
        if self.index == "flat":
            return "Flat"
        # np: without polysemous training, which serves a search by bits that is not used and takes minutes.
        code = f"PQ{self.m}x{self.bits}np" if self.m else {32: "Flat", 16: "SQfp16", 8: "SQ8"}[self.bits]
        return f"IVF{self.nlist},{code}"

    @property
    def bytes(self) -> int:
        """What candidates take in memory: one shard, or all codes with 8 bytes each for a number, and the centroids."""
        if self.index == "flat":
            return 4 * self.d * min(self.rows, self.count or self.rows)
        code = math.ceil((self.m or self.d) * self.bits / 8)
        return self.count * (code + 8) + 4 * self.d * self.nlist

    @property
    def training(self) -> int:
        """How many candidates an IVF index is trained on."""
        return min(self.count, TRAIN_PER_LIST * max(self.nlist, 2**self.bits if self.m else 1))


def make_plan(
    index: str, d: int, rows: int, count: int, nlist: int | None, nprobe: int | None, m: int | None, bits: int | None
) -> Plan:
    """Checks the options of an index and fills in those that are None, by the rules that `search` states.

    Raises:
        ValueError: an unknown index, an option out of range or without meaning to the index, too few candidates.
    """
    if index not in ("flat", "ivf", "ivf-pq"):
        raise ValueError(f'index must be "flat", "ivf" or "ivf-pq", not {index!r}')
    needless = {"flat": {"nlist": nlist, "nprobe": nprobe, "m": m, "bits": bits}, "ivf": {"m": m}}.get(index, {})
    for option, value in needless.items():
        if value is not None:
            raise ValueError(f'{option} = {value} means nothing to index="{index}": leave it out')
    if index == "flat":
        return Plan(index, d, rows, count)
    well = max(1, count // LEAST_PER_LIST)
    nlist = min(well, round(math.sqrt(count))) if nlist is None else nlist
    if not 1 <= nlist <= count:
        raise ValueError(
            f"nlist = {nlist} clusters cannot be trained on {count} candidates: write 1 .. {well}, or leave it out"
        )
    nprobe = min(nlist, round(2 * math.sqrt(nlist))) if nprobe is None else nprobe
    if not 1 <= nprobe <= nlist:
        raise ValueError(f"nprobe = {nprobe} must lie in 1 .. {nlist}, the number of clusters (nlist)")
    if index == "ivf":
        bits = 32 if bits is None else bits
        if bits not in (32, 16, 8):
            raise ValueError(f'bits = {bits}, but index="ivf" stores components in 32, 16 or 8 bits')
        return Plan(index, d, rows, count, nlist, nprobe, 0, bits)
    bits = 8 if bits is None else bits
    if not 4 <= bits <= 12:
        raise ValueError(f'bits = {bits}, but a code of index="ivf-pq" has 4 to 12')
    m = _codes(d) if m is None else m
    if m < 1 or d % m:
        raise ValueError(f"m = {m} codes cannot share {d} dimensions out evenly: write a divisor of {d}")
    if count < 2**bits:
        raise ValueError(
            f'index="ivf-pq" learns {2**bits} values for each {bits}-bit code but has {count} candidates to learn '
            'from: take index="flat", "ivf" or fewer bits'
        )
    return Plan(index, d, rows, count, nlist, nprobe, m, bits)


def _codes(d: int) -> int:
    return max(m for m in range(1, min(max(d // 8, 1), MAX_CODES) + 1) if d % m == 0)


def on_gpus(device: str, plan: Plan, k: int) -> bool:
    """Whether to search on GPUs: "auto" does where FAISS has one and its limits allow.

    Raises:
        ValueError: an unknown device, or "cuda" where it cannot be.
    """
    import faiss

    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", not {device!r}')
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if device == "cuda" and gpus == 0:
        raise ValueError('device="cuda", but this FAISS sees no GPU: install faiss-gpu or take device="cpu"')
    limits = [
        (f"k = {k}", f"k <= {GPU_MAX_K}", k <= GPU_MAX_K),
        (f"nprobe = {plan.nprobe}", f"nprobe <= {GPU_MAX_K}", plan.nprobe <= GPU_MAX_K),
        (f"bits = {plan.bits}", 'bits = 8 for index="ivf-pq"', plan.m == 0 or plan.bits == 8),
    ]
    for given, allowed, kept in limits:
        if device == "cuda" and not kept:
            raise ValueError(f'{given}, but FAISS on a GPU allows {allowed}: write that, or take device="cpu"')
    return device != "cpu" and gpus > 0 and all(kept for _, _, kept in limits)


def to_gpus(index: Any, half_tables: bool = False) -> Any:
    """A copy of a FAISS index on all GPUs that FAISS sees, of which each gets its share of the vectors."""
    import faiss

    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    options.useFloat16 = half_tables
    return faiss.index_cpu_to_all_gpus(index, co=options)


def build(candidates: Candidates, plan: Plan, gpus: bool) -> Any:
    """An IVF index of FAISS, trained on a sample of the candidates and filled with all of them, shard by shard."""
    import faiss

    index = faiss.index_factory(plan.d, plan.factory, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = plan.nprobe
    index.cp.min_points_per_centroid = 1  # no warning on stderr about what `search` has as a rule
    if plan.m:
        index.pq.cp.min_points_per_centroid = 1
        index.pq.cp.max_points_per_centroid = TRAIN_PER_LIST
    clustering = to_gpus(faiss.IndexFlatIP(plan.d)) if gpus else None  # the name keeps it alive while FAISS uses it
    index.clustering_index = clustering
    index.train(sample(candidates, plan.d, plan.rows, plan.training))
    index.clustering_index = None
    if gpus:
        index = to_gpus(index, half_tables=plan.m > 48)  # longer lookup tables fit a GPU in half precision only
    for _, p_sd in shards(candidates, plan.d, plan.rows):
        index.add(p_sd)
        del p_sd
    return index


def find(index: Any, q_Nd: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The top k of a built index, by (score, then lower index); -inf and -1 where it finds fewer."""
    scores, indices = index.search(q_Nd, k)
    scores[indices < 0] = -np.inf
    order = np.lexsort((indices, -scores), axis=1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)
