"""Contrastive losses for dense retrieval: InfoNCE with every option of the loss contract, and a regulariser."""

from hbt_fast.loss.interface import info_nce, info_nce_with_grad
from hbt_fast.loss.module import InfoNCELoss
from hbt_fast.loss.planner import explain
from hbt_fast.loss.variance import negative_variance

__all__ = ["InfoNCELoss", "explain", "info_nce", "info_nce_with_grad", "negative_variance"]
