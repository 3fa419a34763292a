"""What a graph takes is measured, as many as fit the memory are kept; tokens per micro-batch are found by trying."""

import gc
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_zero_equals_plain_adamw import settings, tiny_towers

from hbt_fast.data.pack import MicroBatch, pack, repack
from hbt_fast.engine.launch import World, make_engine
from hbt_fast.engine.memory import KeptGraphs, free_bytes, out_of_memory
from hbt_fast.engine.step import Stepper
from hbt_fast.engine.tuning import TokenSearch
from hbt_fast.train import make_feed, make_planner

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def micro(rows: int, length: int) -> MicroBatch:
    tokens = np.resize(np.arange(3, 99), rows * length).astype(np.int32)
    return MicroBatch(np.arange(rows), tokens, np.arange(0, rows * length + 1, length, dtype=np.int32))


def inputs(batch: MicroBatch):
    return torch.from_numpy(batch.tokens), torch.from_numpy(batch.cu_seqlens)


def held(towers, out) -> int:
    """Bytes that the nodes of a graph have saved, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in towers.parameters()}
    seen, nodes, saved = set(), [out.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            values = getattr(node, name) if name.startswith("_saved") else None
            for value in values if isinstance(values, tuple | list) else (values,):
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in weights:
                    saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(saved.values())


@pytest.mark.parametrize(("rows", "length"), [(4, 8), (16, 8), (8, 30)])
def test_what_a_graph_takes_is_what_its_nodes_saved(rows, length):
    towers = tiny_towers(settings(), dropout=0.1).train()
    graphs = KeptGraphs(towers, CPU)
    batch = micro(rows, length)
    with graphs.measured(batch):
        out, _ = towers(*inputs(batch))
    assert graphs.seen[0][:2] == (rows * length, length)
    assert graphs.seen[0][2] == pytest.approx(held(towers, towers(*inputs(batch))[0]), rel=0.02)
    assert out.requires_grad


def test_estimates_never_fall_below_what_was_seen_and_follow_the_shape():
    towers = tiny_towers(settings()).train()
    graphs = KeptGraphs(towers, CPU)
    for rows, length in ((2, 30), (3, 20), (6, 10), (12, 5)):
        with graphs.measured(micro(rows, length)):
            towers(*inputs(micro(rows, length)))
    seen = [micro(rows, length) for rows, length in ((2, 30), (3, 20), (6, 10), (12, 5))]
    for expected, (_, _, true) in zip(graphs.expected(seen), graphs.seen, strict=True):
        assert true * 0.999 <= expected <= 1.3 * true
    for rows, length in ((20, 30), (1, 12), (40, 6)):  # much larger, much smaller
        other = KeptGraphs(towers, CPU)
        with other.measured(micro(rows, length)):
            towers(*inputs(micro(rows, length)))
        assert graphs.expected([micro(rows, length)])[0] == pytest.approx(other.seen[0][2], rel=0.35)


def test_the_first_is_kept_and_as_many_as_fit_those_before_others_that_save_most():
    graphs = KeptGraphs(torch.nn.Linear(1, 1), CPU, limit=1000)
    batches = [micro(5, 10), micro(4, 10), micro(2, 10), micro(3, 10), micro(1, 10)]
    assert graphs.choose(batches) == [True] + [False] * 4, "nothing was measured yet"
    graphs.seen = [(10, 10, 100), (20, 10, 200), (40, 10, 400)]
    chosen = (0, [0]), (390, [0, 3]), (401, [0, 1]), (702, [0, 1, 3]), (620, [0, 1, 2]), (10**6, [0, 1, 2, 3, 4])
    for limit, expected in chosen:
        graphs.limit = limit
        assert [k for k, keep in enumerate(graphs.choose(batches)) if keep] == expected, limit
    graphs.limit = 801
    graphs.shrink()
    assert graphs.limit == 400


def test_without_a_limit_half_of_the_free_memory_is_taken(monkeypatch):
    graphs = KeptGraphs(torch.nn.Linear(1, 1), CPU)
    graphs.seen = [(10, 10, 100), (40, 10, 400)]
    monkeypatch.setattr("hbt_fast.engine.memory.free_bytes", lambda device: 3000)
    graphs.choose([micro(4, 10)])
    assert graphs.limit == pytest.approx(0.5 * 3000 - 2 * 400, abs=2)
    assert 2**20 < free_bytes(CPU) < 2**50


def test_free_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    alone = free_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == pytest.approx(alone / 4, rel=0.2)


def test_the_first_step_measures_and_the_next_keep_what_fits(store):
    def kept(keep_gib):
        config = settings(keep_gib=keep_gib)
        stepper = Stepper(make_engine(tiny_towers(config).train(), config.train, ALONE), config, ALONE)
        with make_feed(make_planner(store, config), store, config, ALONE, budget=120) as feed:
            return [round(stepper(next(feed), 1e-3).kept, 2) for _ in range(3)]

    none = kept(0)
    assert len(set(none)) == 1
    assert 0 < none[0] < 0.5
    assert kept("auto") == kept(1) == [0, 1, 1]
    first, *rest = kept(0.0005)
    assert first == 0
    assert all(none[0] < share < 1 for share in rest)


class Saved:
    """What a graph has saved; knows how many bytes all graphs hold, and the most they held."""

    now = most = 0

    def __init__(self, tensor):
        self.tensor, self.bytes = tensor, tensor.untyped_storage().nbytes()
        Saved.now += self.bytes
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self):
        Saved.now -= self.bytes


def test_the_graph_of_the_first_takes_no_memory_that_the_others_do_not(store):
    def most(keep):
        config = settings(keep_gib=0)
        stepper = Stepper(make_engine(tiny_towers(config).train(), config.train, ALONE), config, ALONE)
        if keep is not None:
            stepper.graphs.choose = lambda micro_batches: [k in keep for k in range(len(micro_batches))]
        with make_feed(make_planner(store, config), store, config, ALONE, budget=120) as feed:
            batch = next(feed)
        gc.collect()
        Saved.now = Saved.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            stepper(batch, 1e-3)
        return Saved.most

    assert most(None) == most({}) < most({0, 1}) < most({0, 1, 2})


REPEATED = """
import ctypes, resource, sys
from hbt_fast.engine.memory import reuse_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "reuse":
    reuse_freed_memory()

