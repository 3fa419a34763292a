"""Retrieval tasks by name and groups of languages, for the programs and for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.tasks import RetrievalTask


def load_retrieval(
    task: str,
    data: str | Path,
    *,
    split: str | None = None,
    context: bool = False,
    languages: Sequence[str] | None = None,
) -> RetrievalTask:
    """The task of a name.

    Args:
        task: "xquad-r", "mlqa-r", "beir", "miracl", "mr-tydi", "rerank" or "jsonl".
        data: its folder, or the file of jsonl.
        split: of the judgements, where there are several; see `layouts`.
        context: xquad-r and mlqa-r: candidates are sentence and paragraph.
        languages: of these alone; None: of all.

    Raises:
        DataError: the data cannot be read; names file and line.
    """
    if task in ("xquad-r", "mlqa-r"):
        from hbt_fast.evaluation import lareqa

        load = lareqa.xquad_r if task == "xquad-r" else lareqa.mlqa_r
        return load(data, context=context, languages=languages)
    if task == "jsonl":
        from hbt_fast.evaluation.jsonl import jsonl

        return jsonl(data, languages)
    if task == "rerank":
        from hbt_fast.evaluation.reranking import reranking

        return reranking(data, split, languages)
    from hbt_fast.evaluation.beir import beir

    return beir(data, split, languages)


def parse_groups(text: str) -> dict[str, list[str]]:
    """Groups of languages from the command line.

    Args:
        text: "low=sw,yo;high=en,de", or the path of a YAML or JSON file {low: [sw, yo], high: [en, de]}.

    Raises:
        DataError: it is neither.
    """
    if text.endswith((".json", ".yaml", ".yml")):
        import yaml

        try:
            found = yaml.safe_load(Path(text).read_text(encoding="utf-8"))  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"--groups {text}: {error}") from error
    else:
        pairs = [part.partition("=") for part in text.split(";") if part.strip()]
        found = {name.strip(): [code.strip() for code in codes.split(",")] for name, _, codes in pairs}
    lists = list(found.values()) if isinstance(found, dict) else []
    if not lists or not all(
        isinstance(codes, list) and codes and all(isinstance(c, str) and c for c in codes) for codes in lists
    ):
        raise DataError(
            f'--groups {text}: write "low=sw,yo;high=en,de", or a file with {{low: [sw, yo], high: [en, de]}}'
        )
    return found
