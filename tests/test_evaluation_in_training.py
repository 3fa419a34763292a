"""Evaluation during training: by all ranks as by one, without a trace in training; the best model stays; resuming."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from hbt_fast.config import Config, EvalConfig
from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.engine import encode, validation
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.evaluator import Evaluator, load_task
from hbt_fast.engine.launch import World, make_engine, start
from hbt_fast.engine.metrics import DURING, read_records
from hbt_fast.engine.runlog import RunLog
from hbt_fast.engine.validation import Validation, check_evaluation
from hbt_fast.evaluation.metrics import Results
from hbt_fast.evaluation.queries import PerQuery
from hbt_fast.evaluation.run import EvaluationError, evaluate
from hbt_fast.prepare import resolve
from hbt_fast.train import build, main

STEPS = 12
SMALL = [
    "data.sources=[{format: cldr, name: cldr, limit: 300}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=24", "model.scratch={vocabulary: 400, hidden: 32, layers: 2, heads: 2}", "model.dropout=0.1",
    f"train.steps={STEPS}", "train.checkpoint_every=2", "train.keep_checkpoints=1", "train.learning_rate=0.003",
    "train.micro_batch_tokens=256", "train.engine=torch", "eval.task=cldr", "eval.before=false",
]  # fmt: skip
PATIENT = ["eval.every=2", "eval.patience=3"]
FIRST_IS_BEST = ("mul",)  # training raises it: were lower better, the first evaluation would be the best


def records(run: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if kind in r]


def during(run: Path) -> list[dict]:
    """The evaluations during training, but for their time."""
    made = [r for r in records(run, "evaluation") if r["evaluation"] == DURING]
    return [{name: value for name, value in r.items() if name != "seconds"} for r in made]


def assert_equal_tensors(a: Path, b: Path) -> None:
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the stores, a run that is evaluated at its end, and two that are during training too.

    In the second of these the first evaluation is the best, and three more end the run.
    """
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)  # as every test: bits depend on it
        main([*SMALL, "train.run_dir=plain"])
        main([*SMALL, "train.run_dir=watched", "eval.every=5"])
        patch.setattr(validation, "LOWER_IS_BETTER", FIRST_IS_BEST)
        main([*SMALL, *PATIENT, "train.run_dir=patient", "train.keep_checkpoints=9"])
    return folder


def test_training_is_the_same_to_the_bit(folder):
    for part in ("model", "optimizer"):
        name = f"checkpoint-{STEPS:06d}/{part}.safetensors"
        assert_equal_tensors(folder / "plain" / name, folder / "watched" / name)
    losses = [[r["loss"] for r in records(folder / run, "loss")] for run in ("plain", "watched")]
    assert losses[0] == losses[1]
    assert [r["step"] for r in during(folder / "watched")] == [5, 10, STEPS]
    assert during(folder / "plain") == []


def test_patience_ends_the_run_and_the_best_model_is_exported(folder):
    run = folder / "patient"
    made = during(run)
    assert [r["step"] for r in made] == [2, 4, 6, 8]
    assert min(made, key=lambda r: r["mul"])["step"] == 2
    assert len(records(run, "loss")) == 8
    (ended,) = records(run, "ended_early")
    assert ended["after"] == 8
    assert "3 evaluations brought nothing better than mul" in ended["ended_early"]
    after = json.loads((run / "evaluation.json").read_text())
    assert [after[name] for name in ("mo", "cr", "mul", "rank_distance")] == [
        made[0][name] for name in ("mo", "cr", "mul", "rank_distance")
    ]
    config = Config(eval=EvalConfig(task="cldr", languages=["en", "de"]))
    found = evaluate(Encoder.from_pretrained(run / "model"), load_task(config), log=None)
    assert found.mul == made[0]["mul"]
    assert found.mul != made[-1]["mul"]


def test_the_checkpoint_of_the_best_evaluation_stays(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "LOWER_IS_BETTER", FIRST_IS_BEST)
    main([*SMALL, "eval.every=4", "train.run_dir=run", f"data.store_dir={folder / 'stores'}"])
    assert sorted(p.name for p in Path("run").glob("checkpoint-*")) == ["checkpoint-000004", "checkpoint-000012"]
    assert_equal_tensors(
        Path("run/checkpoint-000004/model.safetensors"), folder / "patient/checkpoint-000004" / "model.safetensors"
    )
    assert during(Path("run"))[0] == during(folder / "patient")[1]
    found = evaluate(
        Encoder.from_pretrained("run/model"),
        load_task(Config(eval=EvalConfig("cldr", languages=["en", "de"]))),
        log=None,
    )
    assert found.mul == during(Path("run"))[0]["mul"]


