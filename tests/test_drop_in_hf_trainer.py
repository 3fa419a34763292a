"""Hugging Face Trainer trains the same parameters with the compute_loss one writes by hand and with ours."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

from hbt_fast.integrations.hf_trainer import RetrievalLoss, RetrievalTrainerMixin

TOLERANCE = 1e-5  # of the way that was moved: see test_drop_in_torch.py
BATCH, LENGTH, WIDTH = 6, 5, 16


class BiEncoder(torch.nn.Module):
    """A tiny BERT for both sides, dropout on; passages are (N, 2, length): a positive and a hard negative each."""

    def __init__(self):
        from transformers import BertConfig, BertModel

        super().__init__()
        torch.manual_seed(0)
        shape = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        self.bert = BertModel(BertConfig(vocab_size=50, max_position_embeddings=8, **shape), add_pooling_layer=False)

    def forward(self, queries, passages, **_):  # keywords, from which Trainer concludes that it may pass it counts
        from transformers.utils import ModelOutput

        q, p = (self.bert(x).last_hidden_state.mean(1) for x in (queries, torch.cat(passages.unbind(1))))
        return ModelOutput(query_embeddings=q, passage_embeddings=p)


def rows(labels):
    g = torch.Generator().manual_seed(1)
    data = [
        {
            "queries": torch.randint(0, 50, (LENGTH,), generator=g),
            "passages": torch.randint(0, 50, (2, LENGTH), generator=g),
        }
        for _ in range(4 * BATCH)
    ]
    return data, (lambda batch: collate(batch, labels))


def collate(batch, labels):
    """With labels: each query's positive is the next one's, and the first query has none."""
    out = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
    if labels:
        out["labels"] = (torch.arange(len(batch)) + 1) % len(batch)
        out["labels"][0] = -100
    return out


def run(folder, *, ours=True, loss=None, function=None, labels=False, lr=0.1):
    """Two steps of two accumulated batches. `ours`: the mixin; else `function`, or a compute_loss written by hand."""
    from transformers import Trainer, TrainingArguments

    class ByHand(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            given = inputs.pop("labels", None)
            out = model(**inputs)
            q, p = F.normalize(out["query_embeddings"], dim=-1), F.normalize(out["passage_embeddings"], dim=-1)
            total = F.cross_entropy(20.0 * q @ p.T, torch.arange(len(q)) if given is None else given)
            return (total, out) if return_outputs else total

    class Ours(RetrievalTrainerMixin, Trainer):
        pass

    args = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, gradient_accumulation_steps=2, max_steps=2, learning_rate=lr,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, seed=3, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    data, collator = rows(labels)
    model = BiEncoder()
    common = {"train_dataset": data, "eval_dataset": data, "data_collator": collator}
    if function is not None:
        trainer = Trainer(model, args, compute_loss_func=function, **common)
    elif ours:
        trainer = Ours(model, args, retrieval_loss=loss or RetrievalLoss(20.0), **common)
    else:
        trainer = ByHand(model, args, **common)
        trainer.model_accepts_loss_kwargs = False  # or it would not divide by the accumulated steps
    trainer.train()
    return {name: x.detach().clone() for name, x in model.named_parameters()}, trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def start():
    return {name: x.detach().clone() for name, x in BiEncoder().named_parameters()}


@pytest.fixture(scope="module")
def by_hand(folder):
    return {labels: run(folder, ours=False, labels=labels)[0] for labels in (False, True)}


def assert_moved_alike(ours, theirs, start):
    """As a whole: some parameters (the bias of the keys) have no gradient but what rounding leaves."""
    way, apart = (
        torch.cat([(x[n] - y[n]).flatten() for n in start]).norm() for x, y in ((theirs, start), (ours, theirs))
    )
    assert way > 1e-2
    assert apart <= TOLERANCE * way


@pytest.mark.parametrize("labels", [False, True])
def test_the_mixin_trains_equal_parameters_with_accumulated_gradients(folder, by_hand, start, labels):
    assert_moved_alike(run(folder, labels=labels)[0], by_hand[labels], start)


def test_as_compute_loss_func_it_trains_equal_parameters_where_batches_hold_labels(folder, by_hand, start):
    assert_moved_alike(run(folder, function=RetrievalLoss(20.0), labels=True)[0], by_hand[True], start)


def test_without_labels_a_compute_loss_func_gets_gradients_times_the_accumulation_steps(folder, by_hand, start):
    trained, _ = run(folder, function=RetrievalLoss(20.0), lr=0.05)  # half of the others' learning rate
    assert_moved_alike(trained, by_hand[False], start)


def test_evaluation_has_a_loss_without_labels(folder):
    ours, theirs = run(folder)[1], run(folder, function=RetrievalLoss(20.0), lr=0.05)[1]
    theirs.can_return_loss = True
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)


def test_embeddings_are_found_by_key_index_or_attribute():
    g = torch.Generator().manual_seed(0)
    q, p = (torch.randn(4, 8, generator=g) for _ in range(2))
    expected = F.cross_entropy(20.0 * F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).T, torch.arange(4))
    for loss, outputs in (
        (RetrievalLoss(), {"query_embeddings": q, "passage_embeddings": p}),
        (RetrievalLoss(queries=1, passages=2), ("other", q, p)),
        (RetrievalLoss(queries="q_reps", passages="p_reps"), SimpleNamespace(q_reps=q, p_reps=p)),
    ):
        torch.testing.assert_close(loss(outputs), expected)
    dot = RetrievalLoss(1.0, normalize=False)({"query_embeddings": q, "passage_embeddings": p})
    torch.testing.assert_close(dot, F.cross_entropy(q @ p.T, torch.arange(4)))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"has no 'query_embeddings'; it holds 'q'"):
        RetrievalLoss()({"q": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="weights is made from the labels"):
        RetrievalLoss(weights=torch.ones(2))
    with pytest.raises(TypeError, match="no option 'temperature'"):
        RetrievalLoss(temperature=0.05)


def worker(rank, world, out):
    """What Trainer does with a compute_loss_func on several ranks: count all labels, times ranks, average gradients."""
    dist.init_process_group("gloo")
    embeddings, labels, split = ranks_batch()
    q, p = (x[split[rank]].clone().requires_grad_() for x in embeddings)
    loss = RetrievalLoss(20.0, symmetric=True, group=dist.group.WORLD)
    labels = labels[split[rank]] - split[rank].start * (labels[split[rank]] >= 0)
    total = loss({"query_embeddings": q, "passage_embeddings": p}, labels, torch.tensor(6))
    (total * world).backward()
    torch.save((total.detach() * world, q.grad / world, p.grad / world), f"{out}/{rank}.pt")


def ranks_batch():
    g = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(7, 8, generator=g) for _ in range(2)]
    return embeddings, torch.tensor([2, 0, -100, 4, 3, 6, 5]), (slice(0, 3), slice(3, 7))  # local positives


def test_on_two_ranks_labels_count_from_the_first_passage_of_the_rank(tmp_path):
    run_ranks(worker, 2, str(tmp_path))
    (q, p), labels, split = ranks_batch()
    q, p = q.requires_grad_(), p.requires_grad_()
    scores = 20.0 * F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).T
    one_way = F.cross_entropy(scores, labels)
    kept = labels >= 0
    t = scores[:, labels.clamp_min(0)].T.clone()  # a row per query: its positive against all queries
    t[1, 2] = -torch.inf  # the query without label counts as one of passage 0, as does query 1
    other = F.cross_entropy(t[kept], torch.arange(7)[kept])
    loss = (one_way + other) / 2
    loss.backward()
    for rank in range(2):
        total, dq, dp = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(dq, q.grad[split[rank]], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dp, p.grad[split[rank]], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(total, loss.detach(), rtol=1e-5, atol=0)
