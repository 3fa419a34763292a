"""The variance of negative similarities, as a loss: small batches raise it (arXiv 2506.09781).

Shapes: N queries of this rank, M_r passages of this rank, D dimensions.
A pair (i, j) is a negative unless j is the positive of i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbt_fast.loss.arguments import check_embeddings, check_integers
from hbt_fast.loss.ranks import meet


def negative_variance(
    queries: Tensor,
    passages: Tensor,
    *,
    positives: Tensor | None = None,
    size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Mean over negatives of (q_i . p_j + 1 / (n - 1))^2: added to a contrastive loss, with a factor of about 30.

    n vectors spread evenly have similarity -1/(n-1) with each other; this is the mean square distance from that (the
    auxiliary loss of arXiv 2506.09781). No N x M work: with c = 1/(n-1), the sum over all pairs is
    <Q^T Q, P^T P> + 2c (sum_i q_i).(sum_j p_j) + N M c^2, from which the positives are taken.

    Args:
        queries: (N, d), any float dtype, unit vectors; computed in fp32, or float64 if one input is float64.
        passages: (M, d).
        positives: (N,) int64, the passage of each query; None: query i has passage i. With a group as for `info_nce`.
        size: n; None: the number of passages, of all ranks.
        group: queries and passages of all ranks count. Only d x d sums travel (and all passages, if `positives` is
            given). Gradients come times the number of ranks, as those of `info_nce`, so that DDP's average is right.

    Returns:
        0-d loss in fp32 or float64; 0 if there is one passage only, and so no negative.

    Raises:
        ValueError: wrong shapes, dtypes or devices, NaN or Inf, positives out of range, size < 2.
    """
    error = None
    try:
        check_embeddings(queries, passages)
        n_own = queries.shape[0]
        check_integers("positives", positives, n_own, "one passage index per query")
        if positives is None and passages.shape[0] < n_own:
            raise ValueError(f"positives is None, but there are {n_own} queries and only {passages.shape[0]} passages")
        if size is not None and size < 2:
            raise ValueError(f"size must be at least 2 (it is the n of 1/(n-1)), not {size}")
    except ValueError as e:
        error = e
        if not (isinstance(queries, Tensor) and isinstance(passages, Tensor)):
            raise
    sizes = {}
    if error is None:
        sizes = {"queries": n_own, "passages": passages.shape[0], "the width d": queries.shape[1]}
        sizes |= {"passing positives": positives is not None, "size": size or 0}
    ranks = meet(group, sizes, queries.device, error)

    with torch.autocast(queries.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(queries.dtype, passages.dtype), torch.float32)
        q_ND, p_MD = queries.to(dtype), passages.to(dtype)
        n, m = sum(ranks.query_counts), sum(ranks.passage_counts)
        if m == 1:
            return 0.0 * (q_ND.sum() + p_MD.sum())
        c = 1.0 / ((size or m) - 1)

        gram_q_DD, gram_p_DD = ranks.sum(q_ND.T @ q_ND), ranks.sum(p_MD.T @ p_MD)
        sum_q_D, sum_p_D = ranks.sum(q_ND.sum(0)), ranks.sum(p_MD.sum(0))
        all_pairs = (gram_q_DD * gram_p_DD).sum() + 2 * c * (sum_q_D * sum_p_D).sum() + n * m * c * c

        if positives is None:
            positive_ND = p_MD[:n_own]  # of this rank: nothing to gather
        else:
            positives_A = ranks.gather_queries(positives.to(queries.device))
            if not bool(((positives_A >= 0) & (positives_A < m)).all()):
                raise ValueError(f"positives must be passage indices in [0, {m})")
            positive_ND = ranks.gather_passages(passages, dtype)[positives_A[ranks.own_queries]]
        positive_pairs = ranks.sum((((q_ND * positive_ND).sum(1) + c) ** 2).sum())
        return ranks.for_averaging((all_pairs - positive_pairs) / (n * (m - 1)))