@pytest.mark.parametrize("gone", [[6, 8], [8], []])
def test_a_resumed_run_stops_at_the_same_step_and_exports_the_same(folder, tmp_path, monkeypatch, gone):
    shutil.copytree(folder / "patient", tmp_path / "run")
    for step in gone:
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step:06d}")
    shutil.rmtree(tmp_path / "run" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "LOWER_IS_BETTER", FIRST_IS_BEST)
    again = [*SMALL, *PATIENT, "train.run_dir=run", f"data.store_dir={folder / 'stores'}", "train.resume=true"]
    main(again)
    assert_equal_tensors(tmp_path / "run/model/model.safetensors", folder / "patient/model/model.safetensors")
    assert during(tmp_path / "run") == during(folder / "patient")
    assert records(tmp_path / "run", "ended_early") == records(folder / "patient", "ended_early")
    if not gone:
        with pytest.raises(SystemExit):
            main([*again, "eval.metric=cr"])


def test_an_evaluation_that_a_signal_prevented_is_made_when_the_run_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validation, "LOWER_IS_BETTER", FIRST_IS_BEST)
    command = [*SMALL, *PATIENT, "train.run_dir=run", f"data.store_dir={folder / 'stores'}"]
    step = RunLog.step

    def stopped(self, batch, *arguments, **options):
        step(self, batch, *arguments, **options)
        if batch.plan.step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "step", stopped)
    with pytest.raises(SystemExit) as ended:
        main(command)
    monkeypatch.setattr(RunLog, "step", step)
    assert ended.value.code == 143
    assert during(tmp_path / "run") == []
    main([*command, "train.resume=true"])
    assert during(tmp_path / "run") == during(folder / "patient")
    assert_equal_tensors(tmp_path / "run/model/model.safetensors", folder / "patient/model/model.safetensors")


def results(mul: float = 0.5, distance: float = 10.0) -> Results:
    return Results("made", "", ["de", "en"], 2, 2, 0.5, 0.5, mul, distance, [], [], [])


class Log:
    def say(self, line: str) -> None:
        self.said = line


def decide(settings: EvalConfig, values: list[Results], found: dict | None = None, first: int = 1):
    """(which evaluations were the best so far, the validation after them)."""
    made = Validation(settings, 100, lambda done: values[done - first], Log(), found)
    return [made(first + n) for n in range(len(values))], made


def test_what_is_better_and_when_it_is_over():
    up, settings = [0.2, 0.5, 0.5, 0.4], EvalConfig("cldr", every=1, patience=2)
    better, made = decide(settings, [results(mul) for mul in up])
    assert (better, made.best_step, made.best, made.since, made.over) == ([True, True, False, False], 2, 0.5, 2, True)
    assert not decide(settings, [results(mul) for mul in up[:3]])[1].over
    assert not decide(dataclasses.replace(settings, patience=None), [results(mul) for mul in up])[1].over
    settings = dataclasses.replace(settings, metric="rank_distance")
    better, made = decide(settings, [results(distance=d) for d in (9.0, 7.0, 8.0)])
    assert (better, made.best_step, made.best) == ([True, True, False], 2, 7.0)
    kept = json.loads(json.dumps(made.state()))
    better, made = decide(settings, [results(distance=7.5)], kept, 4)
    assert (better, made.best_step, made.since, made.over) == ([False], 2, 2, True)
    with pytest.raises(SettingError, match=r"chosen on made: 2 queries.*now there are made: 3"):
        decide(settings, [dataclasses.replace(results(), queries=3)], kept, 4)
    with pytest.raises(SettingError, match=r"eval\.metric is rank_distance, which made"):
        decide(settings, [results(distance=float("nan"))])


