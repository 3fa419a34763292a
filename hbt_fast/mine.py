"""Mine hard negatives: for every query, passages that a model takes for its answer although they are not.

python -m hbt_fast.mine --config FILE.yaml --model FOLDER_OR_NAME --out mined.jsonl

Every text is encoded once; the embeddings are kept, so that a second run with other ranks or margins only searches.
The file written is a source of format jsonl: the rows as they were read, with the negatives they had and those found.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

import docstring_parser
import numpy as np

from hbt_fast.base.files import replacing, sync, writing
from hbt_fast.base.programs import program
from hbt_fast.config import Config, parse, parser
from hbt_fast.data.mining import (
    ENOUGH,
    NO_POSITIVE,
    OWN_CONTENT,
    SMALL_POOL,
    TOO_CLOSE,
    Mined,
    MiningConfig,
    Task,
    Vectors,
    gather,
    mine,
)
from hbt_fast.data.problems import Tally
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import SourceStore, Store, folded
from hbt_fast.encoder.model import Encoder
from hbt_fast.encoder.prompts import KINDS, Prompts, choose_prompts
from hbt_fast.prepare import fingerprint, prepare, resolve, rows_of, source_name, tokenizer_parts

PROGRAM = "hbt_fast.mine"
CHOICES = {"sampling_strategy": ("random", "top"), "pool": ("language", "all")}
CHUNK = 8192  # texts whose embeddings are one file of the cache, which is there whole or not at all
Load = Callable[[str, Config], tuple[Any, str]]  # model -> an encoder, and a word that changes with its vectors


@program(PROGRAM)
def main(arguments: list[str] | None = None, load: Load | None = None) -> None:
    """Mine from the command line and say what was found; `load` is there for tests."""
    options, config = settings(sys.argv[1:] if arguments is None else arguments)
    print(run(options, config, load or load_encoder))


def settings(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """What to mine, and the run's settings; what is not an option of this program is taken for one of those."""
    own = argparse.ArgumentParser(
        f"python -m {PROGRAM}", description=__doc__.partition("\n\n")[0], allow_abbrev=False, add_help=False
    )
    own.add_argument("--help", "-h", action="store_true", help="show this, and the settings of the run")
    own.add_argument(
        "--model", metavar="MODEL", help="folder or hub name of the encoder that ranks (default: model.path)"
    )
    own.add_argument("--out", metavar="FILE.jsonl", help="where the rows go; {source} in it writes a file per source")
    own.add_argument("--cache", metavar="DIR", help="where embeddings are kept (default: data.store_dir/embeddings)")
    own.add_argument("--query_prompt", help="default: as in training")
    own.add_argument("--passage_prompt", help="default: as in training")
    own.add_argument("--output_scores", action="store_true", help="add the field mined: each one's rank and score")
    described = {entry.arg_name: entry.description for entry in docstring_parser.parse(MiningConfig.__doc__).params}
    for field in fields(MiningConfig):
        kinds = {"int": int, "float | None": _number}
        extra = {"type": kinds[field.type], "metavar": "N"} if field.type in kinds else {}
        extra |= {"choices": CHOICES[field.name]} if field.name in CHOICES else {}
        text = f"{' '.join(described[field.name].split())} (default: %(default)s)"
        own.add_argument(f"--{field.name}", default=field.default, help=text, **extra)
    options, others = own.parse_known_args(list(arguments))
    if options.help:
        own.print_help()
        print("\nThe settings of the run, as --config FILE.yaml and overrides (model.* and data.* are used):\n")
        parser(PROGRAM, "").print_help()
        sys.exit(0)
    config = parse(PROGRAM, __doc__.splitlines()[0], others)
    options.mining = MiningConfig(**{field.name: getattr(options, field.name) for field in fields(MiningConfig)})
    options.mining.check()
    options.model = options.model or config.model.path
    if options.model is None:
        raise DataError("which model ranks the passages? Give --model FOLDER_OR_NAME")
    if options.out is None or not options.out.endswith(".jsonl"):
        raise DataError(f"--out is {options.out or 'missing'}; name the file to write, ending in .jsonl")
    return options, config


