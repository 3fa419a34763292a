"""The end of a run: evaluation before and after as table and heat map, the exported model's card, the report.

python -m hbt_fast.report runs/demo      writes runs/demo/report.html again, of a run that was stopped too
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hbt_fast.base.files import write_whole
from hbt_fast.base.programs import program
from hbt_fast.config import Config, dump
from hbt_fast.data.store import Store
from hbt_fast.evaluation.metrics import Results
from hbt_fast.evaluation.report import comparison, write_report
from hbt_fast.run_page import write_page


@program("hbt_fast.report")
def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of a run folder from the command line."""
    made = argparse.ArgumentParser("hbt_fast.report", description="Write RUN/report.html from what a run left behind.")
    made.add_argument("run", type=Path, help="the run folder (train.run_dir); the run may have been stopped")
    print(write_page(made.parse_args(arguments).run))


def before_and_after(before: Results | None, after: Results | None, run: Path) -> dict[str, Path]:
    """Write evaluation.json, .md and .png, print the table; returns the paths by what they are."""
    if after is None:
        return {}
    if before is not None:
        print(f"\n{after.task}\n\n{comparison(before, after)}", flush=True)
    paths = write_report(after, run / "evaluation.json", before)
    return dict(zip(("results (JSON)", "results (table)", "heat map"), paths, strict=True))


def write_model_card(folder: Path, config: Config, store: Store, before: Results | None, after: Results | None) -> None:
    """README.md of the exported model: what it is, data, recipe, results, how to use it."""
    languages = "\n".join(f"- {code}" for code in store.languages)
    prompts = json.dumps(
        {"query": config.model.query_prompt, "passage": config.model.passage_prompt}, ensure_ascii=False
    )
    data = "\n".join(f"- {source.name}: {source.rows:,} rows" for source in store.sources)
    results = "No evaluation was run."
    if after is not None:
        table = comparison(before, after) if before is not None else after.to_markdown().partition("\n")[2].strip()
        results = f"On {after.task} ({after.queries:,} queries, {after.candidates:,} candidates):\n\n{table}"
    start = config.model.path or "random weights"
    write_whole(
        folder / "README.md",
        f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
language:
{languages}
---

# A multilingual retriever, trained with hbt_fast

Questions and passages in {len(store.languages)} languages are mapped to unit vectors; inner products compare them.

```python
from sentence_transformers import SentenceTransformer

{_usage(folder, config.model.separate_towers)}
print(queries @ passages.T)
```

Prompts: `{prompts}`.

## Data

{data}

## Recipe

{config.batch.strategy} batches (arXiv 2408.10536) of {config.batch.size} pairs, {config.train.steps:,} steps,
InfoNCE at temperature {config.loss.temperature}, AdamW at {config.train.learning_rate}, started from
{start}. All settings:

```yaml
{dump(config).strip()}
```

## Results

{results.strip()}
""",
    )


def _usage(folder: Path, separate: bool) -> str:
    """The lines of Python that load the exported model, or both, and encode queries and passages."""
    kinds = ("query", "passage")
    names = {kind: f"{kind}_model" if separate else "model" for kind in kinds}
    paths = {name: folder / kind if separate else folder for kind, name in names.items()}
    lines = [f'{name} = SentenceTransformer("{path}")' for name, path in paths.items()]
    plural = {"query": "queries", "passage": "passages"}
    lines += [f'{plural[kind]} = {names[kind]}.encode(["..."], prompt_name="{kind}")' for kind in kinds]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
