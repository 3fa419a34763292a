"""What someone with another trainer pays for: torch, and nothing heavy; and no module stands in for another package."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run(code, *arguments, **options):
    done = subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_loss_imports_torch_alone():
    heavy = {"transformers", "deepspeed", "numba", "faiss", "matplotlib", "datasets", "sentence_transformers", "triton"}
    bare = set(run("import sys, torch; print(*sys.modules)"))
    ours = set(run("import sys, hbt_fast; print(*sys.modules)"))
    assert not heavy & {name.partition(".")[0] for name in ours - bare}
    assert {name.partition(".")[0] for name in ours - bare} >= {"hbt_fast"}


def test_the_program_starts_without_what_only_some_runs_need():
    loaded = {name.partition(".")[0] for name in run("import sys, hbt_fast.train; print(*sys.modules)")}
    assert not {"deepspeed", "faiss", "matplotlib", "datasets", "sentence_transformers"} & loaded


def test_run_as_a_file_the_program_hides_no_package(tmp_path):
    # `deepspeed hbt_fast/train.py` puts hbt_fast/ on sys.path, where evaluate.py would be found as `evaluate`
    code = (
        "import sys, runpy, importlib.util; sys.argv = ['train.py', '--help']; "
        f"sys.path[0] = {str(REPOSITORY / 'hbt_fast')!r}\n"
        f"try: runpy.run_path({str(REPOSITORY / 'hbt_fast' / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "found = importlib.util.find_spec('evaluate')\n"
        "print('SHADOWED' if found and 'hbt_fast' in (found.origin or '') else 'FREE')"
    )
    assert run(code, cwd=tmp_path)[-1] == "FREE"


def test_data_encoder_and_loss_know_nothing_of_the_engine():
    for part in ("data", "encoder", "loss"):
        loaded = run(
            f"import sys, pkgutil, importlib, hbt_fast.{part} as p\n"
            f"for m in pkgutil.iter_modules(p.__path__): importlib.import_module(f'hbt_fast.{part}.' + m.name)\n"
            "print(*sys.modules)"
        )
        assert not [name for name in loaded if name.startswith(("hbt_fast.engine", "hbt_fast.train"))]
