#!/usr/bin/env bash
# Everything that only a GPU can say, in one command of under 10 minutes: are kernels and steps right, how fast, which tiles.
# Tables, JSON and logs go to ${OUT:-bench/results}. A part that fails or takes too long does not stop the next.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset TRITON_INTERPRET

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU here; nothing was measured"; exit 1; }

if ! "$python" -c 'import hbt_fast.kernels' 2>/dev/null; then  # not installed, as on a lent machine
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . || { echo "cannot install hbt_fast; nothing was measured"; exit 1; }
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c 'import platform, torch, triton; print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'

failed=0
part() {  # seconds, name, arguments of pytest; an interrupt lets pytest print the table of what it has
    local limit=$1 name=$2
    shift 2
    echo "== $name (at most $limit s)"
    timeout -s INT -k 15 "$limit" "$python" -m pytest -q -p no:cacheprovider "$@" 2>&1 | tee "$out/gpu-$name.log"
    local rc=${PIPESTATUS[0]}
    [ "$rc" = 0 ] || { echo "== $name: exit status $rc (2 or 124: out of time)"; failed=1; }
}

part 150 correct tests/test_kernels_claims.py tests/test_counts_kernel.py tests/test_loss_triton_claims.py tests/test_loss_triton_memory.py --maxfail=20
part 110 steps tests/test_packed_equals_padded.py tests/test_steps_on_a_gpu.py
part 170 speed bench/bench_loss.py -k "not tiles" --results="$out/gpu-loss.md" --benchmark-json="$out/gpu-loss.json"
part 60 step bench/bench_step.py --results="$out/gpu-step.md" --benchmark-json="$out/gpu-step.json"
part 120 train bench/bench_train.py --results="$out/gpu-train.md" --benchmark-json="$out/gpu-train.json"
part 40 eval bench/bench_eval.py -k xquad --results="$out/gpu-eval.md" --benchmark-json="$out/gpu-eval.json"
part 60 encode bench/bench_encode.py --results="$out/gpu-encode.md" --benchmark-json="$out/gpu-encode.json"
part 60 tiles bench/bench_loss.py -k tiles --results="$out/gpu-tiles.md" --benchmark-json="$out/gpu-tiles.json"

echo "== written"
ls -l "$out"/gpu-*
exit $failed
