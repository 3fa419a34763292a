"""The end of a run: evaluation before and after as table and heat map, and the exported model's card."""

from __future__ import annotations

import json
from pathlib import Path

from hbt_fast.config import Config, dump
from hbt_fast.data.store import Store
from hbt_fast.encoder.towers import Towers
from hbt_fast.engine.backends import SettingError
from hbt_fast.engine.launch import World
from hbt_fast.engine.runlog import BEFORE, RunLog
from hbt_fast.evaluation.metrics import Results
from hbt_fast.evaluation.report import comparison, write_report
from hbt_fast.evaluation.run import evaluate
from hbt_fast.evaluation.tasks import RetrievalTask, task_from_rows, xquad_r


def load_task(config: Config) -> RetrievalTask | None:
    """The evaluation task that the settings name."""
    settings = config.eval
    if settings.task == "none":
        return None
    if settings.task == "cldr":
        from hbt_fast.data.cldr import cldr_rows

        languages = settings.languages or config.data.languages
        return task_from_rows("held-out CLDR concepts", cldr_rows("test", tuple(languages) if languages else None))
    if settings.data is None:
        raise SettingError("eval.task is xquad-r, but eval.data is not set; write the folder of its JSON files")
    return xquad_r(settings.data, context=settings.context, languages=settings.languages)


def evaluate_model(towers: Towers, config: Config, world: World, log: RunLog, when: str) -> Results | None:
    """Evaluate on rank 0 (the others wait at the next barrier) and append the figures to metrics.jsonl."""
    if config.eval.task == "none" or not world.first:
        return None
    log.say(f"\nevaluating {when}")
    model = config.model
    results = evaluate(
        towers.queries,
        load_task(config),
        model.query_prompt,
        model.passage_prompt,
        passage_encoder=towers.passages,
        model=when,
        progress=True,
        log=log.say,
    )
    headline = {"mo": results.mo, "cr": results.cr, "mul": results.mul, "rank_distance": results.rank_distance}
    log.evaluation(when, headline)
    if when == BEFORE:
        (log.run / "evaluation-before.json").write_text(results.to_json(), encoding="utf-8")
    log.say(
        f"mAP monolingual {results.mo:.4f}  cross-lingual {results.cr:.4f}  multilingual {results.mul:.4f}  "
        f"rank distance {results.rank_distance:,.1f}\n"
    )
    return results


def evaluate_before(towers: Towers, config: Config, world: World, log: RunLog) -> Results | None:
    """The evaluation of the untrained model; a resumed run takes it from where it was written."""
    written = log.run / "evaluation-before.json"
    if not config.eval.before:
        return None
    if config.train.resume and written.is_file():
        return Results.from_json(written.read_text(encoding="utf-8"))
    return evaluate_model(towers, config, world, log, BEFORE)


def before_and_after(before: Results | None, after: Results | None, run: Path) -> dict[str, Path]:
    """Write evaluation.json, .md and .png, print the table; returns the paths by what they are."""
    if after is None:
        return {}
    if before is not None:
        print("\nmAP on " + after.task + "\n\n" + comparison(before, after), flush=True)
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
    (folder / "README.md").write_text(
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

model = SentenceTransformer("{folder}")
queries = model.encode(["..."], prompt_name="query")
passages = model.encode(["..."], prompt_name="passage")
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
        encoding="utf-8",
    )
