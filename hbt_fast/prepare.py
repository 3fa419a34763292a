"""Prepare the data: read the sources and write the token store (and, for a model from nothing, its tokenizer).

python -m hbt_fast.prepare --config configs/demo.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hbt_fast.config import Config, parse
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, input_files, read_source
from hbt_fast.data.store import FORMAT, Role, Store, build_store, fingerprint
from hbt_fast.encoder.model import EncoderError, load_tokenizer
from hbt_fast.encoder.scratch import train_tokenizer
from hbt_fast.engine.launch import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def main(arguments: list[str] | None = None) -> None:
    """Prepare from the command line and say what is there."""
    config = parse("hbt_fast.prepare", __doc__.splitlines()[0], arguments)
    try:
        store, _ = prepare(config)
    except (DataError, EncoderError) as error:
        print(f"hbt_fast.prepare: {error}", file=sys.stderr)
        sys.exit(2)
    print(summary(store))


def prepare(config: Config, world: World | None = None) -> tuple[Store, PreTrainedTokenizerFast]:
    """The token store of a configuration and its tokenizer, found or made; rank 0 makes it, the others wait.

    Returns:
        (store, tokenizer).

    Raises:
        DataError: see `read_source`.
    """
    if world is None or world.first:
        tokenizer = _tokenizer(config)
        store = _store(config, tokenizer)
    if world is not None:
        world.barrier()
        if not world.first:
            tokenizer = _tokenizer(config)
            store = _store(config, tokenizer)
    return store, tokenizer


def _inputs(config: Config) -> list[object]:
    """Everything that the rows are a function of."""
    data = config.data
    parts: list[object] = [FORMAT, data.languages, data.on_error]
    for source in data.sources:
        parts += [source, *input_files(source)]
    return parts


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer, or one trained on the data and kept beside the stores."""
    model = config.model
    if model.path is not None:
        return load_tokenizer(model.path)
    name = fingerprint([*_inputs(config), model.scratch.vocabulary, model.query_prompt, model.passage_prompt])
    folder = Path(config.data.store_dir) / f"tokenizer-{name}"
    if not (folder / "tokenizer.json").is_file():
        print(f"training a tokenizer of {model.scratch.vocabulary:,} tokens", flush=True)
        train_tokenizer(_texts(config), model.scratch.vocabulary).save_pretrained(folder)
    return load_tokenizer(folder)


def _texts(config: Config) -> Iterator[str]:
    for _, _, rows in _sources(config, []):
        for row in rows:
            yield from (config.model.query_prompt + text for text in row.queries.values())
            yield from (config.model.passage_prompt + text for text in row.passages.values())


def _sources(config: Config, skipped: list[str]) -> Iterator[tuple[str, float | None, Iterator[Row]]]:
    languages = tuple(config.data.languages) if config.data.languages else None
    for source in config.data.sources:
        yield source_name(source), source.weight, read_source(source, languages, config.data.on_error, skipped)


def _store(config: Config, tokenizer: PreTrainedTokenizerFast) -> Store:
    model = config.model
    query, passage = (
        Role(model.query_prompt, model.query_max_length),
        Role(model.passage_prompt, model.passage_max_length),
    )
    name = fingerprint([*_inputs(config), query, passage, tokenizer.backend_tokenizer.to_str()])
    folder = Path(config.data.store_dir) / f"store-{name}"
    if folder.is_dir():
        return Store.open(folder)
    skipped: list[str] = []
    store = build_store(folder, _sources(config, skipped), tokenizer, query, passage)
    if skipped:
        listing = folder / "skipped.txt"
        listing.write_text("\n".join(skipped) + "\n", encoding="utf-8")
        print(f"{len(skipped):,} malformed rows left out (data.on_error: skip), listed in {listing}", flush=True)
    return store


def source_name(source: Source) -> str:
    """What reports call a source."""
    return source.name or Path(source.path or next(iter(source.files.values()))).stem


def summary(store: Store) -> str:
    """Rows, contents, texts and tokens of a store, per source and language, as text."""
    lengths = np.diff(store.token_offsets)
    lines = [
        f"{store.folder}",
        f"{store.rows:,} rows, {store.row_contents.max() + 1:,} contents, {store.texts:,} distinct texts, "
        f"{len(store.tokens):,} tokens (median {np.median(lengths):.0f}, longest {lengths.max()} per text)",
        "",
        f"{'source':<20} {'rows':>10}  languages (texts as query / as passage)",
    ]
    row_of_field = np.repeat(np.arange(store.rows), np.diff(store.field_offsets))
    source_of_field = store.row_sources[row_of_field]
    for number, name in enumerate(store.sources):
        counts = []
        for n, code in enumerate(store.languages):
            here = (source_of_field == number) & (store.field_languages == n)
            if here.any():
                queries, passages = (store.field_queries[here] >= 0).sum(), (store.field_passages[here] >= 0).sum()
                counts.append(f"{code} {queries:,}/{passages:,}")
        lines.append(f"{name:<20} {int((store.row_sources == number).sum()):>10,}  {', '.join(counts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