def _number(text: str) -> float | None:
    return None if text in ("null", "None", "none") else float(text)


def run(options: argparse.Namespace, config: Config, load: Load) -> str:
    """Mine; returns the summary.

    Raises:
        DataError: FAISS is missing, the data cannot be read, or changed while it was mined.
        EncoderError: the model cannot be loaded.
    """
    try:
        import faiss  # noqa: F401 - nobody should wait for the embeddings to learn that it is missing
    except ImportError as error:
        raise DataError(f"mining searches with FAISS: pip install faiss-cpu, or faiss-gpu ({error})") from None
    progress = sys.stderr.isatty()
    prompts = _prompts(options, config)
    config, _ = resolve(config)
    store, _ = prepare(config)
    task = gather(store)
    print(f"{store.rows:,} rows, {len(task.questions):,} queries, {len(task.passage_texts):,} distinct passages")
    print("\n".join(prompts.lines), flush=True)
    of_sources = _of_sources(options, config, store, prompts)
    encoder, name = load(options.model, config)
    folder = Path(options.cache) if options.cache else Path(config.data.store_dir) / "embeddings"
    vectors = [
        embed(encoder, store, texts, before, folder, name, progress)
        for texts, before in zip((task.query_texts, task.passage_texts), of_sources, strict=True)
    ]
    found = mine(task, *vectors, options.mining, progress=progress)
    paths = write(options.out, config, store, task, found, options.output_scores)
    return summary(task, found, options.mining) + "\nwrote " + ", ".join(map(str, paths))


def _prompts(options: argparse.Namespace, config: Config) -> Prompts:
    """The prompts of queries and passages. Those of the settings are model.path's, and no other model's."""
    settings = (
        {kind: getattr(config.model, f"{kind}_prompt") for kind in KINDS} if options.model == config.model.path else {}
    )
    own = {kind: getattr(options, f"{kind}_prompt") for kind in KINDS}
    given = {kind: settings.get(kind) if own[kind] is None else own[kind] for kind in KINDS}
    by = "model.{kind}_prompt" if own == dict.fromkeys(KINDS) else "command line"
    return choose_prompts(options.model, given, by=by, option="--{kind}_prompt")


def _of_sources(options: argparse.Namespace, config: Config, store: Store, prompts: Prompts) -> list[list[str]]:
    """The query prompt, then the passage prompt, of each source: its own ones are model.path's, too."""
    found = []
    for kind, text, number in zip(KINDS, prompts.texts, (0, 1), strict=True):
        own = options.model == config.model.path and getattr(options, f"{kind}_prompt") is None
        found.append([source.roles[number].prompt if own else text for source in store.sources])
        for source, before in zip(store.sources, found[-1], strict=True):
            if before != text:
                print(f"{kind} prompt of source {source.name}: {before!r}", flush=True)
    return found


def load_encoder(model: str, config: Config) -> tuple[Encoder, str]:
    """The encoder, on a GPU if there is one, and a hash of all that its vectors depend on besides prompt and text."""
    import torch

    from hbt_fast.encoder.encoding import How, identity
    from hbt_fast.engine.launch import computes_in_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and computes_in_bf16(device))
    encoder = Encoder.from_pretrained(model, pooling=config.model.pooling, autocast=torch.bfloat16 if bf16 else None)
    encoder.max_length = min(encoder.max_length, config.model.max_length)
    what = identity(encoder, How("", 0, encoder.dimension, "float32"))  # the prompt goes in with the texts
    return encoder.to(device), fingerprint([what, device.type, *tokenizer_parts(encoder.tokenizer)])


