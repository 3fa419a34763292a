"""In a plain torch loop, cross entropy over a score matrix and our loss train the same parameters."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hbt_fast import InfoNCELoss, info_nce_with_grad

# Both gradients are right to about 1e-7, and so is each rounding of a parameter: three steps stay below 1e-5 of the way
# that was moved. A wrong mask, label or factor is off by 1e-2 and more.
TOLERANCE = 1e-5
STEPS, BATCH, WIDTH = 3, 12, 16


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.passage = (torch.nn.Linear(WIDTH, 8) for _ in range(2))
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, q, p):
        return F.normalize(self.query(q), dim=-1), F.normalize(self.passage(p), dim=-1)


def batches(negatives=0):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, WIDTH, generator=g), torch.randn(BATCH + negatives, WIDTH, generator=g))
        for _ in range(STEPS)
    ]


def cross_entropy(model, q, p, symmetric):
    q, p = model(q, p)
    scores = model.log_scale.exp() * q @ p.T
    labels = torch.arange(len(q))
    loss = F.cross_entropy(scores, labels)
    return (loss + F.cross_entropy(scores[:, : len(q)].T, labels)) / 2 if symmetric else loss


def train(backward, data, parameters):
    """Gradient descent. Several ranks: test_loss_ranks_equal_one.py."""
    for q, p in data:
        backward(q, p)
        for x in parameters:
            x.data -= 0.1 * x.grad
            x.grad = None


def towers_of(model):
    return [*model.query.parameters(), *model.passage.parameters()]


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained_by_cross_entropy(symmetric=True, negatives=0, learn_scale=False):
    model = TwoTowers()
    parameters = towers_of(model) + [model.log_scale] * learn_scale
    train(lambda q, p: cross_entropy(model, q, p, symmetric).backward(), batches(negatives), parameters)
    return parameters_of(model)


def assert_moved_alike(ours, theirs):
    start = parameters_of(TwoTowers())
    for name, begin in start.items():
        way = (theirs[name] - begin).norm()
        assert (ours[name] - theirs[name]).norm() <= TOLERANCE * way, name
        assert way > 1e-3 or name == "log_scale"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("negatives", [0, 5])
def test_cross_entropy_and_our_loss_train_equal_parameters_and_scale(symmetric, negatives):
    model, loss = TwoTowers(), InfoNCELoss(scale=math.exp(2.0), learnable=True, symmetric=symmetric)
    train(lambda q, p: loss(*model(q, p)).backward(), batches(negatives), [*towers_of(model), loss.log_scale])
    model.log_scale.data = loss.log_scale.data
    assert_moved_alike(parameters_of(model), trained_by_cross_entropy(symmetric, negatives, learn_scale=True))


def test_gradient_caching_by_hand_trains_the_same_parameters():
    model = TwoTowers()

    def backward(q, p):
        with torch.no_grad():
            embeddings = model(q, p)
        result = info_nce_with_grad(*embeddings, scale=math.exp(2.0), symmetric=True)
        for first in range(0, BATCH, 5):
            rows = slice(first, first + 5)
            torch.autograd.backward(model(q[rows], p[rows]), (result.queries[rows], result.passages[rows]))

    train(backward, batches(), towers_of(model))
    assert_moved_alike(parameters_of(model), trained_by_cross_entropy())


def test_an_integration_costs_its_own_package_alone_and_says_what_to_install():
    code = (
        "import sys, torch; before = set(sys.modules); sys.modules['sentence_transformers'] = None\n"
        "import hbt_fast.integrations.gradcache, hbt_fast.integrations.open_clip, hbt_fast.integrations.hf_trainer\n"
        "print(*{n.partition('.')[0] for n in set(sys.modules) - before if sys.modules[n]})\n"
        "import hbt_fast.integrations.sentence_transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "hbt-fast[st]"' in done.stderr.splitlines()[-1]
    packages = {"transformers", "sentence_transformers", "open_clip", "gradcache", "grad_cache", "accelerate"}
    assert not packages & set(done.stdout.split())
