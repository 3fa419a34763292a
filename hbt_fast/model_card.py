"""README.md of an exported model: what the hub reads of it, results, how to use it, data and recipe."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hbt_fast.base.files import write_whole
from hbt_fast.clients import snippets
from hbt_fast.config import Config, dump
from hbt_fast.data.store import SourceStore, Store
from hbt_fast.encoder.checkpoint_files import find
from hbt_fast.encoder.hub import can_be_on_the_hub
from hbt_fast.evaluation.report import comparison
from hbt_fast.evaluation.results import NAMES, Results

ELSEWHERE = re.compile(r"(?<![\w/.~-])(?:file://)?(?:~|\.\.?)?/(?!/)(?:[^\s/'\"`,;:|()]+/)+(?=[^\s/])")
IN_THE_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")


def write_model_card(folder: Path, config: Config, store: Store, before: Results | None, after: Results | None) -> None:
    """Write README.md of the exported model.

    Its settings are those of the run; of paths on this machine only the last name is left.

    Args:
        folder: of the export.
        config: the run's settings, with the prompts that were chosen.
        store: the training data.
        before: of the model as training found it, where that was measured.
        after: of the exported model; None: nothing was measured.
    """
    separate = config.model.separate_towers
    base = config.model.path
    start = "random weights" if base is None else Path(base).name if os.path.isdir(base) else base
    usage = "\n\n".join(
        f"### {library}\n\n```python\n{lines}\n```" for library, lines in snippets(folder, separate).items()
    )
    prompts = {"query": config.model.query_prompt, "passage": config.model.passage_prompt}
    both = " LangChain, LlamaIndex and Chroma take one model for both: give them vectors." if separate else ""
    languages = f"{len(store.languages)} language{'s' * (len(store.languages) > 1)}"
    data = "\n".join(_source(source, list(prompts.values())) for source in store.sources)
    body = f"""# A multilingual retriever, trained with hbt_fast

Questions and passages in {languages} are mapped to unit vectors; inner products compare them.

## Results

{_results(before, after)}

## Use

"{folder.name}" is this folder, or its name on the hub. Queries and passages have a prompt before them, as in training:
without it their vectors are others.{both} Prompts: `{json.dumps(prompts, ensure_ascii=False)}`.

{usage}

## Data

{data}

## Recipe

{config.batch.strategy} batches (arXiv 2408.10536) of {config.batch.size} pairs, {config.train.steps:,} steps,
InfoNCE at temperature {config.loss.temperature}, AdamW at {config.train.learning_rate}, started from
{start}.

## Settings

```yaml
{dump(config).strip()}
```
"""
    head = _front_matter(config, store.languages, after)
    write_whole(folder / "README.md", f"---\n{head}\n---\n\n{ELSEWHERE.sub('', body)}")


def _front_matter(config: Config, languages: list[str], after: Results | None) -> str:
    """What the hub reads, as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    base, licence = (None, None) if config.model.path is None else _base_of(config.model.path)
    results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type="unknown",
            dataset_name=ELSEWHERE.sub("", after.task),
            metric_type=name.replace("@", "_at_"),
            metric_name=NAMES.get(name, name),
            metric_value=round(value, 6),
        )
        for name, value in (after.figures().items() if after is not None else ())
    ]
    tags = ["sentence-transformers", "sentence-similarity", "feature-extraction", "dense-retrieval", "hbt_fast"]
    return ModelCardData(
        language=list(languages),
        license=licence,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=tags + ["multilingual"] * (len(languages) > 1),
        base_model=base,
        model_name=Path(config.train.run_dir).resolve().name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _source(source: SourceStore, prompts: list[str]) -> str:
    """What there is of a source, and its prompts where they are not the model's."""
    own = [role.prompt for role in source.roles]
    said = "" if own == prompts else f", with prompts of its own: {json.dumps(own, ensure_ascii=False)}"
    return f"- {source.name}: {source.rows:,} rows{said}"


def _results(before: Results | None, after: Results | None) -> str:
    if after is None:
        return "No evaluation was run."
    table = comparison(before, after) if before is not None else after.to_markdown().partition("\n")[2]
    return f"On {after.task} ({after.queries:,} queries, {after.candidates:,} candidates):\n\n{table.strip()}"


def _base_of(path: str) -> tuple[str | None, str | None]:
    """The name on the hub of what training started from, and its licence; None where they are not known."""
    from huggingface_hub import ModelCard

    name = path if _is_hub_name(path) else None
    if cached := IN_THE_CACHE.search(f"{os.path.abspath(path)}/"):
        name = "/".join(cached.groups())
    try:
        file = find(path, "README.md")
        said = None if file is None else ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True).data
    except Exception:  # a card that cannot be read is no reason to end a run that is done
        said = None
    licence = getattr(said, "license", None)
    of_base = getattr(said, "base_model", None)  # peft writes a path there
    return name or (of_base if _is_hub_name(of_base) else None), licence if isinstance(licence, str) else None


def _is_hub_name(name: object) -> bool:
    return isinstance(name, str) and can_be_on_the_hub(name) and not os.path.isdir(name)
