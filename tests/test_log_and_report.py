"""The log line has the right figures, trackers get what metrics.jsonl has, the report shows all of a run."""

import dataclasses
import json
import re
import shutil
import signal
import sqlite3
import struct
import sys
import time
from html.parser import HTMLParser
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from programs import status
from ranks import run_ranks

from hbt_fast import report, run_page
from hbt_fast.config import Config, TrainConfig
from hbt_fast.data.feed import rank_batch, rows_of
from hbt_fast.data.plan import BatchPlanner
from hbt_fast.data.rows import DataError
from hbt_fast.data.shares import BatchConfig
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.launch import World
from hbt_fast.engine.metrics import AFTER, BEFORE, DURING, read_records
from hbt_fast.engine.progress import clock, log_line, negatives_per_query, phase_shares, short, tokens_of_all
from hbt_fast.engine.runlog import METRICS, RunLog
from hbt_fast.engine.track import Tracker, scalars
from hbt_fast.run_page import write_page
from hbt_fast.train import main

NAME = "<script>alert(1)</script> & cldr"
STEPS = 8
SMALL = [
    f"data.sources=[{{format: cldr, name: '{NAME}', limit: 300}}]", "data.languages=[en, de]", "data.store_dir=stores",
    "batch.size=24", "model.scratch={vocabulary: 400, hidden: 32, layers: 1, heads: 2}", "model.dropout=0.0",
    f"train.steps={STEPS}",
    "train.checkpoint_every=2", "train.log_every=4", "train.micro_batch_tokens=256", "train.run_dir=run",
]  # fmt: skip
EVALUATED = ["eval.task=cldr", "eval.every=4"]
LINE = re.compile(
    r"step +(?P<done>\d+)/8 \| loss (?P<loss>[\d.]+) \| acc (?P<acc>[\d.]+) \| neg (?P<negatives>[\d,]+) \| "
    r"lr (?P<lr>\S+) \| (?P<pairs>[\d.,kM]+) pairs/s \| (?P<tokens>[\d.,kM]+) tok/s \| (?P<shares>data [^|]+)% \| "
    r"(?P<memory>[\d.]+) GiB \| eta (?P<eta>[\d:]+)"
)


class Fake(ModuleType):
    """A tracker's package that writes down what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # accelerate looks for it
        self.began, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.began.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run that was tracked; what it printed; what its tracker was told."""
    folder, fake, said = tmp_path_factory.mktemp("log"), Fake("trackio"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "trackio", fake)
        patch.setattr(RunLog, "say", lambda log, line: said.append(line))
        torch.set_num_threads(1)
        main([*SMALL, *EVALUATED, "train.track=trackio"])
    return SimpleNamespace(run=folder / "run", stores=folder / "stores", said=said, fake=fake)


def records(run: Path, kind: str) -> list[dict]:
    return [r for r in read_records(run / "metrics.jsonl") if kind in r]


def number(written: str) -> float:
    return float(written.replace(",", "").replace("k", "e3").replace("M", "e6"))


def test_the_log_line_has_the_means_of_the_steps_since_the_last_one(finished):
    found = [match for line in finished.said if (match := LINE.fullmatch(line))]
    assert [int(m["done"]) for m in found] == [4, 8]
    steps = records(finished.run, "loss")
    for match, part in zip(found, (steps[:4], steps[4:]), strict=True):
        seconds = sum(r["seconds"] for r in part)
        assert match["loss"] == f"{np.mean([r['loss'] for r in part]):.4f}"
        assert match["acc"] == f"{np.mean([r['accuracy'] for r in part]):.3f}"
        assert match["negatives"] == "23"
        assert number(match["pairs"]) == pytest.approx(4 * 24 / seconds, rel=0.05)
        assert number(match["tokens"]) == pytest.approx(sum(r["tokens"] for r in part) / seconds, rel=0.01)
        assert match["memory"] == f"{part[-1]['memory_gib']:.1f}"
        assert match["lr"] == f"{part[-1]['learning_rate']:.1e}"
        assert 95 < sum(map(int, re.findall(r"\d+", match["shares"]))) <= 100
        assert match["shares"].split()[::2][:5] == ["data", "embed", "loss", "re-embed", "opt"]
        assert len(match[0]) <= 170  # every phase of a busy machine included
    assert found[1]["eta"] == "0:00"
    assert 0.05 < steps[0]["memory_gib"] <= steps[-1]["memory_gib"] < 64


