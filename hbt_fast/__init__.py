"""hbt_fast: hybrid batch training for multilingual dense retrieval (arXiv 2408.10536), and its loss alone."""

from hbt_fast.loss import InfoNCELoss, explain, info_nce, info_nce_with_grad, negative_variance

__all__ = ["InfoNCELoss", "explain", "info_nce", "info_nce_with_grad", "negative_variance"]
