"""LoRA, gradient checkpointing, torch.compile, two towers, a learned temperature: each trains in the whole program."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from hbt_fast.encoder import Encoder
from hbt_fast.engine.metrics import read_records
from hbt_fast.train import main

SMALL = [
    "data.sources=[{format: cldr, name: cldr, limit: 300}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=24", "model.scratch={vocabulary: 400, hidden: 32, layers: 2, heads: 2}", "model.dropout=0.1",
    "train.steps=8", "train.checkpoint_every=4", "train.learning_rate=0.003", "train.micro_batch_tokens=256",
    "train.engine=torch", "eval.task=cldr", "eval.before=false",
]  # fmt: skip
TEXTS = ["en which red", "de the old stone 7", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the stores, a plain run and its model as a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*SMALL, "train.run_dir=plain"])
    return folder


def run(folder: Path, name: str, *more: str, patch: pytest.MonkeyPatch) -> Path:
    patch.chdir(folder)
    main([*SMALL, f"train.run_dir={name}", *more])
    return folder / name


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_records(run / "metrics.jsonl") if "loss" in r]


def assert_resumes_alike(folder: Path, name: str, *more: str, patch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / name, folder / f"{name}-again")
    shutil.rmtree(folder / f"{name}-again" / "checkpoint-000008")
    again = run(folder, f"{name}-again", *more, "train.resume=true", patch=patch)
    for part in ("model", "optimizer"):
        a, b = (load_file(r / "checkpoint-000008" / f"{part}.safetensors") for r in (folder / name, again))
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_gradient_checkpointing_changes_no_bit(folder, monkeypatch):
    made = run(folder, "checkpointing", "model.gradient_checkpointing=true", patch=monkeypatch)
    a, b = (load_file(r / "model" / "model.safetensors") for r in (folder / "plain", made))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_gradient_checkpointing_keeps_less(folder, monkeypatch):
    from test_adaptive_caching import CPU, inputs, micro

    from hbt_fast.config import ModelConfig
    from hbt_fast.encoder.scratch import ScratchConfig
    from hbt_fast.encoder.towers import make_towers
    from hbt_fast.engine.memory import KeptGraphs

    tokenizer = Encoder.from_pretrained(folder / "plain" / "model").tokenizer
    bytes_of = []
    for on in (False, True):
        shape = ScratchConfig(400, 64, 4, 2)
        towers = make_towers(ModelConfig(scratch=shape, gradient_checkpointing=on), tokenizer).train()
        graphs = KeptGraphs(towers, CPU)
        with graphs.measured(micro(8, 30)):
            towers(*inputs(micro(8, 30)))
        bytes_of.append(graphs.seen[0][2])
    hidden_states = 4 * 8 * 30 * 64 * 4
    assert hidden_states < bytes_of[1] < bytes_of[0] / 4


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_encoder_trains_to_nearly_the_same(folder, monkeypatch):
    options = ["model.dropout=0", "train.steps=3", "model.scratch={vocabulary: 400, hidden: 32, layers: 1, heads: 2}"]
    plain = losses(run(folder, "no-dropout", *options, patch=monkeypatch))
    made = run(folder, "compiled", *options, "model.compile=true", patch=monkeypatch)
    np.testing.assert_allclose(losses(made), plain, rtol=1e-4)
    assert Encoder.from_pretrained(made / "model").encode(TEXTS).shape == (3, 32)


def test_lora_trains_adapters_only_and_exports_them_merged(folder, monkeypatch, capsys):
    pytest.importorskip("peft")
    base = str(folder / "plain" / "model")
    options = [f"model.path={base}", "model.lora={rank: 4, alpha: 8}"]
    made = run(folder, "lora", *options, patch=monkeypatch)
    checkpoint = load_file(made / "checkpoint-000008" / "model.safetensors")
    assert all("lora_" in name for name in checkpoint)
    assert sum(v.numel() for v in checkpoint.values()) < 0.5 * sum(
        v.numel() for v in load_file(f"{base}/model.safetensors").values()
    )

    before, after = load_file(f"{base}/model.safetensors"), load_file(made / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name in before if name.endswith(".weight") and before[name].ndim == 2}
    assert changed == {name for name in matrices if "embed" not in name and "pooler" not in name}
    adapter = made / "model" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    import peft
    from transformers import AutoModel

    own = Encoder.from_pretrained(base)
    own.model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base, add_pooling_layer=False), adapter)
    np.testing.assert_allclose(own.encode(TEXTS), Encoder.from_pretrained(made / "model").encode(TEXTS), atol=1e-5)

    assert_resumes_alike(folder, "lora", *options, patch=monkeypatch)
    other = shutil.copytree(base, folder / "other-base")
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        run(folder, "lora", f"model.path={other}", options[1], "train.resume=true", patch=monkeypatch)
    assert "frozen weights was" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(folder, "wrong", options[0], "model.lora={rank: 4, target_modules: [nothing]}", patch=monkeypatch)
    assert "model.lora.target_modules: " in capsys.readouterr().err


def worker(rank: int, world: int, folder: str, runs: dict[str, list[str]]) -> None:
    os.chdir(folder)
    for name, options in runs.items():
        main([*SMALL, f"train.run_dir={name}", *options])


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles its CPU communication at first use")
def test_lora_with_gradient_checkpointing_trains_under_zero(folder):
    pytest.importorskip("peft")
    options = [f"model.path={folder}/plain/model", "model.lora={rank: 4, dropout: 0.1}", "train.learning_rate=0.001"]
    deepspeed = [*options, "train.engine=deepspeed", "model.gradient_checkpointing=true", "eval.task=none"]
    runs = {"lora-torch": options, **{f"lora-zero-{n}": [*deepspeed, f"train.zero_stage={n}"] for n in (2, 3)}}
    run_ranks(worker, 2, str(folder), runs)
    models = [load_file(folder / name / "model" / "model.safetensors") for name in runs]
    for name, model in zip(runs, models, strict=True):
        np.testing.assert_allclose(losses(folder / name), losses(folder / "lora-torch"), rtol=1e-4)
        assert max(float((model[key] - models[0][key]).abs().max()) for key in models[0]) < 1e-3


def test_two_towers_with_a_learned_temperature_train_export_and_resume(folder, monkeypatch, capsys):
    options = ["model.separate_towers=true", "loss.learn_temperature=true", "loss.max_scale=20.01"]
    made = run(folder, "towers", *options, patch=monkeypatch)
    records = [r for r in read_records(made / "metrics.jsonl") if "loss" in r]
    temperatures = [r["temperature"] for r in records]
    assert temperatures[0] == pytest.approx(0.05)
    assert len(set(temperatures)) > 4
    assert min(temperatures) >= 1 / 20.01 - 1e-6
    encoders = [Encoder.from_pretrained(made / "model" / name) for name in ("query", "passage")]
    assert not np.allclose(encoders[0].encode(TEXTS), encoders[1].encode(TEXTS), atol=1e-3)
    card = (made / "model" / "README.md").read_text()
    for kind in ("query", "passage"):
        assert f'{kind}_model = SentenceTransformer("model/{kind}")' in card
        assert f'= {kind}_model.encode(["..."], prompt_name="{kind}")' in card
    plain = (folder / "plain" / "model" / "README.md").read_text()
    assert plain.count('\nmodel = SentenceTransformer("model")\n') == 1
    assert 'passages = model.encode(["..."], prompt_name="passage")' in plain
    assert json.loads((made / "evaluation.json").read_text())["queries"] > 100
    assert_resumes_alike(folder, "towers", *options, patch=monkeypatch)
    with pytest.raises(SystemExit):
        run(folder, "towers", "loss.learn_temperature=true", "train.resume=true", patch=monkeypatch)
    assert "model.separate_towers was True, is False" in capsys.readouterr().err


def test_a_learned_scale_stays_below_its_limit_and_can_come_back():
    from test_adaptive_caching import ALONE

    from hbt_fast.config import LossConfig
    from hbt_fast.engine.objective import Objective

    generator = torch.Generator().manual_seed(0)
    q, noise = (torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    ids = torch.arange(6)

    def gradient(passages: torch.Tensor, scale: float) -> tuple[float, float]:
        settings = LossConfig(max_scale=50.0, backend="torch")
        objective = Objective(settings, ALONE, 6, ids)
        result = objective(torch.cat([q, passages]), torch.tensor([scale]).log())
        return float(result.log_scale), objective.temperature

    easy, hard = q, noise  # alike: a larger scale is better; unrelated: a smaller one
    for passages, sign in ((easy, -1), (hard, 1)):
        leaf = torch.tensor([30.0], dtype=torch.float64).log().requires_grad_()  # in float32 it is itself not so exact
        torch.nn.functional.cross_entropy(q.double() @ passages.T.double() * leaf.exp(), ids).backward()
        assert gradient(passages, 30.0) == (pytest.approx(float(leaf.grad), rel=1e-4), pytest.approx(1 / 30))
        assert np.sign(float(leaf.grad)) == sign
    assert gradient(easy, 60.0) == (0.0, pytest.approx(1 / 50))
    assert gradient(hard, 60.0)[0] > 0


def test_matryoshka_is_the_sum_of_the_losses_of_first_dimensions():
    from test_adaptive_caching import ALONE

    from hbt_fast.config import LossConfig
    from hbt_fast.engine.objective import Objective

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(14, 12, generator=generator, dtype=torch.float64), dim=1)
    leaf, scale = embeddings.clone().requires_grad_(), torch.tensor([15.0], dtype=torch.float64).log().requires_grad_()
    expected = 0
    for first in (leaf, *(torch.nn.functional.normalize(leaf[:, :m], dim=1) for m in (6, 2))):
        expected = expected + torch.nn.functional.cross_entropy(first[:5] @ first[5:].T * scale.exp(), torch.arange(5))
    expected.backward()
    objective = Objective(LossConfig(matryoshka_dimensions=[6, 2]), ALONE, 5, torch.arange(9))
    result = objective(embeddings, scale.detach())
    torch.testing.assert_close(result.loss, expected.detach())
    torch.testing.assert_close(result.embeddings, leaf.grad)
    torch.testing.assert_close(result.log_scale, scale.grad)


def test_embeddings_trained_for_it_can_be_cut(folder, monkeypatch, capsys):
    made = run(
        folder, "matryoshka", "loss.matryoshka_dimensions=[16, 8]", "train.learning_rate=0.003", patch=monkeypatch
    )
    plain = run(folder, "plain-fast", "train.learning_rate=0.003", patch=monkeypatch)
    a, b = (list(read_records(path / "metrics.jsonl"))[1]["loss"] for path in (made, plain))
    assert a > 2 * b  # three losses
    assert Encoder.from_pretrained(made / "model").encode(TEXTS, dimensions=8).shape == (len(TEXTS), 8)
    with pytest.raises(SystemExit):
        run(folder, "wide", "loss.matryoshka_dimensions=[64, 32]", patch=monkeypatch)
    assert "loss.matryoshka_dimensions has 64; write numbers from 1 to" in capsys.readouterr().err