def record(**more) -> dict:
    phases = {"embed": 0.4, "loss": 0.1, "re-embed": 1.2, "optimizer": 0.2}
    known = {"loss": 2.0, "accuracy": 0.25, "negatives": 31, "learning_rate": 3e-5, "tokens": 1000, "seconds": 2.0}
    return {**known, "waited": 0.04, "phases": phases, "memory_gib": 1.5, **more}


def test_a_line_by_hand():
    second = record(loss=1.0, accuracy=0.75, negatives=33, tokens=3000, memory_gib=2.25, learning_rate=2e-5)
    line = log_line([record(), second], pairs=32, done=7, total=1000, left=3725.9)
    assert line == (
        "step    7/1000 | loss 1.5000 | acc 0.500 | neg 32 | lr 2.0e-05 | 16 pairs/s | 1,000 tok/s | "
        "data 2 embed 20 loss 5 re-embed 60 opt 10% | 2.2 GiB | eta 1:02:05"
    )
    line = log_line([record(seconds=2.5)], pairs=32, done=7, total=1000, left=5)  # memory ran out on the way, say
    assert "data 2 embed 16 loss 4 re-embed 48 opt 8 other 22%" in line


def test_the_longest_line_of_a_large_run_is_readable():
    large = record(loss=10.1234, accuracy=1.0, negatives=262_143, tokens=4_000_000, memory_gib=139.25)
    assert len(log_line([large], pairs=65_536, done=99_999, total=100_000, left=359_999)) <= 175


def test_rates_and_times_are_short():
    assert [short(x) for x in (0.04, 9.96, 12.6, 9_999, 12_345, 99_960, 999_499, 999_501, 1_234_567)] == [
        "0.0", "10", "13", "9,999", "12.3k", "100k", "999k", "1.00M", "1.23M",
    ]  # fmt: skip
    assert [clock(x) for x in (0, 65, 3599.9, 3600, 90_061)] == ["0:00", "1:05", "59:59", "1:00:00", "25:01:01"]


def test_the_phases_add_up_to_the_steps_time(finished):
    for r in records(finished.run, "loss"):
        timed = r["waited"] + sum(r["phases"].values())
        assert timed <= r["seconds"] + 0.001
        assert timed >= 0.8 * r["seconds"] - 0.005  # what is left is the objective's and the loop's
        assert list(r["phases"]) == ["embed", "loss", "re-embed", "optimizer"]
    shares = phase_shares([record(), record()])
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["data"] == pytest.approx(0.02)
    assert shares["other"] == pytest.approx(0.03)
    assert shares["re-embed"] == pytest.approx(0.6)
    ahead = phase_shares([record(seconds=1.0)])  # a GPU's clock
    assert sum(ahead.values()) == pytest.approx(1)
    assert min(ahead.values()) >= 0


def planner_of(store, size: int) -> BatchPlanner:
    return BatchPlanner(store, BatchConfig(size=size, strategy="mono", hard_negatives=1), seed=3, steps=20)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_tokens_and_negatives_are_those_of_the_global_batch(store, world):
    planner = planner_of(store, 12)
    seen = set()
    for step in range(12):
        plan = planner.plan(step)
        source = store.sources[plan.source]
        seen.add(source.name)
        batches = [rank_batch(plan, source, rows_of(plan, source, rank, world), 100) for rank in range(world)]
        read = sum(len(micro.tokens) for batch in batches for micro in batch.micro_batches)
        assert sum(batch.tokens for batch in batches) == read
        for batch in batches:
            if all(b.inverse is None for b in batches) or world == 1:
                assert tokens_of_all(batch, source) == read
            else:
                assert tokens_of_all(batch, source) == pytest.approx(read, rel=0.1)
        others = {*plan.contents.tolist(), *plan.negative_contents.tolist()} - {int(plan.contents[0])}
        assert negatives_per_query(plan) == len(others)
    assert seen == {"parallel", "plain"}
    assert max(len(planner.plan(step).negatives) for step in range(12)) > 0


def train_on_ranks(rank: int, ranks: int, stores: Path, folder: Path) -> None:
    import os

    os.chdir(folder)
    main([*SMALL, "train.engine=torch", f"data.store_dir={stores}"])


