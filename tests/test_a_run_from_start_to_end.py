"""The program itself, on a small share of the demo: it trains, writes what it promises, and goes on after a stop."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hbt_fast.encoder import Encoder
from hbt_fast.encoder.scratch import train_tokenizer
from hbt_fast.train import main

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = [
    "--config", str(REPOSITORY / "configs" / "demo.yaml"), "data.sources=[{format: cldr, name: cldr, limit: 400}]",
    "data.languages=[en, de, zh]", "data.store_dir=stores", "batch.size=24",
    "model.scratch={vocabulary: 400, hidden: 32, layers: 1, heads: 2}",
    "train.run_dir=run", "train.steps=8", "train.checkpoint_every=4", "train.log_every=4",
    "train.micro_batch_tokens=256", "train.keep_gib=0.002", "model.dropout=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one finished run and what it printed."""
    folder = tmp_path_factory.mktemp("program")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(SMALL)
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    run = finished / "run"
    for name in (
        "config.yaml", "metrics.jsonl", "loss.png", "language-pairs.png",
        "evaluation.json", "evaluation.md", "evaluation.png", "tensorboard",
        "checkpoint-000004", "checkpoint-000008", "model/README.md", "model/modules.json", "model/model.safetensors",
    ):  # fmt: skip
        assert (run / name).exists(), name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(8))
    assert [r["evaluation"] for r in records if "evaluation" in r] == ["before training", "after training"]
    assert {r["kind"] for r in records if "loss" in r} == {"mono", "cross"}
    drawn = [r for r in records if "drawn_until" in r]
    assert [r["drawn_until"] for r in drawn] == [4, 8]
    assert sum(drawn[-1]["pairs"].values()) == 8 * 24
    assert sum(drawn[-1]["batches"].values()) == 8
    assert all(0 <= r["waited"] <= r["seconds"] for r in records if "loss" in r)
    card = (run / "model" / "README.md").read_text()
    for words in ("hybrid batches", "cldr: 400 rows", "rank distance", '"query": "Query: "'):
        assert words in card
    before, after = (json.loads((run / name).read_text()) for name in ("evaluation-before.json", "evaluation.json"))
    assert before["queries"] == after["queries"] > 500
    assert before["settings"] == after["settings"]
    assert {"precision", "pooling", "max_length", "dimensions", "index", "questions"} <= set(after["settings"])
    assert after["mul"] != before["mul"]
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]
    assert Encoder.from_pretrained(run / "model").encode(["x"], "Query: ").shape == (1, 32)


def test_one_set_of_texts_gives_one_tokenizer():
    texts = [f"{a} {b} {a * b} zwölf часов" for a in range(60) for b in range(40)]
    made = {train_tokenizer(iter(texts), 500).backend_tokenizer.to_str() for _ in range(3)}
    assert len(made) == 1


def cut_short(checkpoint: Path) -> None:
    state = checkpoint / "state.json"
    state.write_text(state.read_text()[:40])


def flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit])
def test_a_run_that_stopped_halfway_goes_on_to_the_same_end(finished, tmp_path, monkeypatch, damage):
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    damage(tmp_path / "run" / "checkpoint-000008")  # the one before it is used
    main([*SMALL, "train.resume=true", f"data.store_dir={finished / 'stores'}"])
    for name in ("model/model.safetensors", "checkpoint-000008/optimizer.safetensors"):
        whole, resumed = load_file(finished / "run" / name), load_file(tmp_path / "run" / name)
        assert whole.keys() == resumed.keys()
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(8))
    whole = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r for r in records if "drawn_until" in r] == [r for r in whole if "drawn_until" in r]


def test_code_switched_batches_train(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "en_de.tsv").write_text("in\tin der\nof\tvon\nday\tTag\nyear\tJahr\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run = [*SMALL, "batch.strategy=code-switched", "batch.code_switch.lexicons=[en_de.tsv]", "train.steps=4",
           "eval.task=none", f"data.store_dir={finished / 'stores'}"]  # fmt: skip
    main(run)
    assert "no word of zh; texts in these languages stay as they are" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    main([*run, "train.resume=true"])
    assert "4 of 4 steps are done" in capsys.readouterr().out
    with (tmp_path / "en_de.tsv").open("a") as file:
        file.write("month\tMonat\n")
    with pytest.raises(SystemExit):
        main([*run, "train.resume=true"])
    assert "of a run with other settings or data: lexicons' entries was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["train.resume=true", "batch.alpha=0.4"], "of a run with other settings or data: batch.alpha was 0.5, is 0.4"),
        (["train.run_dir=other", "eval.task=xquad-r"], "eval.data is not set"),
        (["train.run_dir=other", "train.engine=torch", "train.zero_stage=1"], "needs train.engine deepspeed"),
        (["train.run_dir=other", "batch.strategy=code-switched"], "batch.code_switch.lexicons names no dictionary"),
        (["train.run_dir=other", "batch.size=5000"], "fewer different contents than that: mono"),
        (["train.run_dir=other", "model.path=/nowhere"], "no such folder"),
    ],
)
def test_what_does_not_go_together_is_refused(finished, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(finished)
    with pytest.raises(SystemExit) as exit_:
        main([*SMALL, *changed])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_earlier_run_is_moved_aside_and_nothing_of_it_is_lost(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    main([*SMALL, "train.steps=2", "eval.task=none", f"data.store_dir={finished / 'stores'}"])
    assert (tmp_path / "run-1" / "checkpoint-000008" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoint-000002").is_dir()
    assert "is now run-1" in capsys.readouterr().out


def test_a_changed_input_builds_another_store_and_an_unchanged_one_does_not(finished, monkeypatch, capsys):
    from hbt_fast.config import parse
    from hbt_fast.prepare import prepare

    monkeypatch.chdir(finished)
    there = set((finished / "stores").iterdir())
    prepare(parse("test", "", SMALL))
    assert set((finished / "stores").iterdir()) == there
    prepare(parse("test", "", [*SMALL, "model.query_prompt=Q"]))
    assert len(set((finished / "stores").iterdir()) - there) == 2  # tokenizer and store
    path = finished / "pairs.jsonl"
    stores = []
    for text in ("one", "two", "one"):
        path.write_text(json.dumps({"query": "q", "passage": text, "language": "en"}))
        source = f"data.sources=[{{path: {path}, name: own}}]"
        stores.append(prepare(parse("test", "", [*SMALL, "model.path=run/model", source]))[0].identity)
    assert stores[0] == stores[2] != stores[1]


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication at first use")
def test_the_deepspeed_launcher_runs_two_ranks_on_the_cpu(finished, tmp_path):
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        str(launcher), "--num_gpus", "2", str(REPOSITORY / "hbt_fast" / "train.py"), *SMALL, "train.run_dir=two",
        "train.zero_stage=2", "model.dropout=0.0", f"data.store_dir={finished / 'stores'}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "2 x cpu" in done.stdout
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
    assert "step 8/8" in done.stdout
