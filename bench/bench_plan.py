"""Planning an epoch of a million pairs from four data sets, beside sentence-transformers' sampler for the same job; and
what it costs that one query in thirty has several answers.
"""

import statistics
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hbt_fast.data.build import build_source
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import Row
from hbt_fast.data.shares import BatchConfig
from hbt_fast.data.store import Role, Store

BATCH, SETS, ROWS = 8192, 4, 250_000


@pytest.fixture(scope="module")
def pairs():
    """(query, passage) of each data set; one passage in thirty answers two queries or more, one query in thirty has two
    answers or more.
    """
    rng = np.random.default_rng(0)
    passages = [rng.integers(0, 15 * ROWS, ROWS).tolist() for _ in range(SETS)]
    queries = [rng.integers(0, 15 * ROWS, ROWS).tolist() for _ in range(SETS)]
    return [
        [(f"ask {s} {q}", f"say {s} {p}") for q, p in zip(queries[s], passages[s], strict=True)] for s in range(SETS)
    ]


@pytest.fixture(scope="module")
def store(pairs, tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({"?": 0, "ask": 1, "say": 2}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer, folder = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"), tmp_path_factory.mktemp("bench")
    languages = ("de", "en")
    sources = []
    for s, rows in enumerate(pairs):
        stream = (Row(dict.fromkeys(languages, q), dict.fromkeys(languages, p)) for q, p in rows)
        sources.append(build_source(folder / str(s), f"set{s}", stream, tokenizer, Role("", 64), Role("", 64)))
    return Store(tuple(sources), (None,) * SETS)


def rival_epoch(pairs):
    """One epoch of ProportionalBatchSampler over hashed NoDuplicatesBatchSamplers; hashes are made beforehand."""
    from datasets import Dataset
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler, ProportionalBatchSampler

    sets = [Dataset.from_dict({"query": [q for q, _ in rows], "passage": [p for _, p in rows]}) for rows in pairs]
    samplers = [
        NoDuplicatesBatchSampler(
            data, BATCH, drop_last=True, generator=torch.Generator(), precompute_hashes=True, precompute_num_proc=1
        )
        for data in sets
    ]
    for sampler in samplers:
        sampler._build_hashes()
    whole = torch.utils.data.ConcatDataset(sets)
    sampler = ProportionalBatchSampler(whole, samplers, generator=torch.Generator(), seed=0)
    return lambda: sum(len(batch) for batch in sampler)


@pytest.mark.parametrize("strategy", ["mono", "cross", "hybrid"])
def test_epoch(benchmark, add_line, store, pairs, strategy):
    torch.set_num_threads(1)
    planner = BatchPlanner(store, BatchConfig(BATCH, strategy=strategy), seed=0)
    steps = SETS * ROWS // BATCH
    epoch = rival_epoch(pairs)
    planner.plan(0)
    ours, rival = [], []
    for round_ in range(3):  # interleaved, in CPU time of this thread; each planner goes on where it was
        began = time.thread_time()
        for step in range(round_ * steps, (round_ + 1) * steps):
            planner.plan(step)
        middle = time.thread_time()
        count = epoch()
        ours.append((middle - began) / (steps * BATCH))
        rival.append((time.thread_time() - middle) / count)
    mine, other = statistics.median(ours), statistics.median(rival)
    add_line(
        **{
            "benchmark": f"epoch {strategy}, {1e-6 / mine:.1f}M pairs/s; floor: sentence-transformers",
            "median ms": f"{mine * steps * BATCH * 1e3:.0f}",
            "floor ms": f"{other * steps * BATCH * 1e3:.0f}",
            "ratio": f"1/{statistics.median(r / o for r, o in zip(rival, ours, strict=True)):.0f}",
        }
    )
    benchmark.pedantic(lambda: planner.plan(0), rounds=3)


@pytest.mark.parametrize("strategy", ["mono", "cross", "hybrid"])
def test_what_questions_with_several_answers_cost(benchmark, add_line, store, strategy):
    nothing = np.empty(0, np.int64)
    without = {"row_answers": nothing, "answers": nothing}
    planners = [
        BatchPlanner(one, BatchConfig(BATCH, strategy=strategy), seed=0)
        for one in (store, replace(store, sources=tuple(replace(source, **without) for source in store.sources)))
    ]
    times = ([], [])
    for planner in planners:
        planner.plan(0)
    for step in range(2 * SETS * ROWS // BATCH):  # interleaved, in CPU time of this thread
        for planner, own in zip(planners, times, strict=True):
            began = time.thread_time()
            planner.plan(step)
            own.append(time.thread_time() - began)
    share = sum(len(source.row_answers) and np.mean(source.row_answers >= 0) for source in store.sources) / SETS
    add_line(
        **{
            "benchmark": f"plan {strategy}, {share:.0%} of the rows with several answers; floor: without the guarantee",
            "median ms": f"{statistics.median(times[0]) * 1e3:.2f}",
            "floor ms": f"{statistics.median(times[1]) * 1e3:.2f}",
            "ratio": f"{statistics.median(a / b for a, b in zip(*times, strict=True)):.2f}",
        }
    )
    benchmark.pedantic(lambda: planners[0].plan(0), rounds=3)