def test_it_is_due_every_so_often_and_at_the_end_and_never_twice():
    made = Validation(EvalConfig("cldr", every=4), 10, lambda done: results(), Log())
    assert [done for done in range(11) if made.due(done)] == [4, 8, 10]
    made(8)
    assert not made.due(8)
    assert not any(Validation(EvalConfig("cldr"), 10, None, Log()).due(done) for done in range(11))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 5}, "eval.task is none; write a task, or eval.every=0"),
        ({"every": -1}, "eval.every is -1"),
        ({"patience": 2, "task": "cldr"}, "eval.patience is 2, but eval.every is 0"),
        ({"every": 5, "patience": 0, "task": "cldr"}, "eval.patience is 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        check_evaluation(EvalConfig(**settings))


def two_towers(tokenizer, **model) -> tuple[Config, torch.nn.Module]:
    """Settings, and towers of different weights."""
    config = Config(eval=EvalConfig("cldr", languages=["de", "en"]))
    shape = dataclasses.replace(config.model.scratch, vocabulary=300, hidden=32, layers=2, heads=2)
    model = dataclasses.replace(config.model, scratch=shape, separate_towers=True, dropout=0.1, **model)
    config, _ = resolve(dataclasses.replace(config, model=model))
    towers = build(config, tokenizer)
    with torch.no_grad():
        for p in towers.passages.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return config, towers.train()


def measured(config: Config, world: World, towers, trained, folder: Path) -> Results:
    """What an evaluation of all ranks finds, in more rounds than fit between two gathers."""
    encode.TOKENS, encode.ROUNDS = 700, 3
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(folder / "run")))
    with RunLog(folder / f"run-{world.size}-{world.rank}", config, world) as log:
        log.open()
        log.writer = Writer()
        before = torch.get_rng_state()
        made = Evaluator(config, world, log)(trained, DURING, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in towers.modules())
    return made


class Writer:
    def add_scalar(self, *arguments) -> None:
        pass


def evaluate_on_ranks(rank: int, ranks: int, tokenizer, folder: Path) -> None:
    for stage in (None, 3):
        config, towers = two_towers(tokenizer)
        engine = "torch" if stage is None else "deepspeed"
        settings = dataclasses.replace(config.train, engine=engine, zero_stage=stage or 0)
        config = dataclasses.replace(config, train=settings)
        world = start(config.train)
        made = measured(config, world, towers, make_engine(towers, config.train, world), folder)
        (folder / f"{stage}-{rank}.json").write_text(made.to_json())
    config, towers = two_towers(tokenizer)
    with torch.no_grad():
        towers.passages.model.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="candidate vectors hold NaN" if rank == 0 else "rank 0 could not"):
        measured(config, world, towers, towers, folder)


