"""open_clip's ClipLoss and ours train the same parameters; on several ranks ours is exact where theirs is not."""

import importlib.util
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks

from hbt_fast.integrations.open_clip import ClipLoss, CoCaLoss, DistillClipLoss

TOLERANCE = 1e-5  # of the way that was moved: see test_drop_in_torch.py
STEPS, BATCH, WIDTH = 3, 10, 16
OPTIONS = [(local, gather) for local in (False, True) for gather in (False, True)]


def their(name="ClipLoss"):
    """A class of the package's file, which imports torch alone; the package imports torchvision and timm."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("no open_clip_torch")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(found.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


class Clip(torch.nn.Module):
    """Returns what open_clip's models do with output_dict=True, and holds its scale as they do."""

    def __init__(self, bias=False, scale_shape=()):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (torch.nn.Linear(WIDTH, 8) for _ in range(2))
        self.logit_scale = torch.nn.Parameter(torch.full(scale_shape, math.log(1 / 0.07)))
        if bias:
            self.logit_bias = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, images, texts):
        out = {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        return out | ({"logit_bias": self.logit_bias} if hasattr(self, "logit_bias") else {})


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(BATCH, WIDTH, generator=g), torch.randn(BATCH, WIDTH, generator=g)) for _ in range(STEPS)]


def train(loss, data, **model_options):
    """open_clip's training step; ranks average, as DDP does. Parameters before and after, and the first gradient."""
    model, first = Clip(**model_options), None
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    for images, texts in data:
        sum(loss(**model(images, texts), output_dict=True).values()).backward()
        gradient = {}
        for name, x in model.named_parameters():
            if dist.is_initialized():
                dist.all_reduce(x.grad)
                x.grad /= dist.get_world_size()
            x.data -= 0.1 * x.grad
            gradient[name], x.grad = x.grad, None
        first = first or gradient
    return start, {name: x.detach() for name, x in model.named_parameters()}, first


def close(ours, theirs, way, tolerance=TOLERANCE):
    return bool((ours - theirs).norm() <= tolerance * way.norm())


def assert_moved_alike(ours, theirs):
    start = ours[0]
    for name, x in theirs[1].items():
        if name != "logit_bias":  # its gradient is 0: theirs is what rounding leaves of it
            assert (x - start[name]).norm() > 1e-4, name
            assert close(ours[1][name], x, x - start[name]), name


@pytest.mark.parametrize("model_options", [{}, {"bias": True}, {"scale_shape": (1,)}])
def test_equal_parameters_and_scale_in_one_process(model_options):
    ours, theirs = (train(make(), batches(), **model_options) for make in (ClipLoss, their()))
    assert_moved_alike(ours, theirs)
    if "bias" in model_options:
        assert ours[2]["logit_bias"] == 0
        torch.testing.assert_close(theirs[2]["logit_bias"], torch.tensor(0.0), rtol=0, atol=1e-6)


def test_output_is_theirs_with_and_without_dictionary():
    features = [F.normalize(x, dim=-1) for x in batches()[0]]
    for scale in (10.0, torch.tensor(10.0)):
        ours, theirs = ClipLoss(cache_labels=True)(*features, scale), their()()(*features, scale)
        torch.testing.assert_close(ours, theirs)
    assert list(ClipLoss()(*features, 10.0, output_dict=True)) == ["contrastive_loss"]


@pytest.mark.parametrize("method", ["__init__", "forward", "get_logits", "get_ground_truth"])
@pytest.mark.parametrize("ours", [ClipLoss, DistillClipLoss, CoCaLoss])
def test_constructor_and_methods_have_their_arguments(ours, method):
    theirs, ours = (
        [(x.name, x.default) for x in inspect.signature(getattr(c, method)).parameters.values() if x.kind == 1]
        for c in (their(ours.__name__), ours)
    )
    assert ours == theirs


def test_logits_and_ground_truth_are_theirs():
    features = [F.normalize(x, dim=-1) for x in batches()[0]]
    for more in ((), (torch.tensor(-2.0),)):
        for a, b in zip(ClipLoss().get_logits(*features, 9.0, *more), their()().get_logits(*features, 9.0, *more)):  # noqa: B905
            torch.testing.assert_close(a, b)
    for options in ({}, {"world_size": 3, "rank": 2, "local_loss": True, "gather_with_grad": True}):
        a, b = (make(**options).get_ground_truth(torch.device("cpu"), 5) for make in (ClipLoss, their()))
        assert torch.equal(a, b)


def captions():
    g = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, 7, 11, generator=g), torch.randint(0, 11, (BATCH, 7), generator=g)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (1.0, 0.0), (0.5, 3.0)])
