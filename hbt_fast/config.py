"""Settings: frozen dataclasses, filled from a YAML file and the command line by jsonargparse."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hbt_fast.base.command_line import new_parser, parse_with
from hbt_fast.base.ranges import NAME, PATH, TEXT, one_of, ranges, real, whole
from hbt_fast.data.languages import LANGUAGE
from hbt_fast.data.problems import LONGEST_LINE, LONGEST_TEXT
from hbt_fast.data.shares import BatchConfig
from hbt_fast.data.sources import Source
from hbt_fast.encoder.scratch import ScratchConfig
from hbt_fast.encoder.towers import LoraConfig
from hbt_fast.settings import check_config

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

YEAR = 60 * 24 * 365  # minutes


@ranges(
    path=PATH,
    query_prompt=TEXT,
    passage_prompt=TEXT,
    query_max_length=whole(1, 2**20),
    passage_max_length=whole(1, 2**20),
    max_length=whole(1, 2**20),
    dropout=real(0, 1, below=True),
)
@dataclass(frozen=True)
class ModelConfig:
    """The encoder.

    Args:
        path: checkpoint folder or hub name; null trains one from nothing (see model.scratch).
        scratch: the shape of an encoder from nothing.
        pooling: mean, cls, last or weighted_mean (by position); null takes what the checkpoint records, else mean.
        query_prompt: put before every query; null takes what the checkpoint records, else nothing ("Query: " for an
            encoder from nothing).
        passage_prompt: put before every passage; null as for queries ("Passage: ").
        query_max_length: tokens of a query, prompt and special tokens included; the rest is cut off.
        passage_max_length: the same for passages.
        max_length: tokens of a text when the finished model encodes (evaluation, export).
        dropout: replaces the checkpoint's dropout probabilities; null keeps them.
        separate_towers: train an encoder for queries and another for passages, both from the same start.
        lora: train low-rank adapters instead of the whole model.
        gradient_checkpointing: keep less of each layer and compute it again: about a third slower, far less memory.
        compile: torch.compile the encoder.
    """

    path: str | None = None
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    pooling: Literal["mean", "cls", "last", "weighted_mean"] | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    query_max_length: int = 64
    passage_max_length: int = 256
    max_length: int = 512
    dropout: float | None = None
    separate_towers: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    gradient_checkpointing: bool = False
    compile: bool = False


@ranges(languages=LANGUAGE, store_dir=PATH, longest_line=whole(1, 2**40), longest_text=whole(1))
@dataclass(frozen=True)
class DataConfig:
    """Training data.

    Args:
        sources: what to train on; see the Source settings.
        languages: keep only these languages; null keeps all.
        on_error: raise stops at the first malformed row; skip leaves malformed rows out, counts and lists them.
        store_dir: where token stores are kept and found again.
        longest_line: bytes of a line of a file (of TMX: of a translation unit); a longer one is malformed.
        longest_text: characters of a text; a longer one is malformed.
    """

    sources: list[Source] = field(default_factory=list)
    languages: list[str] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    store_dir: str = "runs/stores"
    longest_line: int = LONGEST_LINE
    longest_text: int = LONGEST_TEXT


@ranges(
    temperature=real(1e-4, 1e4),
    max_scale=real(1e-4, 1e4),
    false_negative_margin=real(-2, 2),
    matryoshka_dimensions=whole(1),
    variance_weight=real(0, 1e6),
    backend=one_of("auto", "triton", "cpu", "torch", "torch-chunked"),
)
@dataclass(frozen=True)
class LossConfig:
    """InfoNCE; see hbt_fast.info_nce.

    Args:
        temperature: similarities are divided by it.
        learn_temperature: train it too, from that value on.
        max_scale: 1/temperature is not learned to be larger.
        symmetric: add the passage-to-query half.
        duplicates: what a passage with the positive's content id is: mask leaves it out, positive counts it as one.
        false_negative_margin: leave out negatives whose cosine exceeds the positive's by more than this.
        matryoshka_dimensions: as [256, 128, 64]: the same loss of the first so many dimensions, normalised again, is
            added for each (arXiv 2205.13147), so that embeddings can be cut to these.
        variance_weight: weight of the negative-variance regulariser (arXiv 2506.09781); 0 is off.
        backend: auto, or one of the loss's backends.
    """

    temperature: float = 0.05
    learn_temperature: bool = False
    max_scale: float = 100.0
    symmetric: bool = False
    duplicates: Literal["mask", "positive"] = "mask"
    false_negative_margin: float | None = None
    matryoshka_dimensions: list[int] = field(default_factory=list)
    variance_weight: float = 0.0
    backend: str = "auto"


@ranges(
    run_dir=PATH,
    resume_changed=NAME,
    steps=whole(1),
    learning_rate=real(0, 100),
    weight_decay=real(0, 100),
    warmup=real(0, 1),
    clip=real(0, 1e9),
    seed=whole(0, 2**63 - 1),
    micro_batch_tokens=whole(1),
    keep_gib=real(0, 1e6),
    deepspeed=PATH,
    log_every=whole(1),
    checkpoint_every=whole(0),
    keep_checkpoints=whole(1),
    max_skipped_steps=whole(1),
    timeout_minutes=whole(1, YEAR),
    hang_minutes=real(0, YEAR),
)
@dataclass(frozen=True)
class TrainConfig:
    """The training run.

    Args:
        run_dir: everything the run writes goes here.
        resume: go on from the newest checkpoint in run_dir, if there is one.
        resume_changed: names of settings (or data, architecture, ...) in which the run that goes on may be another than
            it was, as [train.learning_rate]; else a change is refused.
        steps: optimizer updates.
        learning_rate: AdamW's, at the top of the schedule.
        weight_decay: AdamW's, on matrices only.
        warmup: share of the steps in which the learning rate rises.
        schedule: linear, cosine or constant_with_warmup.
        clip: largest gradient norm; 0 does not clip.
        seed: batches, dropout and random weights are functions of it.
        micro_batch_tokens: tokens, padding included, that go through the encoder at once; auto finds the fastest number
            in the first steps (another one rounds differently: write a number to repeat a run to the bit).
        keep_gib: GiB per rank for the graphs of micro-batches that are then embedded once instead of twice; auto takes
            what is free (half of it on a CPU). The first micro-batch's graph takes no more than any and is always kept.
        precision: bf16 and fp16 run the encoder under autocast (float32 weights), fp16 with a loss scale; auto is bf16
            on GPUs that have it (Ampere and later), fp32 elsewhere.
        engine: deepspeed or torch; auto is deepspeed when a launcher started this or zero_stage is above 0.
        zero_stage: DeepSpeed ZeRO stage, 0 to 3.
        deepspeed: a DeepSpeed JSON file, merged with what hbt_fast sets.
        log_every: steps between log lines.
        track: none, trackio or wandb: what metrics.jsonl has goes there too. Both keep a project hbt_fast; wandb's own
            variables (WANDB_PROJECT, WANDB_MODE, ...) hold.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: so many newest ones stay.
        max_skipped_steps: steps with a NaN or infinite gradient are skipped; so many in a row end the run.
        timeout_minutes: how long ranks wait for each other (while rank 0 tokenises, for one).
        hang_minutes: where no rank gets on with a step for so long, the rank that the others wait for is named and the
            run ends; 0 waits. Checkpoints and evaluations may take longer.
    """

    run_dir: str = "runs/hbt"
    resume: bool = False
    resume_changed: list[str] = field(default_factory=list)
    steps: int = 1000
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    clip: float = 1.0
    seed: int = 0
    micro_batch_tokens: int | Literal["auto"] = "auto"
    keep_gib: float | Literal["auto"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: Literal["auto", "deepspeed", "torch"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    deepspeed: str | None = None
    log_every: int = 10
    track: Literal["none", "trackio", "wandb"] = "none"
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    max_skipped_steps: int = 3
    timeout_minutes: int = 120
    hang_minutes: float = 30.0


@ranges(
    data=PATH,
    split=NAME,
    languages=LANGUAGE,
    every=whole(0),
    queries=whole(1),
    candidates=whole(1),
    patience=whole(1),
)
@dataclass(frozen=True)
class EvalConfig:
    """Evaluation before, during and after training, by all ranks.

    Args:
        task: xquad-r or mlqa-r (a LAReQA folder), beir, miracl or mr-tydi (corpus, queries, qrels), rerank, jsonl (your
            own), cldr (held-out concepts of the embedded demo), or none.
        data: the task's folder or file.
        split: of the task's judgements, where there are several.
        languages: evaluate only these languages; null takes all.
        context: candidates are sentence + context instead of the sentence alone.
        before: evaluate the model before training too.
        every: evaluate after every so many steps and after the last; the best one's checkpoint stays, and is what is
            exported. 0: none during training; the last step is exported.
        queries: draw so many questions (by train.seed) for evaluations during training; null: all. Before and after
            training all are evaluated.
        candidates: of these evaluations: all that are relevant to the questions drawn, and others up to so many; null:
            all.
        metric: that says which is the best: mul, cr or mo (mAP), rank_distance (lower is better); ndcg@10, recall@100
            or mrr@10 in the pool of the question's language.
        patience: after so many evaluations in a row without a better one training ends; null: it never does.
    """

    task: Literal["xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "rerank", "jsonl", "cldr", "none"] = "none"
    data: str | None = None
    split: str | None = None
    languages: list[str] | None = None
    context: bool = False
    before: bool = True
    every: int = 0
    queries: int | None = None
    candidates: int | None = None
    metric: Literal["mul", "cr", "mo", "rank_distance", "ndcg@10", "recall@100", "mrr@10"] = "mul"
    patience: int | None = None


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def parser(program: str, description: str) -> ArgumentParser:
    """The command line of a program that takes a `Config`: --config FILE.yaml and --group.key VALUE."""
    made = new_parser(program, description)
    made.add_argument("--config", action="config", help="a YAML file of settings; later ones and the command line win")
    for group in fields(Config):
        made.add_class_arguments(group.default_factory, group.name)
    return made


_parser = cache(parser)  # it takes a while to make, and has no state


def parse(program: str, description: str, arguments: Sequence[str] | None = None) -> Config:
    """The settings from a command line, checked.

    `group.key=value` is taken for `--group.key=value`; the launcher's --local_rank is accepted and ignored.

    Raises:
        UserError: a setting that is not there, of another type or out of range (names it, and what to write), or a file
            that is no YAML of settings.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    arguments = [a for a in arguments if not re.match(r"--local[_-]rank(=|$)", a)]
    arguments = [f"--{a}" if re.match(r"(model|data|batch|loss|train|eval)\.[\w.]+\+?=", a) else a for a in arguments]
    # a list given again replaces the file's; jsonargparse would merge the two, entry by entry
    fresh = [("--data.sources=[]", a) if re.match(r"--data\.sources(=|$)", a) else (a,) for a in arguments]
    parsed = parse_with(_parser(program, description), [a for group in fresh for a in group], Config)
    config = Config(**{group.name: parsed[group.name] for group in fields(Config)})
    check_config(config)
    return config


def dump(config: Config) -> str:
    """The settings as YAML that --config takes."""
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _plain(value: object) -> object:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value
