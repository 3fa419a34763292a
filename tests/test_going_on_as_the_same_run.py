"""A run that goes on is the run that stopped: a change is refused by name, or taken where it is named."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from programs import status
from safetensors.torch import load_file

from hbt_fast.base.command_line import setting_names
from hbt_fast.config import Config, TrainConfig
from hbt_fast.data.shares import BatchConfig
from hbt_fast.encoder import Encoder
from hbt_fast.encoder.export import export
from hbt_fast.engine.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint
from hbt_fast.engine.identity import may_change, run_identity
from hbt_fast.engine.metrics import read_records
from hbt_fast.train import main

SMALL = [
    "data.sources=[{format: cldr, name: cldr, limit: 200}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=16", "model.scratch={vocabulary: 400, hidden: 32, layers: 1, heads: 2}", "model.dropout=0.1",
    "train.learning_rate=0.001", "train.steps=4", "train.checkpoint_every=2", "train.log_every=1",
    "train.engine=torch", "train.micro_batch_tokens=256", "train.run_dir=run",
]  # fmt: skip
CONSTANT = [*SMALL, "train.schedule=constant_with_warmup", "train.run_dir=constant"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of two runs of four steps."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(SMALL)
        main(CONSTANT)
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A copy of it, which the test is in."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("train.learning_rate=0.002", "train.learning_rate was 0.001, is 0.002"),
        ("train.weight_decay=0.1", "train.weight_decay was 0.01, is 0.1"),
        ("train.warmup=0.5", "train.warmup was 0.1, is 0.5"),
        ("train.schedule=cosine", "train.schedule was 'linear', is 'cosine'"),
        ("train.clip=0", "train.clip was 1.0, is 0.0"),
        ("train.seed=1", "train.seed was 0, is 1"),
        ("train.steps=6", "train.steps was 4, is 6"),
        ("loss.temperature=0.1", "loss.temperature was 0.05, is 0.1"),
        ("loss.symmetric=true", "loss.symmetric was False, is True"),
        ("model.pooling=cls", "model.pooling was None, is 'cls'"),
        ("model.dropout=0.2", "model.dropout was 0.1, is 0.2"),
        ("model.query_prompt=Q", "model.query_prompt was 'Query: ', is 'Q'"),
        ("model.scratch.heads=4", "architecture: num_attention_heads was 2, is 4"),
        ("batch.size=8", "batch.size was 16, is 8"),
    ],
)
def test_a_changed_run_is_refused_by_name(here, capsys, changed, named):
    before = sorted(str(path) for path in (here / "run").rglob("*"))
    assert status(main, [*SMALL, "train.resume=true", changed]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "train.resume_changed=[" in said
    assert sorted(str(path) for path in (here / "run").rglob("*")) == before


def test_a_change_that_is_named_is_taken_and_said(here, capsys):
    changed = ["train.steps=6", "train.learning_rate=0.002", "train.resume=true"]
    assert status(main, [*SMALL, *changed, "train.resume_changed=[train.steps]"]) == 2
    assert "write train.resume_changed=[train.learning_rate, train.steps]" in capsys.readouterr().err
    assert status(main, [*SMALL, *changed, "train.resume_changed=[train.step]"]) == 2
    unknown = "train.resume_changed has train.step, in which no run can change; did you mean train.steps?"
    assert unknown in capsys.readouterr().err
    main([*SMALL, *changed, "train.resume_changed=[train.learning_rate, train.steps]"])
    said = capsys.readouterr().out
    assert "from here on another run than before: train.steps was 4, is 6" in said
    assert "from here on another run than before: train.learning_rate was 0.001, is 0.002" in said
    assert [r["step"] for r in read_records(here / "run" / "metrics.jsonl") if "loss" in r] == list(range(6))
    main([*SMALL, *changed])  # it is what the run is now


def test_more_steps_need_no_word_where_the_schedule_has_no_end(here, capsys):
    longer = [*CONSTANT, "train.steps=6", "train.resume=true"]
    main(longer)
    assert "4 of 6 steps are done" in capsys.readouterr().out
    main([*CONSTANT, "train.steps=6", "train.run_dir=at-once"])
    one, other = (load_file(here / run / "model" / "model.safetensors") for run in ("constant", "at-once"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert status(main, [*longer, "train.steps=3"]) == 2
    assert "is of step 6, and train.steps is 3; write as many or more" in capsys.readouterr().err
    assert status(main, [*longer, "train.steps=8", "train.warmup=0.9", "train.resume_changed=[train.warmup]"]) == 2
    assert "train.steps was 6, is 8" in capsys.readouterr().err  # some of its steps would still be a warm-up


def test_what_is_not_the_run_may_change(here):
    others = ["train.log_every=2", "train.keep_gib=0", "loss.backend=torch", "train.keep_checkpoints=1"]
    main([*SMALL, "train.resume=true", *others])


def test_no_flipped_bit_of_the_state_is_taken(tmp_path):
    tensors = {"weight": torch.arange(4.0)}
    identity = {"train.learning_rate": 0.001, "sources": ["a"], "batch.code_switch": {"lexicons": ["x.tsv"]}}
    progress = {"skipped": 0, "validation": {"best": 0.25, "best_step": 3}}
    folder = save_checkpoint(tmp_path, 3, tensors, {}, identity, 1, progress=progress)
    path = folder / "state.json"
    whole = path.read_bytes()
    checkpoint = load_checkpoint(folder, identity)
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            loaded = load_checkpoint(folder, identity)
        except CheckpointError:
            continue
        assert json.loads(flipped) == json.loads(whole)
        assert loaded[0] == checkpoint[0]
        assert loaded[3:] == checkpoint[3:]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"[" * 100_000, b"\xff\xfe", b'{"format": 3}', b'{"format": [3]}']
)
def test_a_state_that_is_something_else_is_passed_over(tmp_path, content, capsys):
    for step in (3, 4):
        save_checkpoint(tmp_path, step, {"weight": torch.ones(2)}, {}, {}, 2)
    (tmp_path / "checkpoint-000004" / "state.json").write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "checkpoint-000003"
    assert "checkpoint-000004" in capsys.readouterr().out


def test_an_update_that_breaks_a_weight_ends_the_run_and_is_kept_nowhere(whole, tmp_path, monkeypatch, capsys):
    # test_zero_equals_plain_adamw has such an update under every engine, in processes of their own
    monkeypatch.chdir(tmp_path)
    update = torch.optim.AdamW.step

    def breaks(optimizer, *arguments):
        update(optimizer, *arguments)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].view(-1)[7] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    options = [*SMALL, "train.engine=torch", "train.run_dir=broken", f"data.store_dir={whole / 'stores'}"]
    assert status(main, options) == 2
    assert "step 0: its update made weights that are NaN, infinite or beyond 1e18" in capsys.readouterr().err
    assert not list((tmp_path / "broken").glob("*checkpoint-*"))
    assert not (tmp_path / "broken" / "model").exists()


MAY_CHANGE = {  # what changes speed, memory, places or what is said
    "model.path", "model.gradient_checkpointing", "model.compile", "loss.backend", "train.run_dir", "train.resume",
    "train.resume_changed", "train.micro_batch_tokens", "train.keep_gib", "train.engine", "train.zero_stage",
    "train.deepspeed", "train.log_every", "train.track", "train.checkpoint_every", "train.keep_checkpoints",
    "train.max_skipped_steps", "train.timeout_minutes", "train.hang_minutes",
}  # fmt: skip
PLANNER = SimpleNamespace(store=SimpleNamespace(identity={}))


def with_another(settings, name):
    first, _, rest = name.partition(".")
    return replace(settings, **{first: with_another(getattr(settings, first), rest) if rest else "another"})


def identity(encoder, config=Config(), frozen=None):  # noqa: B008
    return run_identity(config, PLANNER, None, SimpleNamespace(queries=encoder, frozen=lambda: frozen or {}))


def test_every_setting_is_the_runs_or_may_change(make_encoder):
    encoder = make_encoder()
    elsewhere = ("data.", "eval.", "model.scratch.")  # in the store, in no training, in the architecture
    names = [name for name in setting_names(Config) if not name.startswith(elsewhere)]
    same = {name for name in names if identity(encoder, with_another(Config(), name)) == identity(encoder)}
    assert same == MAY_CHANGE


def test_a_run_is_its_weights_and_shape_wherever_they_lie(make_encoder, tmp_path, monkeypatch):
    folders = [export(make_encoder(), tmp_path / name) for name in ("one", "other")]
    path = folders[1] / "config.json"
    described = json.loads(path.read_text()) | {"architectures": ["AnotherModel"], "dtype": "float16"}
    path.write_text(json.dumps(described))
    one, other = map(Encoder.from_pretrained, folders)
    before = identity(one)
    monkeypatch.setattr("transformers.configuration_utils.__version__", "4.0.0")
    assert identity(other) == before
    other.dense = torch.nn.Linear(32, 16)
    others = [
        identity(other),
        identity(one, frozen={"a": torch.zeros(3)}),
        identity(one, frozen={"a": torch.ones(3)}),
        identity(Encoder.from_pretrained(folders[0], pooling="cls")),
        identity(make_encoder(hidden=48)),
    ]
    assert len({json.dumps(found, sort_keys=True) for found in (identity(one), *others)}) == 6


@pytest.mark.parametrize(
    ("before", "now", "done", "free"),
    [
        ({}, {}, 10, True),
        ({}, {}, 9, False),  # of what was a warm-up
        ({"warmup": 0.2}, {}, 10, False),
        ({}, {"warmup": 0.2}, 10, False),
        ({}, {"steps": 200}, 10, False),  # of what is one now
        ({}, {"schedule": "linear"}, 50, False),
        ({"schedule": "linear"}, {}, 50, False),
        ({"schedule": "linear"}, {"schedule": "linear"}, 50, False),
    ],
)
@pytest.mark.parametrize("alpha_end", [None, 0.5])
def test_only_past_the_warm_up_of_a_constant_rate_are_more_steps_no_change(before, now, done, free, alpha_end):
    plain = {"steps": 100, "warmup": 0.1, "schedule": "constant_with_warmup"}
    config = Config(train=TrainConfig(**plain | now), batch=BatchConfig(alpha_end=alpha_end))
    names = may_change(config)({f"train.{name}": value for name, value in (plain | before).items()}, done)
    assert names == ({"train.steps"} if free and alpha_end is None else set())