def test_two_ranks_log_the_tokens_and_negatives_that_one_does(finished, tmp_path):
    run_ranks(train_on_ranks, 2, finished.stores, tmp_path)
    one, two = (records(run, "loss") for run in (finished.run, tmp_path / "run"))
    assert [r["negatives"] for r in two] == [r["negatives"] for r in one] == [23] * STEPS
    for a, b in zip(one, two, strict=True):
        assert b["tokens"] == pytest.approx(a["tokens"], rel=0.1)  # a text that two ranks have is read twice
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    machine = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert machine["ranks"].startswith("2 x ")


def test_tensorboard_has_shares_throughput_and_memory(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.run / "tensorboard")).Reload()
    steps = records(finished.run, "loss")
    for name in ("data", "embed", "loss", "re-embed", "optimizer", "other"):
        assert [e.step for e in events.Scalars(f"share of time/{name}")] == [3, 7]
    pairs = events.Scalars("throughput/pairs_per_second")
    assert pairs[-1].value == pytest.approx(4 * 24 / sum(r["seconds"] for r in steps[4:]), rel=1e-3)
    assert events.Scalars("memory_gib")[-1].value == pytest.approx(steps[-1]["memory_gib"], rel=1e-3)


def test_a_tracker_gets_the_settings_and_what_metrics_jsonl_has(finished):
    (began,) = finished.fake.began
    assert began["project"] == "hbt_fast"
    assert began["resume"] == "allow"
    assert began["config"]["batch"]["size"] == 24
    assert began["config"]["train"]["track"] == "trackio"
    assert began["name"] == json.loads((finished.run / "tracker.json").read_text())["id"]
    assert re.fullmatch(r"run-[0-9a-f]{8}", began["name"])
    assert finished.fake.finished == 1
    training = [(step, values) for step, values in finished.fake.logged if "loss" in values]
    for (step, values), r in zip(training, records(finished.run, "loss"), strict=True):
        assert step == r["step"]
        for name in ("loss", "accuracy", "gradient_norm", "learning_rate", "tokens", "negatives", "memory_gib"):
            assert values[name] == r[name]
        assert values["phases/re-embed"] == r["phases"]["re-embed"]
        assert values[f"loss/{r['kind']}"] == r["loss"]
    made = [(step, values) for step, values in finished.fake.logged if "loss" not in values]
    for (step, values), r, at in zip(made, records(finished.run, "evaluation"), (0, 4, 8, 8), strict=True):
        group = "exported" if r["evaluation"] == AFTER else "evaluation"
        assert (step, values) == (at, {f"{group}/{name}": r[name] for name in METRICS})


def test_a_resumed_run_goes_on_in_the_same_tracker_without_duplicates(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *EVALUATED, "train.track=wandb", f"data.store_dir={finished.stores}", "train.checkpoint_every=4"]
    fakes = [Fake("wandb") for _ in range(3)]
    step = RunLog.step

    def stopped(self, batch, *arguments, **more):
        step(self, batch, *arguments, **more)
        if batch.plan.step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "wandb", fakes[0])
    monkeypatch.setattr(RunLog, "step", stopped)
    with pytest.raises(SystemExit):
        main(options)
    shutil.rmtree(tmp_path / "run" / "checkpoint-000006")  # steps 4 and 5 were logged, and come again
    monkeypatch.setattr(RunLog, "step", step)
    for fake in fakes[1:]:  # and once more when all is done
        monkeypatch.setitem(sys.modules, "wandb", fake)
        main([*options, "train.resume=true"])
    assert len({fake.began[0]["id"] for fake in fakes}) == 1
    assert fakes[0].began[0]["dir"] == "run"
    training = [[at for at, values in fake.logged if "loss" in values] for fake in fakes]
    assert training == [[0, 1, 2, 3, 4, 5], [6, 7], []]
    made = [[(at, sorted(v)[0]) for at, v in fake.logged if "loss" not in v] for fake in fakes]
    assert made == [[(0, "evaluation/cr"), (4, "evaluation/cr")], [(8, "evaluation/cr"), (8, "exported/cr")], []]
    for kind, wanted in (("loss", list(range(STEPS))), ("drawn_until", [4, 8])):
        key = "step" if kind == "loss" else kind
        assert [r[key] for r in records(tmp_path / "run", kind)] == wanted
    when = [(r["evaluation"], r.get("step")) for r in records(tmp_path / "run", "evaluation")]
    exported = max(records(tmp_path / "run", "evaluation")[1:3], key=lambda r: r["mul"])["step"]
    assert when == [("before training", None), ("during training", 4), ("during training", 8), (AFTER, exported)]


