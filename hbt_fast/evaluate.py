"""The evaluation program: ``python -m hbt_fast.evaluate MODEL --task xquad-r --data DIR [--out results.json]``.

Prints what a task is reported by: mAP in the settings Mo, Cr, Mul and the rank distance; nDCG@10, Recall@100, MRR@10;
accuracy of bitext. With --out it writes JSON, a Markdown page, a picture, and all measures query by query for
``python -m hbt_fast.compare``. Vectors are kept, so a second evaluation of the same model and data takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbt_fast.base.programs import program
from hbt_fast.data.rows import DataError
from hbt_fast.encode import PRECISIONS, add_encoder_arguments, at_least_one, load_encoder, native_dtype

if TYPE_CHECKING:
    from hbt_fast.encoder.prompts import Prompts
    from hbt_fast.evaluation.bitext_data import BitextTask
    from hbt_fast.evaluation.made import Made
    from hbt_fast.evaluation.results import Results
    from hbt_fast.evaluation.tasks import RetrievalTask

TASKS = """tasks and their data:
  xquad-r, mlqa-r        LAReQA's folder with one <language>.json each; mlqa-r may have holes
  beir, miracl, mr-tydi  corpus, queries (or topics) and qrels as these are unpacked, or so in a folder per language
  rerank                 the same with a run to re-rank; or mMARCO's collections, queries, runs and qrels
  bitext                 line-aligned files of translations (Tatoeba, NTREX)
  jsonl                  own data: {"query": .., "passage": .., "language": ..} in each line, or as
                         hbt_fast/evaluation/jsonl.py says"""
OPTIONS = {  # that only some tasks have
    "context": ("xquad-r", "mlqa-r"),
    "split": ("beir", "miracl", "mr-tydi", "rerank"),
    "index": ("xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "jsonl"),
    "before": ("xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "rerank", "jsonl"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hbt_fast.evaluate",
        description="mAP (Mo, Cr, Mul), rank distance, nDCG@10 or bitext accuracy of a dense retriever.",
        epilog=TASKS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_encoder_arguments(parser, precision="fp32")  # figures are then the same on every machine
    tasks = ["xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "rerank", "bitext", "jsonl"]
    parser.add_argument("--task", default="xquad-r", choices=tasks, help="default: xquad-r")
    # No Path: that makes one slash of the two in zip://
    data = "folder of the task; of jsonl also a file, a glob or zip://MEMBER::ARCHIVE"
    parser.add_argument("--data", required=True, metavar="DIR", help=data)
    parser.add_argument("--split", help="of the judgements; default: the only one there is, else test, else dev")
    parser.add_argument("--query-prompt", help="default: the one recorded with the model, else none")
    parser.add_argument("--passage-prompt", help="default: the one recorded with the model, else none")
    of = "those recorded with the model of a source that it was trained on, where that had prompts of its own"
    parser.add_argument("--prompts-of", metavar="SOURCE", help=of)
    parser.add_argument("--context", action="store_true", help="append the paragraph to each candidate sentence")
    parser.add_argument("--languages", metavar="en,de,..", help="evaluate on these languages only")
    groups = (
        'groups of query languages to report a mean of: "low=sw,yo;high=en,de", or a YAML or JSON file of such lists'
    )
    parser.add_argument("--groups", help=groups)
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one"
    )
    parser.add_argument("--dimensions", type=at_least_one, metavar="N", help="use the first N, normalised again")
    index = "search by this too: what an approximate index finds gets a line of its own, all else is exact"
    parser.add_argument("--index", choices=["flat", "ivf", "ivf-pq"], help=index)
    cache = (
        "keep vectors here for the next time; none: do not. Default: $XDG_CACHE_HOME or ~/.cache/hbt_fast/embeddings"
    )
    parser.add_argument("--cache", metavar="DIR", help=cache)
    parser.add_argument("--before", type=Path, metavar="FILE.json", help="earlier results to show beside these")
    out = "write JSON here; .md, .png and .queries.npz beside it"
    parser.add_argument("--out", type=Path, metavar="FILE.json", help=out)
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out must end in .json (the .md and .png go beside it), not {args.out}")
    for option, tasks in OPTIONS.items():
        if getattr(args, option) and args.task not in tasks:
            parser.error(f"--{option} is for --task {', '.join(tasks)}, not for {args.task}")
    return args


def prompts_of(args: argparse.Namespace) -> Prompts:
    """The prompts that the command line gives or the model records.

    Bitext has sentences on both sides: the query's prompt goes before all of them.
    """
    from hbt_fast.encoder.prompts import Prompt, Prompts, choose_prompts

    given = {"query": args.query_prompt, "passage": args.passage_prompt}
    found = choose_prompts(args.model, given, option="--{kind}-prompt", of=args.prompts_of)
    if args.task == "bitext" and args.passage_prompt is None:
        return Prompts(found.query, Prompt("passage", found.query.text, "as the queries'"))
    return found


def load_task(args: argparse.Namespace) -> RetrievalTask | BitextTask:
    """The task that the command line names.

    Raises:
        DataError: its data cannot be read; names file and line.
    """
    from hbt_fast.evaluation.load import load_retrieval, parse_groups, refuse_archive

    languages = [code.strip() for code in args.languages.split(",")] if args.languages else None
    if args.task == "bitext":
        from hbt_fast.evaluation.bitext_data import load_bitext

        refuse_archive(args.task, args.data)
        task = load_bitext(args.data, languages)
    else:
        options = {"split": args.split, "context": args.context, "languages": languages}
        task = load_retrieval(args.task, args.data, **options)
    return replace(task, groups=parse_groups(args.groups)) if args.groups else task


@program("hbt_fast.evaluate", ValueError)  # what libraries raise for files of people
def main(argv: Sequence[str] | None = None, load: Callable[[argparse.Namespace, str], Any] = load_encoder) -> None:
    """Evaluate from the command line."""
    args = parse(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda, but torch sees no GPU; take --device cpu or auto")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    # Cheap checks first: nobody should wait for a model to learn that a path is wrong.
    task = load_task(args)
    before = _read_before(args.before, task) if args.before else None
    print(_described(task))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    encoder = load(args, device)
    made = _made(encoder, args, device)
    prompts = prompts_of(args)
    print("\n".join(prompts.lines))
    encoder = _cached(encoder, args)
    run = _bitext if args.task == "bitext" else _retrieval
    run(args, encoder, task, prompts.texts, made, before)


def _described(task: RetrievalTask | BitextTask) -> str:
    if not hasattr(task, "candidates"):
        return f"{task.name}: {len(task.pairs):,} pairs of languages"
    described = f"{task.name}: {len(task.queries):,} queries, {len(task.candidates):,} candidates, {task.languages}"
    if task.left_out:
        described += f"; {task.left_out:,} queries have no relevant candidate (judged 0 or not at all, as those of "
        described += "other splits) and are left out"
    return described


def _cached(encoder: Any, args: argparse.Namespace) -> Any:
    from hbt_fast.encoder import Encoder
    from hbt_fast.evaluation.cache import CachedEncoder, default_folder

    if not isinstance(encoder, Encoder):
        return encoder
    folder = None if args.cache == "none" else args.cache or default_folder()
    return CachedEncoder(encoder, folder, args.dimensions)


def _made(encoder: Any, args: argparse.Namespace, device: str) -> Made:
    from hbt_fast.evaluation.made import made_with

    precision = args.precision
    if precision == "auto":
        precision = next(name for name, of in PRECISIONS.items() if str(native_dtype(device)) == f"torch.{of}")
    return made_with(encoder, precision, args.dimensions)


def _retrieval(
    args: argparse.Namespace, encoder: Any, task: RetrievalTask, prompts: tuple[str, str],
    made: Made, before: Results | None,
) -> None:  # fmt: skip
    from hbt_fast.evaluation.report import comparison, write_report
    from hbt_fast.evaluation.run import measure

    results, per_query = measure(
        encoder, task, *prompts, model=str(args.model), made=made, device=args.device, index=args.index or "flat",
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(f"\n{results.to_markdown()}")
    if before is not None:
        print(comparison(before, results))
    print(results.headline())
    if args.out:
        print("wrote " + ", ".join(map(str, write_report(results, args.out, before, per_query))))


def _bitext(
    args: argparse.Namespace, encoder: Any, task: BitextTask, prompts: tuple[str, str],
    made: Made, _: None,
) -> None:  # fmt: skip
    from hbt_fast.evaluation.bitext import evaluate_bitext
    from hbt_fast.evaluation.made import made_on

    results = evaluate_bitext(
        encoder, task, prompts[0], target_prompt=prompts[1], model=str(args.model), device=args.device,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    results = replace(results, settings={**made, **made_on(task)})
    print(f"\n{results.to_markdown()}")
    print(results.headline())
    if args.out:
        print("wrote " + ", ".join(map(str, results.write(args.out))))


def _read_before(file: Path, task: RetrievalTask) -> Results:
    from hbt_fast.evaluation.results import Results

    try:
        before = Results.from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"--before {file}: {error}") from error
    if before.task != task.name:
        raise DataError(f"--before {file} is of the task {before.task}, this evaluation of {task.name}")
    if before.languages != task.languages:
        raise DataError(f"--before {file} has languages {before.languages}, this evaluation {task.languages}")
    return before


if __name__ == "__main__":
    main()
