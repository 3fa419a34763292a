"""The claims about the kernels and about the loss on them hold on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLAIMS = ("kernels_claims", "loss_triton_claims", "loss_triton_memory", "loss_triton_ranks")


@pytest.mark.parametrize("claims", [f"test_{name}.py" for name in CLAIMS])
def test_every_claim_holds_in_the_interpreter(claims):
    """In a process of its own: the interpreter is chosen when triton is imported, for good."""
    claims = Path(__file__).with_name(claims)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=5", str(claims)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=claims.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "needs a GPU, or TRITON_INTERPRET" not in done.stdout, done.stdout