@pytest.fixture(scope="module")
def ranked(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(evaluate_on_ranks, 2, tokenizer, folder)
    return folder


@pytest.mark.parametrize("stage", [None, 3])
def test_two_ranks_find_what_one_does_under_zero_3_too(ranked, tokenizer, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(encode, "TOKENS", encode.TOKENS)
    monkeypatch.setattr(encode, "ROUNDS", encode.ROUNDS)
    config, towers = two_towers(tokenizer)
    world = World(0, 1, torch.device("cpu"))
    found = [measured(config, world, towers, towers, tmp_path)]
    found += [Results.from_json((ranked / f"{stage}-{rank}.json").read_text()) for rank in range(2)]
    found = [json.loads(dataclasses.replace(f, seconds={}).to_json()) for f in found]
    assert found[0] == found[1] == found[2]
    apart = evaluate(towers.queries, load_task(config), passage_encoder=towers.passages, log=None)
    assert apart.mul == pytest.approx(found[0]["mul"], rel=1e-3)  # other micro-batches, other rounding
    swapped = evaluate(towers.passages, load_task(config), passage_encoder=towers.queries, log=None)
    assert swapped.mul != pytest.approx(found[0]["mul"], rel=1e-3)


def train_on_ranks(rank: int, ranks: int, store: Path, folder: Path) -> None:
    import os

    os.chdir(folder)
    for name, more in (("watched", ["eval.every=2"]), ("plain", [])):
        options = ["train.engine=deepspeed", "train.zero_stage=3", "train.steps=4", f"data.store_dir={store}"]
        main([*SMALL, *options, f"train.run_dir={name}", *more])


def test_zero_3_on_two_ranks_trains_on_as_if_there_had_been_no_evaluation(folder, tmp_path):
    run_ranks(train_on_ranks, 2, folder / "stores", tmp_path)
    for part in ("model", "optimizer"):
        name = f"checkpoint-000004/{part}.safetensors"
        assert_equal_tensors(tmp_path / "plain" / name, tmp_path / "watched" / name)
    best = max(during(tmp_path / "watched"), key=lambda r: r["mul"])
    assert json.loads((tmp_path / "watched" / "evaluation.json").read_text())["mul"] == best["mul"]


def test_evaluations_during_training_may_draw_questions_and_those_before_and_after_have_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = ["eval.every=6", "eval.queries=9", "eval.candidates=30"]
    main([*SMALL, *drawn, "eval.before=true", "train.run_dir=run"])
    whole = load_task(Config(eval=EvalConfig("cldr", languages=["en", "de"])))
    state = json.loads(Path(f"run/checkpoint-{STEPS:06d}/state.json").read_text())
    assert f"9 of {len(set(whole.query_ids)):,} questions: 18 queries, 30 candidates" in json.dumps(state)
    for when in ("evaluation-before", "evaluation"):
        results = Results.from_json(Path(f"run/{when}.json").read_text())
        assert (results.queries, results.candidates) == (len(whole.queries), len(whole.candidates))
        per_query = PerQuery.read(Path(f"run/{when}.queries.npz"))
        assert per_query.measures["mul"].mean() == pytest.approx(results.mul)  # as many queries in each language
    part = whole.subset(9, 0, 30)
    found = evaluate(Encoder.from_pretrained("run/model"), part, log=None)
    best = max(during(Path("run")), key=lambda r: r["mul"])
    assert [best[name] for name in ("mo", "cr", "mul", "ndcg@10")] == [
        pytest.approx(found.value(name), abs=1e-6) for name in ("mo", "cr", "mul", "ndcg@10")
    ]


def test_questions_with_judged_passages_choose_the_best_step_by_ndcg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"query": f"which {i}", "passage": f"the {i} of {i % 3}", "language": "en"} for i in range(12)]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    own = ["eval.task=jsonl", "eval.data=own.jsonl", "eval.every=6", "eval.metric=ndcg@10"]
    main([*SMALL[:-2], *own, "train.run_dir=run"])
    made = during(Path("run"))
    assert all(0 < r["ndcg@10"] <= 1 and r["cr"] is None for r in made)
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert "best nDCG@10: step" in page
    assert "rank distance" not in page
    with pytest.raises(SystemExit):
        main([*SMALL[:-2], *own[:3], "eval.metric=mul", "train.run_dir=other", "eval.languages=[fr]"])


def test_a_run_that_goes_on_with_another_task_evaluates_before_training_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, texts in (("one", "the {}"), ("two", "another {}")):
        lines = [{"query": f"which {i}", "passage": texts.format(i), "language": "en"} for i in range(9)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    run = [*SMALL[:-2], "eval.task=jsonl", "train.run_dir=run"]
    main([*run, "eval.data=one.jsonl"])
    main([*run, "eval.data=two.jsonl", "train.resume=true"])
    before, after = (Results.from_json(Path(f"run/{n}.json").read_text()) for n in ("evaluation-before", "evaluation"))
    assert before.task == after.task != "one"
    assert "before" in Path("run/evaluation.md").read_text()


def test_the_other_ranks_are_told_where_a_text_cannot_be_encoded(monkeypatch):
    told = []

    def fails(*_, **__):
        raise EncoderError("no token is left of the text ''; leave it out")

    monkeypatch.setattr("hbt_fast.engine.evaluator.measure", fails)
    monkeypatch.setattr("hbt_fast.engine.encode.SharedEncoder.end", lambda self, result: told.append(result))
    config = Config(eval=EvalConfig(task="cldr", languages=["en", "de"]))
    world = World(0, 1, torch.device("cpu"))
    silent = SimpleNamespace(say=lambda line: None)
    with pytest.raises(EncoderError):
        Evaluator(config, world, silent)(SimpleNamespace(module=SimpleNamespace(encoders=[None])), DURING)
    assert told == [None]


def test_records_may_have_any_character(tmp_path):
    rows = [{"step": i, "source": "line\u2028separator"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "cut', encoding="utf-8")
    assert list(read_records(tmp_path / "metrics.jsonl")) == rows


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 1, "queries": 0}, "eval.queries is 0; write a whole number from 1 on"),
        ({"every": 1, "candidates": 5}, "eval.candidates is set, but eval.queries is not"),
    ],
)
def test_draws_that_cannot_be_made_are_named(settings, message):
    with pytest.raises(SettingError, match=message):
        check_evaluation(EvalConfig("cldr", **settings))
