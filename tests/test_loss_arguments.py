"""Every mistake in a call raises a ValueError that names the argument and says what to write."""

import pytest
import torch

from hbt_fast.loss import InfoNCELoss, info_nce, info_nce_with_grad, negative_variance

Q, P = torch.eye(3, 4), torch.eye(5, 4)
NAN = torch.full((3, 4), 0.0).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(float("nan")))

MISTAKES = {
    "queries shape": ({"queries": Q[0]}, r"queries must have shape \(N, d\)"),
    "queries empty": ({"queries": Q[:0]}, r"queries must have shape \(N, d\) with N, d >= 1"),
    "queries integer": ({"queries": Q.long()}, "queries must be a floating-point tensor; got torch.int64"),
    "queries list": ({"queries": [[1.0]]}, "queries must be a floating-point tensor; got list"),
    "passages width": ({"passages": torch.eye(5)}, "same width d, not 4 and 5"),
    "passages few": ({"passages": Q[:2]}, "3 queries and only 2 passages; pass positives="),
    "queries nan": ({"queries": NAN}, "queries contains NaN or Inf, first in row 1"),
    "passages inf": ({"passages": P / 0}, "passages contains NaN or Inf"),
    "own nan": ({"own_negatives": NAN[:, None]}, "own_negatives contains NaN"),
    "own shape": ({"own_negatives": Q}, r"own_negatives must have shape \(N, K, d\) = \(3, K, 4\)"),
    "scale zero": ({"scale": 0.0}, "scale must be finite and > 0"),
    "scale nan": ({"scale": torch.tensor(float("nan"))}, "scale must be finite"),
    "scale 1-d": ({"scale": torch.ones(1)}, r"scale.squeeze\(\)"),
    "scale string": ({"scale": "20"}, "scale must be a float"),
    "positives dtype": ({"positives": torch.arange(3).int()}, "positives must be an int64 tensor"),
    "positives length": ({"positives": torch.arange(5)}, r"positives must be an int64 tensor of shape \(3,\)"),
    "positives range": ({"positives": torch.tensor([0, 5, 1])}, r"positives must be passage indices in \[0, 5\)"),
    "positives negative": ({"positives": torch.tensor([0, -1, 1])}, r"not -1 \.\. 1"),
    "passage_ids": ({"passage_ids": torch.arange(3)}, r"passage_ids must be an int64 tensor of shape \(5,\)"),
    "query_ids": ({"query_ids": torch.arange(5), "symmetric": True}, r"query_ids must be an int64 .* \(3,\)"),
    "duplicates": ({"duplicates": "drop"}, "duplicates must be one of 'mask', 'positive', not 'drop'"),
    "reduction": ({"reduction": "avg"}, "reduction must be one of"),
    "compute_dtype": ({"compute_dtype": torch.bfloat16}, "compute_dtype must be one of 'fp16', 'bf16'"),
    "weights shape": ({"weights": torch.ones(2)}, r"weights must be a tensor of shape \(3,\)"),
    "weights negative": ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "weights must be finite and >= 0"),
    "weights zero": ({"weights": torch.zeros(3)}, "weights sum to zero"),
    "weights grad": ({"weights": torch.ones(3, requires_grad=True)}, "weights.detach"),
    "margin": ({"false_negative_margin": float("nan")}, "false_negative_margin must be a finite number"),
    "workspace": ({"workspace_bytes": 0}, "workspace_bytes must be an int >= 1"),
    "backend": ({"backend": "numpy"}, "backend='numpy' is not available; available: 'auto', 'triton', 'cpu', 'torch'"),
    "group": ({"group": 0}, "group must be a torch.distributed group"),
    "overflow": ({"queries": Q * 1e5, "compute_dtype": "fp16"}, "queries overflows in fp16"),
    "joint": ({"joint": ("queries",)}, "joint must be one of 'query_to_doc', 'query_to_query', 'doc_to_query'"),
    "joint string": ({"joint": "doc_to_doc"}, r"joint must be a tuple of names, e.g. \('query_to_query',\)"),
    "joint symmetric": ({"joint": ("doc_to_doc",), "symmetric": True}, "symmetric=True has a softmax per direction"),
    "owners": ({"owners": torch.arange(3)}, r"owners must be an int64 tensor of shape \(5,\)"),
    "owners range": ({"owners": torch.arange(5)}, r"owners must be queries of this rank, in \[0, 3\), or -1"),
    "hardness_mode": ({"hardness_mode": "hard"}, "hardness_mode must be one of 'in_batch_negatives'"),
    "hardness_strength": ({"hardness_strength": -1.0}, "hardness_strength must be a finite number >= 0, not -1.0"),
    "device": ({"passages": P.to("meta")}, "passages is on meta but queries is on cpu"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("function", [info_nce, info_nce_with_grad])
def test_mistake_is_named(function, changes, message):
    call = {"queries": Q, "passages": P, "backend": "torch-chunked"} | changes
    with pytest.raises(ValueError, match=message):
        function(**call)


def test_with_grad_needs_a_scalar():
    with pytest.raises(ValueError, match='use reduction="mean" or "sum"'):
        info_nce_with_grad(Q, P, reduction="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": NAN}, "queries contains NaN"),
        ({"passages": P[:2]}, "3 queries and only 2 passages"),
        ({"positives": torch.tensor([0, 1, 5])}, r"positives must be passage indices in \[0, 5\)"),
        ({"size": 1}, "size must be at least 2"),
        ({"queries": 1.0}, "queries must be a floating-point tensor"),
    ],
)
def test_mistakes_of_the_variance(changes, message):
    with pytest.raises(ValueError, match=message):
        negative_variance(**{"queries": Q, "passages": P} | changes)


def test_module_rejects_a_scale_that_is_none():
    with pytest.raises(ValueError, match="scale must be finite and > 0"):
        InfoNCELoss(-1.0)


def test_the_package_exports_these_names():
    import hbt_fast.loss

    assert sorted(hbt_fast.loss.__all__) == [
        "InfoNCELoss",
        "explain",
        "info_nce",
        "info_nce_with_grad",
        "negative_variance",
    ]
