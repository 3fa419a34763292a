"""SentenceTransformerTrainer trains the same parameters with the package's losses and with ours."""

import functools
import inspect
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

# Both gradients are right to about 1e-6 through the encoder, and so is each rounding of a parameter: three steps of
# plain descent stay below 2e-5 of the way that was moved. A wrong mask, label, weight or random state is off by 1e-2.
TOLERANCE = 2e-5
STEPS, BATCH = 3, 8
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
GTE = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
PLAIN = {
    "pairs": (2, {}),
    "hard negatives": (4, {"scale": 50.0}),
    "symmetric": (2, SYMMETRIC),
    "symmetric with hard negatives": (3, SYMMETRIC),
    "queries as negatives": (3, {"directions": ("query_to_query", "query_to_doc")}),
    "dot product": (3, {"similarity_fct": "dot_score", "scale": 0.5}),
    "GTE, hardness": (3, {**GTE, "hardness_mode": "all_negatives", "hardness_strength": 5.0}),
}
CACHED = {
    "small mini-batches": (2, {"mini_batch_size": 3}),
    "one mini-batch": (3, {"mini_batch_size": 64}),
    "by tokens, symmetric": (3, {"mini_batch_num_tokens": 40, **SYMMETRIC}),
    "queries as negatives": (3, {"mini_batch_size": 5, "directions": ("query_to_doc", "query_to_query")}),
    "GTE, hardness": (4, {"mini_batch_size": 3, **GTE, "hardness_mode": "hard_negatives", "hardness_strength": 5.0}),
}
MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
JOINT = [("query_to_doc", *more) for r in range(4) for more in itertools.combinations(GTE["directions"][1:], r)]
OPTIONS = [(d, "joint") for d in JOINT] + [(d, "per_direction") for d in (("query_to_doc",), SYMMETRIC["directions"])]

RANKS = {
    False: {**GTE, "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    True: {"mini_batch_size": 3, **SYMMETRIC},
}


def losses(cached, symmetric=False):
    """The package's class and ours."""
    from sentence_transformers.sentence_transformer import losses as theirs

    import hbt_fast.integrations.sentence_transformers as ours

    name = f"{'Cached' * cached}MultipleNegatives{'Symmetric' * symmetric}RankingLoss"
    return getattr(theirs, name), getattr(ours, name)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny BERT, dropout on, with its tokenizer."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("accelerate")
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id, **shape
    )
    BertModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def load(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(folder, max_seq_length=16), Pooling(16)], device="cpu")


def texts(columns, count=STEPS * BATCH):
    words = "red blue green old new big small fast slow cat dog bird house tree river stone wind fire moon star".split()  # noqa: SIM905
    names = ("anchor", "positive", "negative_1", "negative_2")[:columns]
    return {
        name: [" ".join(words[(i * (c + 3) + k * k) % 20] for k in range(1 + (i + c) % 5)) for i in range(count)]
        for c, name in enumerate(names)
    }


