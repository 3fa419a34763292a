"""sentence-transformers: MultipleNegativesRankingLoss, its cached form and the symmetric ones, computed by `info_nce`.

The lines you had::

    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)

The lines you write::

    from hbt_fast.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)

Both are subclasses of the package's own, and `SentenceTransformerTrainer`, `MatryoshkaLoss` and model cards treat them
as such. What is replaced is the step from embeddings to loss.

With gather_across_devices the loss is the mean over the queries of all ranks (theirs: over the rank's own; the trainer
logs the average). The gradients, after DDP's averaging, are the same. Ranks may have batches of unequal size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hbt_fast.loss import info_nce

try:
    from sentence_transformers.sentence_transformer import losses as theirs
    from sentence_transformers.util import cos_sim, dot_score, pytorch_cos_sim
except ImportError as error:
    raise ImportError(f'sentence-transformers does not import ({error}); pip install "hbt-fast[st]"') from error
if not hasattr(theirs.CachedMultipleNegativesRankingLoss, "forward_cached"):
    raise ImportError('gradient caching needs sentence-transformers 6.0 or later; pip install -U "hbt-fast[st]"')

Similarity = Callable[[Tensor, Tensor], Tensor]
_SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """In-batch negatives, hard negatives in further columns; see the package's class for the arguments up to the `*`.

    Args:
        model: the SentenceTransformer.
        scale: 1/temperature.
        similarity_fct: cos_sim, pytorch_cos_sim or dot_score of sentence_transformers.util; or `model.similarity` of a
            SentenceTransformer whose similarity_fn_name is "cosine" or "dot".
        gather_across_devices: the passages (and, symmetric, the queries) of all ranks are candidates.
        directions: "query_to_doc", and any of "query_to_query", "doc_to_query", "doc_to_doc".
        partition_mode: "joint", one softmax; or "per_direction", for the first and third: the symmetric loss.
        hardness_mode: "in_batch_negatives", "hard_negatives", "all_negatives" or None.
        hardness_strength: without effect while hardness_mode is None, as there.
        compute_dtype: operands of the products, as in `info_nce`; None: the dtype of the embeddings.
        workspace_bytes: memory for the loss, as in `info_nce`.

    Raises:
        ValueError: a similarity that is no inner product, here or when the attribute is set later and used; or theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        compute_dtype: str | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength,
        )  # fmt: skip
        self.compute_dtype, self.workspace_bytes = compute_dtype, workspace_bytes
        _is_cosine(self.similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """(N, d) queries, (N, d) positives and any number of (N, d) hard negatives -> 0-d loss; labels are not used."""
        return _loss(self, embeddings)


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """The same by gradient caching: each text is embedded once without graph and once with, mini-batch by mini-batch,
    and the random states of the first are replayed in the second. Arguments and errors are those above, besides:

    Args:
        mini_batch_size: texts per forward pass.
        mini_batch_num_tokens: tokens per forward pass instead.
        show_progress_bar: of the mini-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        compute_dtype: str | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices, directions,
            partition_mode, show_progress_bar, hardness_mode, hardness_strength,
        )  # fmt: skip
        self.compute_dtype, self.workspace_bytes = compute_dtype, workspace_bytes
        _is_cosine(self.similarity_fct)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Mini-batches of embeddings per column -> 0-d loss; with_backward also leaves gradients in the embeddings."""
        loss = _loss(self, [torch.cat(column) for column in reps])
        if with_backward:
            loss.backward()
        return loss.detach() if with_backward else loss


class MultipleNegativesSymmetricRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss with directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"."""

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        gather_across_devices: bool = False,
        **precision_and_memory: object,
    ) -> None:
        super().__init__(model, scale, similarity_fct, gather_across_devices, **_SYMMETRIC, **precision_and_memory)


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """The same by gradient caching."""

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Similarity = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        **precision_and_memory: object,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices,
            show_progress_bar=show_progress_bar, **_SYMMETRIC, **precision_and_memory,
        )  # fmt: skip


def _is_cosine(similarity_fct: Similarity) -> bool:
    """Whether it is the cosine; False: the inner product.

    Raises:
        ValueError: it is neither.
    """
    function = similarity_fct
    while isinstance(function, functools.partial) and not function.args and not function.keywords:
        function = function.func
    name = getattr(function, "__name__", None)
    if name == "similarity" and hasattr(function, "__self__"):  # of a SentenceTransformer: what it calls may change
        name = getattr(function.__self__, "similarity_fn_name", None)
        if name in ("cosine", "dot"):
            return name == "cosine"
        similarity_fct = f"model.similarity with similarity_fn_name={name!r}"
    if function in (cos_sim, pytorch_cos_sim, dot_score):
        return function is not dot_score
    raise ValueError(
        f"similarity_fct={similarity_fct!r} is no inner product of embeddings; write cos_sim or dot_score of "
        "sentence_transformers.util, or keep the package's own loss"
    )


def _loss(loss: nn.Module, columns: list[Tensor]) -> Tensor:
    """The loss of one query column and one or more passage columns, each (N, d), with the options of `loss`."""
    if len(columns) < 2:
        raise ValueError(f"a batch needs a query and a positive column, not {len(columns)} column")
    queries, passages = columns[0], torch.cat(columns[1:])
    if _is_cosine(loss.similarity_fct):
        queries, passages = F.normalize(queries, dim=-1), F.normalize(passages, dim=-1)
    group = dist.group.WORLD if loss.gather_across_devices and dist.is_available() and dist.is_initialized() else None
    joint = () if loss.partition_mode == "per_direction" else loss.directions
    value = info_nce(
        queries,
        passages,
        scale=loss.scale,
        symmetric=loss.partition_mode == "per_direction" and "doc_to_query" in loss.directions,
        joint=joint,
        owners=torch.arange(len(queries), device=queries.device).repeat(len(columns) - 1),
        hardness_mode=loss.hardness_mode,
        hardness_strength=loss.hardness_strength,
        group=group,
        compute_dtype=loss.compute_dtype,
        workspace_bytes=loss.workspace_bytes,
    )
    return value + math.log(2) if "doc_to_query" in joint else value  # the pair is twice in their softmax
