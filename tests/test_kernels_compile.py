"""The kernels compile for real chips without one in the machine: tensor cores are used, registers and memory suffice.

The launches are those of the public functions: they are called on the CPU with the launch itself replaced by a note of
its arguments, which are then compiled for a chip. So the sizes, types and options are those that a user gets.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from pathlib import Path

import kernels_reference as reference
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hbt_fast.kernels import Coefficients, fused, library, sweep

if not isinstance(fused._gradient_kernel, JITFunction):
    pytest.skip("TRITON_INTERPRET is set: nothing compiles", allow_module_level=True)

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # per block, CUDA C++ programming guide, table of limits
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64",
}  # fmt: skip


@functools.cache
def launches(
    operation: str, dtype: torch.dtype, precision: str, major: int, sizes: tuple[int, int, int] = (64, 2048, 64)
) -> list[tuple]:
    """(kernel, arguments, options) of one call with every option on; by default with sizes divisible as in training."""
    case = reference.make_case(*sizes, scale=20.0, dtype=dtype, margin=True, query_ids=True)
    r, a = sizes[0], case.who.y_A.shape[0]
    coefficients = Coefficients(*(torch.zeros(n) for n in (r, r, a, a)), torch.tensor(1.0))
    given = (case.q_RD, case.p_MD, case.scale, case.who)
    swept = (sweep.products(case.q_RD, case.p_MD), case.scale, case.who)
    calls = {
        "fused exp_rows": lambda: fused.exp_rows(*given, precision=precision),
        "fused statistics": lambda: fused.row_and_column_statistics(*given, precision=precision),
        "fused gradient": lambda: fused.gradient(*given, coefficients, precision=precision),
        "sweep exp_rows": lambda: sweep.exp_rows(*swept, dtype),
        "sweep statistics": lambda: sweep.row_and_column_statistics(*swept),
        "sweep gradient": lambda: sweep.gradient(*swept, coefficients, dtype),
        "rescale": lambda: library.rescale(torch.ones(sizes), torch.tensor(1.0)),
    }
    noted = []

    def note(kernel, *arguments, grid, warmup, **named):
        bound = dict(zip(kernel.arg_names, arguments, strict=False))
        bound |= {name: named.pop(name) for name in kernel.arg_names if name in named}
        noted.append((kernel, bound, named))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        patch.setattr(fused, "architecture", lambda device: major)
        calls[operation]()
    return noted


def described(value, path: tuple[int, ...], constants: dict, attributes: dict, constant: bool = False):
    """The type of an argument as Triton's launcher would find it; fills in constants and divisibility."""
    if isinstance(value, tuple):
        parts = [described(v, (*path, i), constants, attributes) for i, v in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if constant or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def compiled(kernel: JITFunction, bound: dict, options: dict, chip: int):
    constants, attributes = {}, {}
    signature = {
        name: described(bound[name], (i,), constants, attributes, kernel.params[i].is_constexpr)
        for i, name in enumerate(kernel.arg_names)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(options))


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers per thread, and bytes of stack and local memory per thread."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


FUSED = ["fused exp_rows", "fused statistics", "fused gradient"]
SWEPT = ["sweep exp_rows", "sweep statistics", "sweep gradient"]
TYPES = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]
# Half a minute of compiling: every kernel, every type and every chip in some combination. `python` this file for all.
CASES = [
    ("fused exp_rows", torch.float16, "ieee", 90),
    ("fused statistics", torch.bfloat16, "ieee", 90),
    ("fused gradient", torch.float16, "ieee", 90),
    ("fused gradient", torch.float32, "tf32", 90),
    ("fused gradient", torch.float32, "ieee", 90),
    ("fused statistics", torch.bfloat16, "ieee", 80),
    ("fused gradient", torch.float16, "ieee", 100),
    ("sweep exp_rows", torch.bfloat16, "ieee", 90),
    ("sweep statistics", torch.float16, "ieee", 100),
    ("sweep gradient", torch.float32, "ieee", 80),
    ("rescale", torch.float32, "ieee", 90),
]


@pytest.mark.parametrize(("operation", "dtype", "precision", "chip"), CASES)
def test_kernels_compile_for_the_chip_without_spilling(operation, dtype, precision, chip, tmp_path):
    if not CUOBJDUMP.is_file():
        pytest.skip(f"triton brings no {CUOBJDUMP}")
    for kernel, bound, options in launches(operation, dtype, precision, chip // 10):
        made = compiled(kernel, bound, options, chip)
        used = resources(made.asm["cubin"], tmp_path)
        what = f"{kernel.__name__} {operation} {dtype} {precision} sm_{chip}: {used}, {made.metadata.shared} B shared"
        print(what, flush=True)
        assert used["LOCAL"] == 0, what
        assert used["STACK"] == 0, what
        assert made.metadata.shared <= SHARED_LIMIT[chip], what
        products = operation.startswith("fused") and kernel.__name__ != "_combine_kernel"
        if products and (dtype != torch.float32 or precision == "tf32"):
            assert TENSOR_CORE[chip] in made.asm["ptx"], what


@pytest.mark.parametrize("operation", [*FUSED, *SWEPT, "rescale"])
def test_sizes_of_one_compile_too(operation):
    """Triton makes an argument of 1 a constant, on which not everything can be done that can with a number."""
    for kernel, bound, options in launches(operation, torch.float32, "ieee", 9, (1, 1, 1)):
        assert compiled(kernel, bound, options, 90).asm["cubin"]


if __name__ == "__main__":  # every combination, some ten minutes
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for case in itertools.product(FUSED + SWEPT, TYPES, SHARED_LIMIT):
            operation, (dtype, precision), chip = case
            test_kernels_compile_for_the_chip_without_spilling(operation, dtype, precision, chip, Path(folder))