def test_only_rank_0_has_a_tracker(tmp_path, monkeypatch):
    fake = Fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config(train=TrainConfig(track="wandb"))
    for rank in (1, 0):
        with RunLog(tmp_path / "run", config, World(rank, 2, torch.device("cpu"))) as log:
            log.open()
        assert (log.tracker is None) == (rank == 1)
    assert len(fake.began) == 1


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_a_tracker_that_is_not_installed_or_does_not_start_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(SettingError, match=rf"train\.track is {kind}.*pip install {kind}.*train\.track=none"):
        Tracker(kind, tmp_path, Config())

    class Broken(Fake):
        def init(self, **options):
            raise RuntimeError("no account")

    monkeypatch.setitem(sys.modules, kind, Broken(kind))
    with pytest.raises(SettingError, match=rf"train\.track is {kind}, which does not start \(no account\)"):
        Tracker(kind, tmp_path, Config())


def test_trackio_itself_keeps_what_it_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    for first, last in ((0, 3), (3, 5)):
        tracker = Tracker("trackio", tmp_path, Config())
        for step in range(first, last):
            tracker.log("training", scalars(record(loss=step / 2)), step)
        tracker.finish()
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, _, _ in rows} == {tracker.kept["id"]}
    assert [step for _, step, _ in rows] == [0, 1, 2, 3, 4]
    assert [json.loads(values)["loss"] for _, _, values in rows] == [0.0, 0.5, 1.0, 1.5, 2.0]