def train(folder, make, columns, options, wrap=lambda model, loss: loss, **arguments):
    """One epoch of plain gradient descent by the package's trainer; the trained parameters, and the trainer."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, util

    options = dict(options)
    if "similarity_fct" in options:
        options["similarity_fct"] = getattr(util, options["similarity_fct"])
    model = load(folder)
    start = parameters_of(model)
    common = {"per_device_train_batch_size": BATCH, "seed": 1, "optim": "sgd", "learning_rate": 0.2}
    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = SentenceTransformerTrainingArguments(
        folder + "/out", num_train_epochs=1, lr_scheduler_type="constant", max_grad_norm=0.0,
        dataloader_pin_memory=False, **(common | quiet | arguments),
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model, args, train_dataset=Dataset.from_dict(texts(columns)), loss=wrap(model, make(model, **options))
    )
    trainer.train()
    return start, parameters_of(model), trainer


def parameters_of(model):
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def assert_moved_alike(ours, theirs):
    """As a whole: some parameters (the bias of the keys) have no gradient but what rounding leaves."""
    start = theirs[0]
    way = torch.cat([(theirs[1][name] - x).flatten() for name, x in start.items()]).norm()
    apart = torch.cat([(ours[1][name] - theirs[1][name]).flatten() for name in start]).norm()
    assert way > 1e-2
    assert apart <= TOLERANCE * way, float(apart / way)


@pytest.mark.parametrize("case", PLAIN)
def test_the_loss_trains_equal_parameters(folder, case):
    theirs, ours = (train(folder, make, *PLAIN[case]) for make in losses(cached=False))
    assert_moved_alike(ours, theirs)


@pytest.mark.parametrize("case", CACHED)
def test_the_cached_loss_trains_equal_parameters_with_dropout_on(folder, case):
    theirs, ours = (train(folder, make, *CACHED[case]) for make in losses(cached=True))
    assert_moved_alike(ours, theirs)


def values(make, model, columns, options, workspace_bytes=None):
    """Loss and gradients from embeddings: a list of (N, D) columns."""
    leaves = [x.clone().requires_grad_() for x in columns]
    loss = make(model, **options)
    loss.workspace_bytes = workspace_bytes
    if hasattr(loss, "calculate_loss"):
        value = loss.calculate_loss([list(x.split(5)) for x in leaves], with_backward=True)
    else:
        value = loss.compute_loss_from_embeddings(leaves, None)
        value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score"])
def test_every_choice_of_directions_and_hardness_has_their_values_and_gradients(folder, cached, mode, similarity):
    from sentence_transformers import util

    (theirs, ours), model = losses(cached), load(folder)
    common = {"similarity_fct": getattr(util, similarity), "scale": 20.0 if similarity == "cos_sim" else 1.0}
    common |= {"hardness_mode": mode, "hardness_strength": 5.0}
    for (directions, partition_mode), columns, n in itertools.product(OPTIONS, (2, 4), (1, 12)):
        options = {**common, "directions": directions, "partition_mode": partition_mode}
        g = torch.Generator().manual_seed(columns)
        x = [torch.randn(n, 8, generator=g, dtype=torch.float64) / 3 for _ in range(columns)]
        x[1] += 0.5 * x[0]
        truth = values(theirs, model, x, options)
        for workspace_bytes in (1, None):
            for a, t in zip(values(ours, model, x, options, workspace_bytes), truth, strict=True):
                torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-12)
        singles = [y.float() for y in x]
        found, dense = (values(make, model, singles, options) for make in (ours, theirs))
        for a, b, t in zip(found, dense, truth, strict=True):
            assert (a - t).norm() <= 2 * (b - t).norm() + 2e-6 * (t.norm() + 1e-2), options


@pytest.mark.filterwarnings("ignore:The .*RankingLoss is deprecated")  # by the package, and still in use
@pytest.mark.parametrize("cached", [False, True])
def test_the_symmetric_losses_train_equal_parameters(folder, cached):
    options = {"mini_batch_size": 3} if cached else {}
    theirs, ours = (train(folder, make, 3, options) for make in losses(cached, symmetric=True))
    assert_moved_alike(ours, theirs)


@pytest.mark.parametrize("cached", [False, True])
def test_every_name_of_the_cosine_and_the_inner_product_is_taken(folder, cached):
    from sentence_transformers import util

    make, model, dot_model = losses(cached)[1], load(folder).eval(), load(folder).eval()
    dot_model.similarity_fn_name = "dot"
    features = [model.preprocess(column) for column in texts(3, 6).values()]

    def value(model, function):
        return make(model, scale=0.5, similarity_fct=function)([dict(x) for x in features], None)

    cosine, dot = value(model, util.cos_sim), value(model, util.dot_score)
    assert cosine != dot
    for function in (util.pytorch_cos_sim, model.similarity, functools.partial(util.cos_sim)):
        assert value(model, function) == cosine
    for function in (dot_model.similarity, functools.partial(dot_model.similarity)):
        assert value(dot_model, function) == dot
    with pytest.raises(ValueError, match="is no inner product"):
        make(model, similarity_fct=functools.partial(util.cos_sim, b=torch.ones(1, 16)))
    loss = make(model, similarity_fct=model.similarity)
    model.similarity_fn_name = "euclidean"  # what the method does is decided when it is called
    with pytest.raises(ValueError, match=r"similarity_fn_name='euclidean'.*is no inner product"):
        loss(features, None)


def test_in_little_memory_it_trains_the_same(folder):
    theirs, ours = losses(cached=True)
    columns, options = CACHED["by tokens, symmetric"]
    chunked = train(folder, ours, columns, {**options, "workspace_bytes": 100})
    assert_moved_alike(chunked, train(folder, theirs, columns, options))


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka_works_around_it(folder, cached):
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    def wrap(model, loss):
        return MatryoshkaLoss(model, loss, [16, 8, 4], [1.0, 0.5, 2.0])

    options = {"mini_batch_size": 3} if cached else {}
    theirs, ours = (train(folder, make, 3, options, wrap) for make in losses(cached))
    assert_moved_alike(ours, theirs)


def test_accumulated_gradients_train_equal_parameters(folder):
    options = {"gradient_accumulation_steps": 3}
    theirs, ours = (train(folder, make, 2, {"mini_batch_size": 3}, **options) for make in losses(cached=True))
    assert_moved_alike(ours, theirs)


def test_the_cached_loss_embeds_once_without_graph_and_once_with(folder):
    model = load(folder)
    loss = losses(cached=True)[1](model, mini_batch_size=3)
    calls = []
    model.register_forward_hook(lambda _, inputs, out: calls.append((torch.is_grad_enabled(), len(out["input_ids"]))))
    features = [model.preprocess(column) for column in texts(3, BATCH).values()]
    loss(features, None).backward()
    assert calls == [(False, n) for n in (3, 3, 2) * 3] + [(True, n) for n in (3, 3, 2) * 3]
    assert model[0].auto_model.embeddings.word_embeddings.weight.grad.norm() > 0
    with torch.no_grad():
        calls.clear()
        assert not loss(features, None).requires_grad
        assert len(calls) == 9


def test_the_model_card_and_their_other_code_know_it(folder):
    _, _, trainer = train(folder, losses(cached=False)[1], 2, {}, max_steps=1)
    loss = trainer.loss
    assert loss.model is trainer.model
    assert isinstance(loss, losses(cached=False)[0])
    assert loss.get_config_dict() == losses(cached=False)[0](trainer.model).get_config_dict()
    trainer.model.save_pretrained(folder + "/saved")
    assert "MultipleNegativesRankingLoss" in open(folder + "/saved/README.md", encoding="utf-8").read()  # noqa: SIM115


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constructors_have_their_arguments_in_their_order_with_their_defaults(folder, cached, symmetric):
    theirs, ours = (
        [(x.name, x.default) for x in inspect.signature(c.__init__).parameters.values() if x.kind == 1]
        for c in losses(cached, symmetric)
    )
    assert ours == theirs


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hardness_mode", {"hardness_mode": "hard"}),
        ("hardness_strength", {"hardness_mode": "all_negatives", "hardness_strength": -1.0}),
        ("similarity_fct", {"similarity_fct": torch.nn.CosineSimilarity()}),
        ("per_direction", {"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"}),
        ("partition_mode", {"partition_mode": "other"}),
        ("Scale", {"scale": -1.0}),
    ],
)
def test_what_infonce_does_not_express_is_refused_by_name(folder, cached, name, options):
    make = losses(cached)[1]
    with pytest.raises(ValueError, match=name):
        make(load(folder), **options)


def worker(rank, world, folder, out):
    """The trainer under DDP, and the averaged gradients of one batch beside those of the whole batch in one process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = {}
    for cached in (False, True):
        for who, make in zip(("theirs", "ours"), losses(cached), strict=True):
            options = {**RANKS[cached], "gather_across_devices": True}
            start, end, trainer = train(folder, make, 3, options, ddp_backend="gloo", per_device_train_batch_size=4)
            assert trainer.args.world_size == world
            results[cached, who] = start, end, gradients(folder, make, options, rank, world)
        results[cached, "whole"] = gradients(folder, losses(cached)[0], RANKS[cached], 0, 1)
    torch.save(results, f"{out}/{rank}.pt")


def gradients(folder, make, options, rank, world):
    model = load(folder).eval()
    columns = [column[rank::world] for column in texts(3, BATCH).values()]
    make(model, **options)([model.preprocess(column) for column in columns], None).backward()
    flat = torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])
    if world > 1:
        dist.all_reduce(flat)
    return flat / world


def test_on_two_ranks_it_trains_equal_parameters_and_has_the_gradient_of_the_whole_batch(folder, tmp_path):
    run_ranks(worker, 2, folder, str(tmp_path))
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for cached in (False, True):
            whole = results[cached, "whole"]
            assert_moved_alike(results[cached, "ours"], results[cached, "theirs"])
            for who in ("ours", "theirs"):
                gradient = results[cached, who][2]
                assert (gradient - whole).norm() <= TOLERANCE * whole.norm(), (cached, who)
