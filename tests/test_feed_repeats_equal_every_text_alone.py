"""Equal texts encoded once, on any rank that has them, give the update of every text encoded by itself."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from hbt_fast.config import BatchConfig, Config, TrainConfig
from hbt_fast.data.feed import rank_batch
from hbt_fast.data.plan import BatchPlan
from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch
from hbt_fast.encoder.towers import Towers
from hbt_fast.engine.cached_step import add_up
from hbt_fast.engine.launch import World, make_engine, start
from hbt_fast.engine.step import Stepper

N = 12
TOLERANCE = 1e-10  # float64; measured 3e-15


def problem():
    """12 rows: query 0 comes three times, once as another text; two passages have three rows each."""
    rng = np.random.default_rng(0)
    words = [rng.integers(3, 50, rng.integers(2, 9)).astype(np.int32) for _ in range(60)]
    words[5] = words[0].copy()
    words[50] = words[30].copy()  # a passage that is also a hard negative, under one content
    offsets = np.cumsum([0, *map(len, words)])
    hashes = np.array([len(word) for word in words], np.uint64)
    source = SimpleNamespace(tokens=np.concatenate(words), token_offsets=offsets, token_hashes=hashes)
    queries, passages = np.arange(N), 30 + np.arange(N)
    queries[7] = 0
    passages[[3, 8]] = 30
    passages[[9, 10]] = 31
    languages = np.zeros(N, np.int32)
    negatives, owners = np.array([50, 51, 52, 53, 51]), np.array([1, 1, 4, 9, 11])
    pairs = (np.arange(N), languages, languages, queries, passages, passages)
    contents = np.where(negatives == 50, 30, negatives)
    ids = np.concatenate([pairs[-1], contents])
    return BatchPlan(0, "mono", 0, *pairs, negatives, contents, owners, 0, ids), source


def encoder():
    tokenizer = SimpleNamespace(pad_token_id=1, bos_token_id=0, eos_token_id=2, __len__=None)
    tokenizer = type("Tokenizer", (), {**vars(tokenizer), "__len__": lambda self: 50})()
    made = encoder_from_scratch(tokenizer, ScratchConfig(50, 16, 2, 2), max_length=16, dropout=0.0, seed=3)
    return Towers([made.double().train()])


def settings():
    train = TrainConfig(clip=1e9, micro_batch_tokens=20, engine="torch", precision="fp32")
    return Config(batch=BatchConfig(size=N), train=train)


@pytest.fixture(scope="module")
def truth():
    """The update in plain torch: every text alone, passages of a query's own content left out."""
    plan, source = problem()
    made = encoder()

    def embed(texts):
        alone = [torch.from_numpy(source.tokens[source.token_offsets[t] : source.token_offsets[t + 1]]) for t in texts]
        return torch.cat([made(one, torch.tensor([0, len(one)]))[0] for one in alone])

    candidates = np.concatenate([plan.passages, plan.negatives])
    contents = torch.from_numpy(np.concatenate([plan.contents, plan.negative_contents]))
    logits = embed(plan.queries) @ embed(candidates).T / settings().loss.temperature
    own = (contents == contents[:N, None]) & ~torch.eye(N, len(candidates), dtype=torch.bool)
    loss = torch.nn.functional.cross_entropy(logits.masked_fill(own, -torch.inf), torch.arange(N))
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    begin = {name: p.detach().clone() for name, p in made.named_parameters()}
    loss.backward()
    optimizer.step()
    return {name: p.detach() - begin[name] for name, p in made.named_parameters()} | {"loss": loss.detach()}


def update(world, rows, keep=False):
    """The update that one step of gradient descent makes; every rank has some rows of the batch."""
    plan, source = problem()
    config, made = settings(), encoder()
    begin = {name: p.detach().clone() for name, p in made.named_parameters()}
    engine = make_engine(made, config.train, world)
    engine.optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    batch = rank_batch(plan, source, rows, config.train.micro_batch_tokens)
    stepper = Stepper(engine, config, world)
    stepper.graphs.choose, stepper.graphs.seen = lambda micro_batches: [keep] * len(micro_batches), [(1, 1, 1)]
    loss = stepper(batch, 1.0).loss
    parameters = {name: p.detach() - begin[name] for name, p in made.named_parameters()}
    return parameters | {"loss": torch.tensor(loss, dtype=torch.float64)}


def error(result, truth):
    off = sum((result[name] - truth[name]).pow(2).sum() for name in truth)
    return float((off / sum(value.pow(2).sum() for value in truth.values())).sqrt())


def assignments():
    """Rows of two ranks: as they stand, repeats together, repeats apart, shuffled, and of very unequal number."""
    shuffled = np.random.default_rng(1).permutation(N)
    first = [np.arange(6), np.array([0, 3, 5, 7, 8]), np.array([0, 1, 3, 9]), shuffled[:7], np.array([7])]
    rest = [np.setdiff1d(np.arange(N), rows) for rows in first]
    rest[3] = shuffled[7:]
    return list(zip(first, rest, strict=True))


def worker(rank, world, out):
    here = start(settings().train)
    for k, shares in enumerate(assignments()):
        result = update(here, shares[rank], k % 2 == 1)
        if rank == 0:
            save_file(result, Path(out) / f"{k}.safetensors")


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("order", ["as planned", "shuffled"])
def test_one_rank_with_repeats_encoded_once_equals_every_text_alone(truth, keep, order):
    rows = np.arange(N) if order == "as planned" else np.random.default_rng(2).permutation(N)
    assert error(update(World(0, 1, torch.device("cpu")), rows, keep), truth) < TOLERANCE


def test_two_ranks_with_any_rows_equal_every_text_alone(truth, tmp_path):
    run_ranks(worker, 2, str(tmp_path))
    for k in range(len(assignments())):
        assert error(load_file(tmp_path / f"{k}.safetensors"), truth) < TOLERANCE, f"assignment {k}"


def test_the_problem_has_repeats_on_one_rank_on_both_and_on_none():
    def repeats(rows):
        batch = rank_batch(*problem(), np.asarray(rows), 20)
        distinct = sum(len(micro.index) for micro in batch.micro_batches)
        assert (batch.inverse is None) == (distinct == len(batch.texts))
        return len(batch.texts) - distinct

    assert repeats(range(N)) == 8
    assert [tuple(map(repeats, shares)) for shares in assignments()] == [(3, 1), (4, 3), (3, 1), (5, 1), (0, 7)]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_gradients_of_repeats_add_up_the_same_every_time(device):
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5000, 64, generator=generator)
    index = torch.randint(0, 40, (5000,), generator=generator)
    first, *again = (add_up(gradient.to(device), index.to(device), 40) for _ in range(5))
    assert all(torch.equal(first, other) for other in again)
    right = torch.stack([gradient[index == i].double().sum(0) for i in range(40)])
    torch.testing.assert_close(first.double().cpu(), right, rtol=0, atol=1e-4)