def history(path: Path) -> list[dict]:
    """The values that an offline run of wandb logged, by step: a LevelDB log of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    raw, at, found = path.read_bytes(), 7, []
    while at + 7 <= len(raw):
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        made = wandb_internal_pb2.Record()
        if kind == 1:  # whole; the settings may be in several parts
            made.ParseFromString(raw[at + 7 : at + 7 + length])
        if made.WhichOneof("record_type") == "history":
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in made.history.item})
        at += 7 + length
    return found


def test_wandb_itself_keeps_what_it_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("wandb")
    for first, last in ((0, 3), (3, 5)):
        tracker = Tracker("wandb", tmp_path, Config())
        for step in range(first, last):
            tracker.log("training", scalars(record(loss=step / 2)), step)
        tracker.finish()
        time.sleep(1.1)  # its folders are named after the second
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{tracker.kept['id']}.wandb"))
    found = [values for part in parts for values in history(part)]
    assert [(values["_step"], values["loss"]) for values in found] == [(step, step / 2) for step in range(5)]
    assert {values["phases/embed"] for values in found} == {0.4}


class Page(HTMLParser):
    """What a page is made of; tags must be closed in order."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.sections, self.words, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "section":
            self.sections.append(dict(attributes)["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)  # of SVG, closed where it is opened
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


ALL = ["headline", "loss", "accuracy", "during", "maps", "drawn", "phases", "throughput", "memory", "data",
       "settings", "machine"]  # fmt: skip


def test_the_report_of_a_run_has_every_section_and_needs_nothing_else(finished):
    page = page_of(finished.run)
    assert page.sections == ALL
    results = [json.loads((finished.run / n).read_text()) for n in ("evaluation-before.json", "evaluation.json")]
    for found in results:
        assert f"{found['mul']:.4f}" in page.text
        assert f"{found['rank_distance']:,.1f}" in page.text
    assert f"{results[1]['mul'] - results[0]['mul']:+.4f}" in page.text
    for words in (
        "finished: 8 of 8 steps",
        "InfoNCE loss",
        "re-embed",
        "GiB",
        "192 pairs of 8 steps",
        torch.__version__,
    ):
        assert words in page.text
    assert page.tags.count("svg") == 7
    assert [name for name, _ in page.attributes if name in ("src", "href", "action") or name.startswith("on")] == []
    text = (finished.run / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"https?:|url\(|@import", text) == []
    best = max((r for r in records(finished.run, "evaluation") if r["evaluation"] == DURING), key=lambda r: r["mul"])
    assert f"best Mul: step {best['step']}" in page.text
    assert f"{best['step']} (best)" in page.text


def test_a_line_that_was_cut_within_a_character_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 0}\n{"source": "中'.encode()[:-1])
    assert list(read_records(tmp_path / "metrics.jsonl")) == [{"step": 0}]


def test_an_evaluation_of_another_task_is_no_part_of_the_curve(finished, tmp_path):
    shutil.copytree(finished.run, tmp_path / "run")
    made = list(read_records(finished.run / "metrics.jsonl"))
    before = next(r for r in made if r.get("evaluation") == BEFORE)
    assert f"{before['mul']:.4f}" in page_of(finished.run).text.partition("Evaluations during training")[2]
    before["task"] = "all questions"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
    write_page(tmp_path / "run")
    assert f"{before['mul']:.4f}" not in page_of(tmp_path / "run").text.partition("Evaluations during training")[2]


def test_names_from_outside_are_escaped(finished):
    text = (finished.run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert page_of(finished.run).text.count(NAME) >= 3  # in the title, among the batches, in the settings
    assert "script" not in page_of(finished.run).tags


def test_a_report_is_made_of_a_stopped_run(finished, tmp_path, capsys):
    run = tmp_path / "stopped"
    run.mkdir()
    for name in ("config.yaml", "evaluation-before.json", "environment.json", "evaluation.json"):
        shutil.copy(finished.run / name, run)
    kept = [r for r in read_records(finished.run / "metrics.jsonl") if r.get("step", 0) < 5]
    kept = [r for r in kept if r.get("evaluation") != AFTER and r.get("drawn_until", 0) <= 4]
    kept += [{"step": 5, "kind": "mono", "source": NAME, "skipped": "the gradient's norm is <nan>"}]
    lines = "".join(json.dumps(r) + "\n" for r in kept)
    (run / "metrics.jsonl").write_text(lines + '{"step": 6, "ki', encoding="utf-8")
    report.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = page_of(run)
    assert "not finished: 6 of 8 steps are done" in page.text
    assert "There is no evaluation after training" in page.text
    assert page.sections == [*ALL[:9], "troubles", *ALL[9:]]
    assert "the gradient's norm is <nan>" in page.text
    after = json.loads((run / "evaluation.json").read_text())  # of an earlier end: the run has gone on since
    assert f"{after['mo']:.4f}" not in page.text.partition("Loss")[0]


def test_a_report_is_made_of_a_run_without_evaluation_or_steps(finished, tmp_path):
    shutil.copy(finished.run / "config.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"ended_early": "nothing <b>got</b> better", "after": 0}\n')
    write_page(tmp_path)
    page = page_of(tmp_path)
    assert page.sections == ["headline", "troubles", "settings"]
    assert "ended early: 0 of 8 steps" in page.text
    assert "nothing <b>got</b> better" in page.text
    one = records(finished.run, "loss")[0]
    one["accuracy"] = float("nan")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(one) + "\n")
    write_page(tmp_path)
    assert "not finished: 1 of 8 steps" in page_of(tmp_path).text


def test_a_folder_that_is_no_run_folder_is_refused(finished, tmp_path, capsys):
    assert status(report.main, [str(tmp_path)]) == 2
    assert "is no run folder: config.yaml and metrics.jsonl are not both there" in capsys.readouterr().err
    shutil.copy(finished.run / "config.yaml", tmp_path)
    shutil.copy(finished.run / "metrics.jsonl", tmp_path)
    (tmp_path / "evaluation-before.json").write_text('{"task": ')
    with pytest.raises(DataError, match="damaged file of the run folder"):
        write_page(tmp_path)


def test_a_chart_of_many_steps_stays_small(tmp_path, finished):
    shutil.copy(finished.run / "config.yaml", tmp_path)
    one = records(finished.run, "loss")[0]
    many = [{**one, "step": step, "loss": 1 + step % 7} for step in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in many))
    assert write_page(tmp_path).stat().st_size < 60_000
    line = run_page.line_chart([run_page.Line("x", range(20_000), [1 + step % 7 for step in range(20_000)])], "y")
    assert len(line) < 5_000


def test_settings_of_a_tracker_are_checked(capsys):
    assert dataclasses.asdict(TrainConfig())["track"] == "none"
    assert status(main, ["train.track=mlflow"]) == 2
    assert "train.track" in capsys.readouterr().err
