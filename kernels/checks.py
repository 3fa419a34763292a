"""Are the arguments of an operation what its kernels assume? Looks at shapes, dtypes and devices, never at values."""

from __future__ import annotations

import torch
from torch import Tensor

from hbt_fast.kernels.epilogue import Coefficients

OPERANDS = (torch.float16, torch.bfloat16, torch.float32)


def check_operands(q_RD: Tensor, p_MD: Tensor) -> None:
    """Raise unless these are two row-major matrices that can be multiplied.

    Args:
        q_RD: queries.
        p_MD: passages.
    """
    if q_RD.dim() != 2 or p_MD.dim() != 2 or q_RD.shape[1] != p_MD.shape[1] or 0 in q_RD.shape or 0 in p_MD.shape:
        raise ValueError(f"queries {tuple(q_RD.shape)} and passages {tuple(p_MD.shape)}: (R, D) and (M, D) are needed")
    if q_RD.dtype not in OPERANDS or q_RD.dtype != p_MD.dtype:
        raise TypeError(f"queries are {q_RD.dtype}, passages {p_MD.dtype}: one of {OPERANDS} for both is needed")
    if q_RD.device != p_MD.device:
        raise ValueError(f"queries are on {q_RD.device}, passages on {p_MD.device}")
    if not (q_RD.is_contiguous() and p_MD.is_contiguous()):
        raise ValueError("queries and passages must be contiguous")


def check_scalar(value: Tensor, device: torch.device, name: str) -> None:
    """Raise unless the value is a 0-d float32 tensor on the device.

    Args:
        value: the tensor.
        device: of the operands.
        name: for the message.
    """
    if value.dtype != torch.float32:
        raise TypeError(f"{name} is {value.dtype}, not torch.float32")
    if value.dim() != 0 or value.device != device:
        raise ValueError(f"{name} has shape {tuple(value.shape)} on {value.device}; 0-d on {device} is needed")


def check_coefficients(coefficients: Coefficients, rows: int, positives: int, device: torch.device) -> None:
    """Raise unless the coefficients fit a gradient of `rows` rows and `positives` columns.

    Args:
        coefficients: as given to `gradient`.
        rows: R.
        positives: A.
        device: of the operands.
    """
    check_scalar(coefficients.normaliser, device, "normaliser")
    for name, size in zip(coefficients._fields, (rows, rows, positives, positives), strict=False):
        value = getattr(coefficients, name)
        if value.dtype != torch.float32:
            raise TypeError(f"{name} is {value.dtype}, not torch.float32")
        if value.shape != (size,) or not value.is_contiguous() or value.device != device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and strides {value.stride()} on {value.device}; "
                f"({size},), contiguous, on {device} is needed"
            )


def matrix_like(
    given: Tensor | None, rows: int, columns: int, dtype: torch.dtype, device: torch.device, name: str
) -> Tensor:
    """The given output or input matrix if it fits, a new one if there is none.

    Args:
        given: the matrix, or None.
        rows: it must have.
        columns: it must have; adjacent in memory.
        dtype: it must have.
        device: of the operands.
        name: for the message.
    """
    if given is None:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    if given.dtype != dtype:
        raise TypeError(f"{name} is {given.dtype}, not {dtype}")
    apart = given.stride(0) if rows > 1 and given.dim() == 2 else columns  # torch leaves strides of size 1 open
    if given.shape != (rows, columns) or apart < columns or (columns > 1 and given.stride(1) != 1):
        raise ValueError(
            f"{name} has shape {tuple(given.shape)} and strides {given.stride()}; ({rows}, {columns}) with adjacent "
            "columns is needed"
        )
    if given.device != device:
        raise ValueError(f"{name} is on {given.device}, the operands on {device}")
    return given
