"""A NaN or infinite gradient changes nothing, under every engine and on every rank; too many end the run by name."""

import gc
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch
from hbt_fast.engine.launch import make_engine, start
from hbt_fast.engine.step import Stepper, StepResult
from hbt_fast.loss import info_nce_with_grad
from hbt_fast.loss.ranks import NotFiniteError
from hbt_fast.train import main

BAD = (1, 4)  # of these steps of ENDS
ENDS = 6


class _Tokenizer:  # as much of one as a model's config needs
    pad_token_id, bos_token_id, eos_token_id = 1, 0, 2

    def __len__(self):
        return 100


def gradient_steps(steps, rank: int, world, settings, bad) -> tuple[list[float], dict, dict, int]:
    """Steps on random texts; in bad steps rank 1 (of one rank: 0) sends a NaN backward. (norms, state, updates)."""
    shape = ScratchConfig(100, 16, 1, 2)
    encoder = encoder_from_scratch(_Tokenizer(), shape, max_length=16, dropout=0.0, seed=3).train()
    engine = make_engine(encoder, settings, world)
    norms, states = [], []
    for step in steps:
        draws = torch.Generator().manual_seed(10 * step + rank)
        tokens = torch.randint(3, 100, (12,), generator=draws)
        factor = math.nan if step in bad and rank == world.size - 1 else 1.0
        with engine.accumulate():
            for part in range(2):
                out = engine(tokens, torch.tensor([0, 4, 12]))
                weights = torch.rand(out.shape, generator=draws)
                engine.backward((out * weights).sum() * factor, last=part == 1)
        norms.append(engine.step())
        states.append(engine.state())
    return norms, states, engine.updates


ENGINES = {"torch": {"engine": "torch"}, **{f"zero-{n}": {"engine": "deepspeed", "zero_stage": n} for n in range(4)}}


def worker(rank: int, world: int, folder: str, engines: list[str]) -> None:
    from hbt_fast.config import TrainConfig

    for name in engines:
        out = Path(folder) / name
        out.mkdir(exist_ok=True)
        run_engine(rank, out, TrainConfig(precision="fp32", learning_rate=1e-2, **ENGINES[name]))


def run_engine(rank: int, out: Path, settings) -> None:
    here = start(settings)
    norms, states, updates = gradient_steps(range(ENDS), rank, here, settings, BAD)
    good = [step for step in range(ENDS) if step not in BAD]
    _, without, _ = gradient_steps(good, rank, here, settings, ())
    (out / f"norms-{rank}.json").write_text(json.dumps({"finite": [*map(math.isfinite, norms)], "updates": updates}))
    if rank == 0:
        for name, state in {"before": states[3], "after": states[4], "end": states[-1], "without": without[-1]}.items():
            save_file({f"{part}.{k}": v for part, d in zip("pm", state, strict=True) for k, v in d.items()}, out / name)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder that two ranks wrote under every engine that is there."""
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks(worker, 2, str(folder), list(ENGINES) if shutil.which("c++") else ["torch"])
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_nan_gradient_on_one_rank_changes_nothing_on_any(two_ranks, engine):
    folder = two_ranks / engine
    if not folder.is_dir():
        pytest.skip("DeepSpeed compiles its CPU communication at first use, and there is no C++ compiler")
    expected = {"finite": [step not in BAD for step in range(ENDS)], "updates": ENDS - len(BAD)}
    for rank in range(2):
        assert json.loads((folder / f"norms-{rank}.json").read_text()) == expected
    before, after, end, without = (load_file(folder / name) for name in ("before", "after", "end", "without"))
    for a, b in ((before, after), (end, without)):
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert [key for key in end if torch.equal(end[key], after[key]) and end[key].any()] == []  # the last step trained


def meeting(rank: int, world: int) -> None:
    from hbt_fast.config import TrainConfig

    here = start(TrainConfig(engine="torch"))
    q, p = torch.rand(3, 4), torch.rand(3, 4)
    if rank == 1:
        p[2, 1] = math.nan
    with pytest.raises(NotFiniteError, match="row 2" if rank else "wrong on rank 1: NaN or Inf"):
        info_nce_with_grad(q, p, group=here.group)
    here.barrier()
    gc.collect()  # the error's traceback holds the group, whose threads would outlive it


def test_a_nan_embedding_on_one_rank_is_the_same_error_on_all():
    run_ranks(meeting, 2)


SMALL = [
    "data.sources=[{format: cldr, name: cldr, limit: 200}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=16", "model.scratch={vocabulary: 400, hidden: 32, layers: 1, heads: 2}", "model.dropout=0.1",
    "train.run_dir=run", "train.steps=8", "train.checkpoint_every=2", "train.log_every=1", "train.engine=torch",
]  # fmt: skip


def break_steps(monkeypatch, gradients=(), embeddings=()):
    """Make the program's own steps send a NaN backward, or embed one."""
    whole = Stepper._attempt

    def attempt(stepper, batch):
        if batch.plan.step in embeddings:
            return StepResult("an embedding is not finite: queries contains NaN or Inf, first in row 0"), False
        step = stepper.engine.step

        def broken():
            next(p for p in stepper.engine.module.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
            return step()

        with pytest.MonkeyPatch.context() as patch:
            if batch.plan.step in gradients:
                patch.setattr(stepper.engine, "step", broken)
            return whole(stepper, batch)

    monkeypatch.setattr(Stepper, "_attempt", attempt)


def test_a_run_skips_bad_steps_says_so_and_resumes_to_the_same_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    break_steps(monkeypatch, gradients=(1, 5), embeddings=(2,))
    main(SMALL)
    said = capsys.readouterr().out
    assert "step 1 is skipped, weights stay as they were: the gradient's norm is inf" in said
    assert "step 2 is skipped, weights stay as they were: an embedding is not finite: queries contains NaN" in said
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "skipped" in r] == [1, 2, 5]
    assert [r["step"] for r in records if "step" in r] == list(range(8))
    bad = [json.loads(line) for line in Path("run/bad-batches.jsonl").read_text().splitlines()]
    assert [(r["step"], r["source"], len(r["rows"])) for r in bad] == [(s, "cldr", 16) for s in (1, 2, 5)]
    assert json.loads(Path("run/checkpoint-000006/state.json").read_text())["progress"]["skipped"] == 3

    shutil.copytree("run", "again")
    shutil.rmtree("again/checkpoint-000008")
    main([*SMALL, "train.run_dir=again", "train.resume=true"])
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(f"{run}/checkpoint-000008/{name}") for run in ("run", "again"))
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_too_many_bad_steps_in_a_row_end_the_run_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    break_steps(monkeypatch, gradients=(1, 3, 4), embeddings=(5,))
    with pytest.raises(SystemExit) as exit_:
        main(SMALL)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    for words in ("hbt_fast.train: step 5:", "3 steps in a row without a finite gradient", "run/bad-batches.jsonl"):
        assert words in said
    assert len(Path("run/bad-batches.jsonl").read_text().splitlines()) == 4
    with pytest.raises(SystemExit):
        main([*SMALL, "train.max_skipped_steps=0", "train.run_dir=other"])
    assert "train.max_skipped_steps is 0; write a whole number from 1 on" in capsys.readouterr().err