def faults(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        block = libc.malloc(mebibytes * 2**20)
        ctypes.memset(block, 1, mebibytes * 2**20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(64)
print(min(faults(mebibytes) for mebibytes in (20, 60)), max(faults(mebibytes) for mebibytes in (20, 60)))
"""


def test_freed_memory_is_taken_again_without_a_page_fault():
    def faults(how):
        run = subprocess.run([sys.executable, "-c", REPEATED, how], capture_output=True, check=True)
        return [int(count) for count in run.stdout.split()]

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    assert max(faults("reuse")) < 100
    assert max(faults("as it is")) > 10_000


def test_packing_again_is_packing(store):
    source = store.sources[0]
    texts = np.random.default_rng(0).permutation(200)
    packed = pack(texts, source.tokens, source.token_offsets, 300)
    for budget in (1, 50, 299, 10**5):
        again, fresh = repack(packed, budget), pack(texts, source.tokens, source.token_offsets, budget)
        assert len(again) == len(fresh)
        for a, b in zip(again, fresh, strict=True):
            for name in ("index", "tokens", "cu_seqlens"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def search(start, cost, most=None):
    """What is found where a step of so many tokens costs so much, and all that was tried."""
    found, tried = TokenSearch(start), []
    for _ in range(100):
        if found.done:
            return found.tokens, tried[1::2]
        tried.append(found.tokens)
        found.observe(cost(found.tokens), most is not None and found.tokens >= most)
    pytest.fail("no end")


def test_the_search_finds_the_fastest_number_of_tokens():
    def bowl(best):
        return lambda tokens: 1 + abs(np.log2(tokens / best))

    assert search(1024, bowl(8192)) == (8192, [1024, 2048, 4096, 8192, 16384])
    assert search(1024, bowl(1024)) == (1024, [1024, 2048, 512])
    assert search(1024, bowl(256)) == (256, [1024, 2048, 512, 256, 128])
    assert search(1024, bowl(128))[0] == 128
    assert search(1024, lambda tokens: 1.0) == (1024, [1024, 2048, 512]), "what is no faster is not taken"
    assert search(1024, bowl(10**9), most=4096) == (4096, [1024, 2048, 4096])
    noisy = iter([9, 9, 1, 5, 9, 9, 9, 9])  # the first is not counted, of two the better is
    assert search(1024, lambda tokens: next(noisy))[0] == 1024


def test_auto_finds_a_number_keeps_it_and_resumes_with_it(store):
    config, said = settings(micro_batch_tokens="auto"), []
    engine = make_engine(tiny_towers(config).train(), config.train, ALONE)
    stepper = Stepper(engine, config, ALONE, said.append)
    tokens = []
    with make_feed(make_planner(store, config), store, config, ALONE, budget=stepper.tokens) as feed:
        for _ in range(40):
            result = stepper(next(feed), 1e-3)
            assert result.trouble is None
            tokens.append(result.micro_batch_tokens)
            feed.set_budget(stepper.tokens)
            if stepper.search.done:
                break
    assert len(set(tokens)) > 1
    assert said == [f"train.micro_batch_tokens: {stepper.tokens} were found to be fastest"]
    again = Stepper(engine, config, ALONE, found=stepper.state())
    assert again.search is None
    assert again.tokens == stepper.tokens


def test_errors_that_mean_that_memory_ran_out():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("out of memory"))