def embed(
    encoder: Encoder, store: Store, texts: np.ndarray, prompts: list[str], folder: Path, name: str, progress: bool
) -> Vectors:
    """Embed texts (n,) TEXT of the store, each with the prompt of its source before it, or find them in the cache.

    Chunks of a source's texts are files named after all that goes in (`name` stands for the encoder): an interrupted
    run goes on at its chunk, and a source that is added or removed leaves the others' alone.

    Returns:
        a function from numbers in `texts`, (m,), to vectors, (m, d) float32.

    Raises:
        DataError: the encoder gave something that is no vector.
    """
    from tqdm import tqdm

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    chunks: list[np.ndarray] = []
    starts: list[int] = []
    with tqdm(total=len(texts), desc="encoding", unit=" texts", unit_scale=True, disable=not progress) as bar:
        for number, source in enumerate(store.sources):
            of_source = np.flatnonzero(texts["source"] == number)
            for start in range(0, len(of_source), CHUNK):
                numbers = texts["number"][of_source[start : start + CHUNK]]
                starts.append(int(of_source[start]))
                chunks.append(_chunk(encoder, [source.text(n) for n in numbers], prompts[number], folder, name))
                bar.update(len(numbers))
    edges = np.array(starts)

    def vectors(wanted: np.ndarray) -> np.ndarray:
        out = np.empty((len(wanted), chunks[0].shape[1]), np.float32)
        of = np.searchsorted(edges, wanted, "right") - 1
        for chunk in np.unique(of):
            here = np.flatnonzero(of == chunk)
            out[here] = chunks[chunk][wanted[here] - edges[chunk]]
        return out

    return vectors


def _chunk(encoder: Encoder, texts: list[str], prompt: str, folder: Path, name: str) -> np.ndarray:
    """The vectors of a chunk of texts, memory-mapped."""
    path = folder / f"{fingerprint([name, prompt, texts])}.npy"
    for _ in range(2):
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if found.dtype == np.float32 and found.ndim == 2 and len(found) == len(texts):
                return found
        except (FileNotFoundError, ValueError, EOFError):  # not there, or damaged
            pass
        made = np.ascontiguousarray(encoder.encode(texts, prompt), np.float32)
        if not np.isfinite(made).all():
            raise DataError(
                "the model gave vectors with NaN or infinity; is it damaged, or does it need train.precision fp32?"
            )
        with replacing(path) as begun, open(begun, "wb") as file:
            np.save(file, made)
    raise DataError(f"{path}: cannot be read back")


def _rename(files: list[tuple[Any, Path, Path]]) -> None:
    """Give files that are written whole their names."""
    for file, _, _ in files:
        file.flush()
        os.fsync(file.fileno())
    for _, begun, path in files:
        begun.replace(path)
        sync(path.parent)


def write(out: str, config: Config, store: Store, task: Task, found: Mined, scores: bool = False) -> list[Path]:
    """Write the rows as they were read, each with the negatives it had and those found, as JSON Lines.

    `out` may have {source} for the name of each row's source. Until all files are whole, none has its name.

    Raises:
        DataError: the rows are no longer those of the store.
    """
    paths = [Path(out.replace("{source}", source.name.replace(os.sep, "-"))) for source in store.sources]
    shared = {path for path, count in Counter(paths).items() if count > 1}
    files: dict[Path, tuple[TextIO, Path, Path]] = {}
    try:
        with writing(Path(out)), ExitStack() as stack:
            for number, (source, path) in enumerate(zip(store.sources, paths, strict=True)):
                if path not in files:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    begun = path.with_name(path.name + ".begun")
                    files[path] = stack.enter_context(open(begun, "w", encoding="utf-8", newline="\n")), begun, path
                for row, own in _rows(config, source, number, task):
                    record = _record(row, store, task, found, own, scores)
                    if path in shared:  # content ids are those of one source
                        record["source"] = source.name
                        record |= {} if row.content is None else {"content": f"{source.name}:{row.content}"}
                    files[path][0].write(json.dumps(record, ensure_ascii=False) + "\n")
            _rename(list(files.values()))
    finally:
        for _, begun, _ in files.values():
            begun.unlink(missing_ok=True)
    return list(files)


