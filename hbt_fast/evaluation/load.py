"""Retrieval tasks by name and groups of languages, for the programs and for training."""

from __future__ import annotations

from collections import Counter
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
        data: its folder; of jsonl also a file, a glob or zip://MEMBER::ARCHIVE.
        split: of the judgements, where there are several; see `hbt_fast.data.collection_files`.
        context: xquad-r and mlqa-r: candidates are sentence and paragraph.
        languages: of these alone; None: of all.

    Raises:
        DataError: the data cannot be read; names file and line.
    """
    if task != "jsonl":
        refuse_archive(task, data)
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


def refuse_archive(task: str, data: str | Path) -> None:
    """See that a task that is made of a folder gets one.

    Args:
        task: its name.
        data: what was given.

    Raises:
        DataError: it is zip://MEMBER::ARCHIVE.
    """
    if "::" in str(data):
        raise DataError(f"{data}: {task} is read from a folder; unpack the archive and give its folder")


def parse_groups(text: str) -> dict[str, list[str]]:
    """Groups of languages from the command line.

    Args:
        text: "low=sw,yo;high=en,de", or the path of a YAML or JSON file {low: [sw, yo], high: [en, de]}.

    Raises:
        DataError: it is neither, or two groups have one name.
    """
    if text.endswith((".json", ".yaml", ".yml")):
        import yaml

        try:
            content = Path(text).read_text(encoding="utf-8")  # JSON is YAML
            # All is text: elsewhere in YAML "no", which is Norwegian, is false, and 2024 is no name.
            found = yaml.load(content, yaml.BaseLoader)
            node = yaml.compose(content, yaml.BaseLoader)  # still has names that are written twice
            names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DataError(f"--groups {text}: {error}") from error
    else:
        pairs = [part.partition("=") for part in text.split(";") if part.strip()]
        names = [name.strip() for name, _, _ in pairs]
        found = {name.strip(): [code.strip() for code in codes.split(",")] for name, _, codes in pairs}
    lists = list(found.values()) if isinstance(found, dict) else []
    if not lists or not all(
        isinstance(codes, list) and codes and all(isinstance(c, str) and c for c in codes) for codes in lists
    ):
        raise DataError(
            f'--groups {text}: write "low=sw,yo;high=en,de", or a file with {{low: [sw, yo], high: [en, de]}}'
        )
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"--groups {text}: two groups are called {twice!r}; give each a name of its own")
    return found
