"""Language bias at the top of the ranking: how much of each query's top k is in the query's own language.

Beside it stands the share of the pool in that language: what a ranking that pays no heed to languages would show. Rank
distance (`metrics`) tells how far parallel answers lie apart; this tells in whose favour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def language_bias(
    indices: np.ndarray, query_languages: Sequence[str], candidate_languages: Sequence[str]
) -> dict[str, np.ndarray]:
    """How far the top of the whole pool's ranking leans to the query's own language, for every query.

    Args:
        indices: (N, k) integers, best candidates first, from `search` over the pool of all languages. -1, where an
            approximate index found nothing, does not count.
        query_languages: N codes.
        candidate_languages: M codes.

    Returns:
        (N,) float64 each: "own-language@1" and "own-language@<k>" (share of the top 1 and top k in the query's
        language; NaN for a query with nothing found) and "pool share" (share of all M candidates in its language).

    Raises:
        ValueError: a number of rows that is not that of the queries, or an index that is not a candidate's.
    """
    indices = np.asarray(indices)
    n_candidates = len(candidate_languages)
    if indices.ndim != 2 or indices.shape[1] == 0 or len(indices) != len(query_languages):
        raise ValueError(
            f"indices must be (N, k), k > 0, with one row per query; they are {indices.shape} and there are "
            f"{len(query_languages)} query languages"
        )
    outside = np.argwhere((indices < -1) | (indices >= n_candidates))
    if len(outside):
        row, column = outside[0]
        raise ValueError(
            f"indices[{row}, {column}] is {indices[row, column]}, which is none of the {n_candidates} candidates"
        )
    codes = {language: i for i, language in enumerate(sorted(set(query_languages) | set(candidate_languages)))}
    language_N = np.array([codes[language] for language in query_languages], dtype=np.int64)
    language_M = np.array([codes[language] for language in candidate_languages], dtype=np.int64)
    found_Nk = indices >= 0
    own_Nk = (language_M[indices] == language_N[:, None]) & found_Nk
    pool_share = np.bincount(language_M, minlength=len(codes)) / max(n_candidates, 1)

    def share(k: int) -> np.ndarray:
        own, found = own_Nk[:, :k].sum(axis=1), found_Nk[:, :k].sum(axis=1)
        return np.divide(own, found, out=np.full(len(own), np.nan), where=found > 0)

    return {f"own-language@{k}": share(k) for k in (1, indices.shape[1])} | {"pool share": pool_share[language_N]}