def _rows(config: Config, source: SourceStore, number: int, task: Task) -> Iterator[tuple[Row, np.ndarray]]:
    """The rows of a source of the store, as they were read, with the numbers of their questions."""
    group = [given for given in config.data.sources if source_name(given) == source.name]
    refused = set(source.refused)
    rows = (row for n, row in enumerate(rows_of(config, group, Tally())) if n not in refused)
    first, last = np.searchsorted(task.questions["source"], [number, number + 1])
    ends = first + np.searchsorted(task.questions["row"][first:last], np.arange(source.rows), "right")
    count = 0
    for count, row in enumerate(rows, 1):
        own = np.arange(first if count == 1 else ends[count - 2], ends[min(count, source.rows) - 1])
        asked = [source.text(task.query_texts["number"][t]) for t in task.questions["text"][own]]
        if count > source.rows or sorted(asked) != sorted(row.queries.values()):
            raise DataError(f"{row.where}: this row has changed since its source was prepared; run again")
        yield row, own
    if count != source.rows:
        raise DataError(f"source {source.name!r} has fewer rows than when it was prepared; run again")


def _record(row: Row, store: Store, task: Task, found: Mined, own: np.ndarray, scores: bool) -> dict[str, Any]:
    """A row as an object of a JSON Lines source."""
    negatives = {code: list(texts) for code, texts in row.negatives.items()}
    known = {code: {folded(text) for text in texts} for code, texts in negatives.items()}
    mined = {}
    for question in own:
        details = []
        passages = found.passages[question]
        for nth, passage in enumerate(task.passages[passages[passages >= 0]]):
            code = store.languages[passage["language"]]
            source, number = task.passage_texts[passage["text"]]
            text = store.sources[source].text(number)
            if (key := folded(text)) not in known.setdefault(code, set()):
                known[code].add(key)
                negatives.setdefault(code, []).append(text)
            facts = int(found.ranks[question, nth]), round(float(found.scores[question, nth]), 6)
            details.append({"rank": facts[0], "score": facts[1], "language": code, "text": text})
        if not np.isnan(found.positives[question]):
            score = round(float(found.positives[question]), 6)
            mined[store.languages[task.questions["language"][question]]] = {"positive": score, "negatives": details}
    record: dict[str, Any] = {"query": row.queries, "passage": row.passages}
    record |= {"negatives": negatives} if negatives else {}
    if row.negative_scores:  # those that were mined have none
        scored = {code: row.negative_scores.get(code, ()) for code in negatives}
        record["negative_scores"] = {
            code: [None if math.isnan(score) else score for score in own] + [None] * (len(negatives[code]) - len(own))
            for code, own in scored.items()
        }
    others = {"content": row.content, "scores": row.score, "prompt": row.prompt}
    record |= {name: value for name, value in others.items() if value is not None}
    return record | ({"mined": mined} if scores else {})


def summary(task: Task, found: Mined, settings: MiningConfig) -> str:
    """What was found, as text."""
    counts = (found.passages >= 0).sum(1)
    lines = [f"{len(counts):,} queries, {counts.mean():.2f} negatives each ({settings.num_negatives} asked for)"]
    if counts.any():
        ranks, scores = found.ranks[found.passages >= 0], found.scores[found.passages >= 0]
        lines.append(
            f"mean score {np.nanmean(found.positives):.4f} of positives, {scores.mean():.4f} of negatives, whose "
            f"median rank is {np.median(ranks):.0f}"
        )
    reasons = {
        TOO_CLOSE: "the others of their ranks score too near the positive (margins, max_score) or below min_score",
        OWN_CONTENT: "the others are of the query's own content",
        SMALL_POOL: "the pool has no more candidates beyond range_min",
        NO_POSITIVE: "their row has no passage that is not the query itself",
    }
    short = int((found.why != ENOUGH).sum())
    if short:
        lines.append(f"{short:,} queries have fewer than asked for, {int((counts == 0).sum()):,} have none:")
        lines += [f"  {n:>9,}  {text}" for why, text in reasons.items() if (n := int((found.why == why).sum()))]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
