"""What a run is about to learn from, before its first step: in the log, in `plan`, on the run's page, and as JSON.

Most of what goes wrong in training is seen here: rows that were left out, texts that were cut, a tokenizer that does
not know a script, a prompt that the model was not trained with, languages that no batch brings together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hbt_fast.data.counts import DrawCounts
from hbt_fast.data.tokens_seen import FIRST, tokens_seen
from hbt_fast.prepare import texts_by_language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hbt_fast.data.plan import BatchPlanner
    from hbt_fast.data.store import SourceStore, Store
    from hbt_fast.data.tokens_seen import TokensSeen
    from hbt_fast.encoder.prompts import Prompts

STEPS, PAIRS = 40, 200_000  # of which language pairs are counted, at most
SHOWN, CHARACTERS = 12, 300  # languages and pairs, and characters of an example, that are put in words


def overview(
    prompts: Prompts,
    store: Store,
    tokenizer: PreTrainedTokenizerFast,
    planner: BatchPlanner,
) -> dict:
    """What there is to learn from (JSON).

    Args:
        prompts: that were chosen.
        store: the token store.
        tokenizer: that its texts were made with.
        planner: of the batches.
    """
    return {
        "prompts": {
            prompt.kind: {"text": prompt.text, "from": prompt.source, "hint": prompt.hint}
            for prompt in (prompts.query, prompts.passage)
        },
        "tokenizer": {
            "kind": f"{type(tokenizer).__name__}, {type(tokenizer.backend_tokenizer.model).__name__}",
            "size": len(tokenizer),
        },
        "sources": [_source(source, tokens_seen(source, tokenizer)) for source in store.sources],
        "examples": _examples(store, tokenizer),
        "language pairs": _pairs(store, planner),
        "not used": _not_used(store, planner),
    }


def _not_used(store: Store, planner: BatchPlanner) -> list[str]:
    """Settings that ask for what does not come, and data that no setting asks for."""
    batch = planner.batch
    said, default = [], type(batch)()
    counts = zip(store.sources, planner.hard_negatives, strict=True)
    if unused := [source.name for source, number in counts if len(source.negative_texts) and not number]:
        said.append(f"the hard negatives of {', '.join(unused)}, for batch.hard_negatives is 0")
    if batch.hard_negatives and not any(len(source.negative_texts) for source in store.sources):
        said.append(f"batch.hard_negatives is {batch.hard_negatives}, and the data has none")
    for source, number in zip(store.sources, store.hard_negatives, strict=False):
        if number and not len(source.negative_texts):
            said.append(f"hard_negatives of source {source.name} is {number}, and it has none")
    if batch.strategy != "hybrid":
        for name in ("alpha", "alpha_end"):
            if (value := getattr(batch, name)) != getattr(default, name):
                said.append(f"batch.{name} is {value:g}, which batch.strategy {batch.strategy} does not use")
    return said


def _source(source: SourceStore, seen: list[TokensSeen]) -> dict:
    """Rows that were read, kept and left out, and the texts by language, the first of which were looked at."""
    queries, passages = (texts_by_language(source, f) for f in (source.field_queries, source.field_passages))
    languages = {}
    for code, asked, answered in sorted(zip(source.languages, queries, passages, strict=True)):
        languages[code] = {"queries": asked, "passages": answered}
    for one in seen:
        languages[one.language]["first"] = {
            "queries": one.queries,
            "passages": one.passages,
            "unknown tokens": round(one.unknown_share, 5),
            "cut queries": one.cut_queries,
            "cut passages": one.cut_passages,
        }
    return {
        "name": source.name,
        "read": source.read,
        "kept": source.rows,
        "left out": source.left_out,
        "left out by language": {
            code: lost
            for code, found in source.read_by_language.items()
            if (lost := {reason: count for reason, count in found.items() if reason != "read"})
        },
        "layouts": list(source.layouts),
        "contents": source.contents,
        "prompts": [role.prompt for role in source.roles],
        "hard negatives": len(source.negative_texts),
        "languages": languages,
    }


def _examples(store: Store, tokenizer: PreTrainedTokenizerFast) -> dict:
    """The first row's query and passage, as the model sees them."""
    source = store.sources[0]
    examples = {}
    for kind, fields in (("query", source.field_queries), ("passage", source.field_passages)):
        place = int(np.flatnonzero(fields[: 1 << 16] >= 0)[0])
        language = source.languages[source.field_languages[place % len(source.field_languages)]]
        seen = tokenizer.decode(source.text_tokens(fields[place]), skip_special_tokens=False)
        examples[kind] = {"language": language, "text": seen}
    return examples


