"""The evaluation program: ``python -m hbt_fast.evaluate MODEL --task xquad-r --data DIR [--out results.json]``.

Prints mAP in the settings Mo, Cr, Mul and the rank distance, and with --out writes JSON, Markdown and a heat map.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hbt_fast.data.rows import DataError
from hbt_fast.encode import add_encoder_arguments, at_least_one, load_encoder

DEFAULT_PROMPTS = ("Query: ", "Passage: ")  # the prefixes of arXiv 2408.10536


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; exits with 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hbt_fast.evaluate", description="mAP (Mo, Cr, Mul) and rank distance of a dense retriever."
    )
    add_encoder_arguments(parser)
    parser.add_argument("--task", default="xquad-r", choices=["xquad-r", "mlqa-r"])
    parser.add_argument("--data", required=True, metavar="DIR", help="LAReQA folder with one <language>.json each")
    parser.add_argument("--query-prompt", help="default: the one recorded with the model, else 'Query: '")
    parser.add_argument("--passage-prompt", help="default: the one recorded with the model, else 'Passage: '")
    parser.add_argument("--context", action="store_true", help="append the paragraph to each candidate sentence")
    parser.add_argument("--languages", metavar="en,de,..", help="evaluate on these languages only")
    parser.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: a GPU if there is one"
    )
    parser.add_argument("--dimensions", type=at_least_one, metavar="N", help="use the first N, normalised again")
    parser.add_argument("--before", type=Path, metavar="FILE.json", help="earlier results to show beside these")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write JSON here, .md and .png beside it")
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix != ".json":
        parser.error(f"--out must end in .json (the .md and .png go beside it), not {args.out}")
    return args


def recorded_prompts(model: str | Path) -> dict[str, str]:
    """Prompts in the model folder's config_sentence_transformers.json: "query" and "passage", those that are there.

    An empty prompt that is recorded counts: the model was trained without one.

    Raises:
        DataError: the file is there but is not JSON.
    """
    file = Path(model) / "config_sentence_transformers.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    prompts = (config.get("prompts") if isinstance(config, dict) else None) or {}
    found = {"query": prompts.get("query"), "passage": prompts.get("passage", prompts.get("document"))}
    return {kind: prompt for kind, prompt in found.items() if prompt is not None}


def choose_prompts(args: argparse.Namespace) -> tuple[tuple[str, str], list[str]]:
    """Command line, then the model's own record, then the defaults; with one line per prompt saying which it was."""
    recorded = recorded_prompts(args.model)
    chosen, lines = [], []
    for kind, given, default in zip(
        ("query", "passage"), (args.query_prompt, args.passage_prompt), DEFAULT_PROMPTS, strict=True
    ):
        if given is not None:
            prompt, source = given, "command line"
        elif kind in recorded:
            prompt, source = recorded[kind], "recorded with the model"
        else:
            prompt, source = default, f"default; none recorded with the model, set another with --{kind}-prompt"
        chosen.append(prompt)
        lines.append(f"{kind} prompt {prompt!r} ({source})")
    return (chosen[0], chosen[1]), lines


def main(argv: Sequence[str] | None = None, load: Callable[[argparse.Namespace, str], Any] = load_encoder) -> int:
    """Runs the program; returns its exit status: 0, or 2 after a message on stderr for what the user can put right."""
    args = parse(argv)
    import torch

    from hbt_fast.encoder import EncoderError
    from hbt_fast.evaluation import lareqa
    from hbt_fast.evaluation.metrics import Results
    from hbt_fast.evaluation.report import comparison, write_report
    from hbt_fast.evaluation.run import EvaluationError, evaluate

    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise DataError("--device cuda, but torch sees no GPU; take --device cpu or auto")
        device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
        languages = args.languages.split(",") if args.languages else None
        load_task = lareqa.xquad_r if args.task == "xquad-r" else lareqa.mlqa_r
        # Cheap checks first: nobody should wait for a model to learn that a path is wrong.
        task = load_task(args.data, context=args.context, languages=languages)
        before = _read_before(args.before, task.languages, Results) if args.before else None
        (query_prompt, passage_prompt), lines = choose_prompts(args)
        print(f"{task.name}: {len(task.queries):,} queries, {len(task.candidates):,} candidates, {task.languages}")
        print("\n".join(lines))
        encoder = load(args, device)
        if args.dimensions:
            encoder = SimpleNamespace(encode=partial(encoder.encode, dimensions=args.dimensions))
        results = evaluate(
            encoder, task, query_prompt, passage_prompt, model=str(args.model), device=args.device,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
        print(f"\n{results.to_markdown()}")
        if before is not None:
            print(comparison(before, results))
        print(f"Mo {results.mo:.4f}  Cr {results.cr:.4f}  Mul {results.mul:.4f}  RD {results.rank_distance:.1f}")
        if args.out:
            print("wrote " + ", ".join(map(str, write_report(results, args.out, before))))
    except (DataError, EncoderError, EvaluationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read_before(file: Path, languages: list[str], results_type: Any) -> Any:
    try:
        before = results_type.from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"--before {file}: {error}") from error
    if before.languages != languages:
        raise DataError(f"--before {file} has languages {before.languages}, this evaluation {languages}")
    return before


if __name__ == "__main__":
    sys.exit(main())