def test_the_captioning_loss_has_their_values_and_gradients(weights):
    results = []
    for make in (CoCaLoss, their("CoCaLoss")):
        leaves = [F.normalize(x, dim=-1).requires_grad_() for x in batches()[0]]
        tokens, labels = captions()
        tokens.requires_grad_()
        out = make(*weights, pad_id=3)(*leaves, tokens, labels, torch.tensor(10.0), output_dict=True)
        assert list(out) == ["contrastive_loss", "caption_loss"]
        sum(out.values()).backward()
        results.append([*out.values(), tokens.grad, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, check_dtype=False)  # theirs, not computed, is an integer 0


@pytest.mark.parametrize("output_dict", [False, True])
def test_the_distilling_loss_has_their_values_and_gradients(output_dict):
    results = []
    for make in (DistillClipLoss, their("DistillClipLoss")):
        leaves = [F.normalize(x, dim=-1).requires_grad_() for x in batches()[0]]
        scale = torch.tensor(10.0, requires_grad=True)
        teacher = [F.normalize(x[:, :4], dim=-1) for x in batches()[1]]
        out = make()(*leaves, scale, *teacher, 15.0, output_dict=output_dict)
        values = list(out.values()) if output_dict else list(out)
        (values[0] + 0.3 * values[1]).backward()
        results.append([*values, *(x.grad for x in (*leaves, scale))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_what_it_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # an earlier test of this process may have left a group
    with pytest.raises(ValueError, match="use_horovod=False"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="write gather_with_grad=True"):
        ClipLoss(local_loss=True, world_size=2)
    features = [F.normalize(x, dim=-1) for x in batches()[0]]
    with pytest.raises(ValueError, match=r"rank=1, world_size=2, but torch.distributed is not initialised"):
        ClipLoss(world_size=2, rank=1)(*features, 10.0)


def distilled(loss, data):
    """`train` with a teacher: the batch itself, in another place."""
    teacher = iter([F.normalize(x, dim=-1) for x in pair] for pair in data)

    def with_teacher(**features):
        images, texts = next(teacher)
        return loss(
            **features, dist_image_features=images, dist_text_features=texts, dist_logit_scale=torch.tensor(5.0)
        )

    return train(with_teacher, data)


def worker(rank, world, out):
    dist.init_process_group("gloo")
    data = [(x.view(world, -1, WIDTH)[rank], y.view(world, -1, WIDTH)[rank]) for x, y in batches()]
    results = {}
    for local, gather in OPTIONS:
        options = {"local_loss": local, "gather_with_grad": gather, "rank": rank, "world_size": world}
        results["theirs", local, gather] = train(their()(**options), data)
        if gather or not local:
            results["ours", local, gather] = train(ClipLoss(**options), data)
        if gather:
            results["distilled", local] = distilled(DistillClipLoss(**options), data)
            results["distilled, theirs", local] = distilled(their("DistillClipLoss")(**options), data)
    with pytest.raises(ValueError, match=f"but torch.distributed has rank {rank} of 2"):
        ClipLoss(rank=rank, world_size=3)(*data[0], 10.0)
    torch.save(results, f"{out}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    their()
    out = tmp_path_factory.mktemp("open_clip")
    run_ranks(worker, 2, str(out))
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("local", "gather"), [(False, False), (False, True), (True, True)])
def test_two_ranks_train_what_one_process_trains_on_the_whole_batch(ranks, local, gather):
    whole = train(their()(), batches())
    for results in ranks:
        assert_moved_alike(results["ours", local, gather], whole)
        if gather:
            assert_moved_alike(results["ours", local, gather], results["theirs", local, gather])


@pytest.mark.parametrize("local", [False, True])
def test_two_ranks_distil_what_one_process_does(ranks, local):
    whole = distilled(their("DistillClipLoss")(), batches())
    for results in ranks:
        assert_moved_alike(results["distilled", local], whole)
        assert_moved_alike(results["distilled, theirs", local], whole)


def test_without_gather_with_grad_their_gradients_are_what_the_table_says(ranks):
    exact = train(their()(), batches())[2]
    for results in ranks:
        for local, gather in OPTIONS:
            theirs = results["theirs", local, gather][2]
            assert close(theirs["logit_scale"], exact["logit_scale"], exact["logit_scale"])
            for name in ("image.weight", "text.weight"):
                whole = theirs[name] if gather else 2 * theirs[name]
                assert close(whole, exact[name], exact[name]) == (gather or not local), (name, local, gather)
        missing = results["theirs", True, False][2]["text.weight"]
        assert F.cosine_similarity(missing.flatten(), exact["text.weight"].flatten(), dim=0) < 0.99
