"""Search: FAISS beside the bare product with torch.topk; and, run as a program, every index at millions of vectors.

    python bench/bench_search.py --million 10

writes that many float16 vectors (384 dimensions: 7.7 GB for 10 million) to a file, searches them with 1,000 queries
by exact search, streamed, and by IVF and IVF-PQ, prints build time, search time, size, peak resident memory and recall
against exact, and deletes the file.

The vectors are made up, with structure for an index to find, as text embeddings have it: clusters of about 500 around
directions of their own, themselves around 1,000 topics; within a cluster the variance of the components falls off like
1 / rank, in an order of components that is shuffled. Queries are drawn like vectors. Each block of vectors is a
function of (seed, block).
"""

import argparse
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hbt_fast.evaluation.search import compare_indexes, search

TOPICS, PER_CLUSTER, BLOCK = 1000, 500, 100_000


class Clusters:
    """Unit vectors in clusters, drawn block by block."""

    def __init__(self, clusters, d, seed=0):
        rng = np.random.default_rng([seed, 0])
        topics = rng.standard_normal((TOPICS, d), dtype=np.float32)
        self.centres = topics[rng.integers(TOPICS, size=clusters)] + rng.standard_normal(
            (clusters, d), dtype=np.float32
        )
        self.centres /= np.linalg.norm(self.centres, axis=1, keepdims=True)
        spread = rng.permutation(np.arange(1, d + 1) ** -0.5).astype(np.float32)
        self.spread = 0.8 * spread / np.linalg.norm(spread)
        self.seed = seed

    def block(self, number, size=BLOCK):
        rng = np.random.default_rng([self.seed, 1, number])
        out_nd = rng.standard_normal((size, len(self.spread)), dtype=np.float32)
        out_nd *= self.spread
        out_nd += self.centres[rng.integers(len(self.centres), size=size)]
        out_nd /= np.linalg.norm(out_nd, axis=1, keepdims=True)
        return out_nd


@pytest.fixture(scope="module")
def vectors():
    """As many queries and candidates as XQuAD-R has, near enough."""
    clusters = Clusters(13_000 // 50, 384)
    return clusters.block(0, 2000), clusters.block(1, 13_000)


@pytest.mark.parametrize("k", [10, 100, 1000])
def test_exact_search(against_floor, vectors, k):
    queries, candidates = vectors
    q_Nd, p_Md = map(torch.from_numpy, vectors)
    against_floor(
        lambda: search(queries, candidates, k, device="cpu"),
        lambda: torch.topk(torch.mm(q_Nd, p_Md.T), k),
        "product and torch.topk",
        work=2 * len(queries) * candidates.size,
    )


@pytest.mark.parametrize("options", [{"index": "ivf"}, {"index": "ivf-pq"}], ids=["ivf", "ivf-pq"])
def test_build_and_search(against_floor, vectors, options):
    queries, candidates = vectors
    q_Nd, p_Md = map(torch.from_numpy, vectors)
    against_floor(
        lambda: search(queries, candidates, 100, device="cpu", **options),
        lambda: torch.topk(torch.mm(q_Nd, p_Md.T), 100),
        "product and torch.topk",
        rounds=2,
    )


def write(path, clusters, count, d):
    """`count` float16 vectors as a .npy file, a block at a time."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (count, d)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for number, start in enumerate(range(0, count, BLOCK)):
            clusters.block(number, min(BLOCK, count - start)).astype(np.float16).tofile(file)


def peak_gib():
    """GiB of this process's largest resident set since the last call, and forgets it."""
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=10)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--nlist", type=int, help="default: that of search, the square root of the number of vectors")
    parser.add_argument("--nprobe", type=int)
    parser.add_argument("--folder", help="where the vectors are written; default: the system's for temporary files")
    args = parser.parse_args()
    count = round(args.million * 1e6)
    clusters = Clusters(max(1, count // PER_CLUSTER), args.dimension)
    ivf = {"nlist": args.nlist, "nprobe": args.nprobe}
    indexes = [{"index": "ivf-pq"} | ivf, {"index": "ivf", "bits": 8} | ivf]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, started = Path(folder) / "vectors.npy", time.perf_counter()
        write(path, clusters, count, args.dimension)
        gb = path.stat().st_size / 1e9
        print(f"{count:,} x {args.dimension} in float16, {gb:.1f} GB, made in {time.perf_counter() - started:.0f} s")
        queries = clusters.block(-1 % 2**32, args.queries)
        del clusters
        peak_gib()
        compare_indexes(
            queries,
            np.load(path, mmap_mode="r"),
            args.k,
            indexes,
            log=lambda line: print(f"{line}@{args.k}   peak resident {peak_gib():.2f} GiB", flush=True),
        )


if __name__ == "__main__":
    main()