def _pairs(store: Store, planner: BatchPlanner) -> dict:
    """Which languages batches bring together, in some steps that are spread over the run."""
    steps = planner.steps or 1
    count = max(min(STEPS, steps, PAIRS // planner.batch.size), 1)
    counts = DrawCounts(store)
    for step in np.unique(np.linspace(0, steps - 1, count).astype(int)).tolist():
        counts.add(planner.plan(step))
    total = int(counts.pairs.sum())
    return {"steps": count, "share": {f"{a}-{b}": round(found / total, 5) for a, b, found in counts.by_pair()}}


def in_words(found: dict) -> str:
    """An overview for people.

    Args:
        found: by `overview`.
    """
    if not found:
        return ""
    lines = []
    for kind, prompt in found["prompts"].items():
        hint = f"; {prompt['hint']}" if prompt["hint"] else ""
        lines.append(f"{kind} prompt {prompt['text']!r} ({prompt['from']}{hint})")
    lines.append(f"tokenizer: {found['tokenizer']['kind']}, {found['tokenizer']['size']:,} tokens")
    for source in found["sources"]:
        lines += _source_in_words(source, [prompt["text"] for prompt in found["prompts"].values()])
    for kind, example in found["examples"].items():
        text = example["text"]
        cut = "" if len(text) <= CHARACTERS else " ..."
        lines.append(f"a {kind} as the model sees it ({example['language']}): {text[:CHARACTERS]}{cut}")
    pairs = found["language pairs"]
    shares = [f"{pair} {share:.1%}" for pair, share in pairs["share"].items()]
    lines += [f"not used: {text}" for text in found["not used"]]
    lines.append(f"language pairs, query-passage, of {pairs['steps']:,} steps: {_some(shares)}")
    return "\n".join(lines)


def _source_in_words(source: dict, prompts: list[str]) -> list[str]:
    said = f"{source['name']}: {source['kept']:,} of {source['read']:,} rows"
    by_reason: dict[str, list[str]] = {reason: [] for reason in source["left out"]}
    for code, lost in source["left out by language"].items():
        for reason, count in lost.items():
            by_reason.setdefault(reason, []).append(f"{code} {count:,}")
    reasons = []
    for reason, languages in by_reason.items():
        rows, where = source["left out"].get(reason, 0), f" ({_some(languages)})" if languages else ""
        reasons.append(f"{rows:,} row{'s' * (rows != 1)} {reason}{where}" if rows else f"texts {reason}{where}")
    said += f"; left out: {'; '.join(reasons)}" if reasons else ""
    layouts = []
    for layout in source["layouts"]:
        layouts.append(f"  read as {layout['layout']}: {_some(layout['read'])}")
        if layout["not read"]:
            layouts[-1] += f"; not read: {_some(layout['not read'])}"
        for name, count in layout.get("not above 0", {}).items():
            layouts[-1] += f"; {name} is 0 or below in {count:,} of the first rows, which count as answers, too"
        if (found := [name for name in layout["not read"] if "neg" in name.lower()]) and not source["hard negatives"]:
            layouts[-1] += f"; hard negatives, perhaps? Set the source's fields: {{negatives: {found[0]}}}"
    if source["prompts"] != prompts:
        layouts.append("  prompts of its own: query {!r}, passage {!r}".format(*source["prompts"]))
    if source["hard negatives"]:
        said += f"; {source['hard negatives'] / source['kept']:.1f} hard negatives a row"
    languages, unknown, cut = [], [], []
    for code, texts in source["languages"].items():
        if texts["queries"] or texts["passages"]:
            languages.append(f"{code} {texts['queries']:,}/{texts['passages']:,}")
        if first := texts.get("first"):
            if first["unknown tokens"] >= 0.0005:
                unknown.append(f"{code} {first['unknown tokens']:.1%}")
            if first["cut queries"] or first["cut passages"]:
                cut.append(f"{code} {first['cut queries']:,}/{first['cut passages']:,}")
    looked = f"unknown tokens: {_some(unknown) or 'none'}; at the length limit: {_some(cut) or 'none'}"
    return [said, *layouts, f"  queries/passages: {_some(languages)}", f"  of the first {FIRST:,} of each: {looked}"]


def _some(parts: list[str]) -> str:
    more = f" and {len(parts) - SHOWN:,} more (the JSON has all)" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more
