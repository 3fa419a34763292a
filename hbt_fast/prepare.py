"""Prepare the data: read the sources and write the token store (and, for a model from nothing, its tokenizer).

python -m hbt_fast.prepare --config configs/demo.yaml
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from hbt_fast.base.files import whole_folder
from hbt_fast.base.programs import program
from hbt_fast.config import Config, ModelConfig, parse
from hbt_fast.data.build import build_source, tokenizer_options
from hbt_fast.data.problems import Tally
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, input_files, read_source
from hbt_fast.data.store import FORMAT, Role, SourceStore, Store
from hbt_fast.data.tokens_seen import check_unknown, tokens_seen
from hbt_fast.encoder.load import load_tokenizer
from hbt_fast.encoder.prompts import Prompts, choose_prompts
from hbt_fast.encoder.scratch import train_tokenizer
from hbt_fast.engine.launch import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BLOCK = 1 << 22  # elements of an array looked at at a time
OF_ALL = ("weight", "prompts", "hard_negatives")  # settings that sources of one name share


@program("hbt_fast.prepare")
def main(arguments: list[str] | None = None) -> None:
    """Prepare from the command line and say what is there."""
    config, prompts = resolve(parse("hbt_fast.prepare", __doc__.splitlines()[0], arguments))
    print("\n".join(prompts.lines), flush=True)
    store, _ = prepare(config)
    print(summary(store))


def resolve(config: Config) -> tuple[Config, Prompts]:
    """The settings with the prompts that stand before texts, in place of null; and where they are from.

    Raises:
        EncoderError: what the checkpoint records cannot be read.
    """
    model = config.model
    given = {"query": model.query_prompt, "passage": model.passage_prompt}
    prompts = choose_prompts(model.path, given, by="model.{kind}_prompt")
    query, passage = prompts.texts
    return replace(config, model=replace(model, query_prompt=query, passage_prompt=passage)), prompts


def prepare(config: Config, world: World | None = None) -> tuple[Store, PreTrainedTokenizerFast]:
    """The token store of a configuration and its tokenizer, found or made.

    Every source is a folder of its own under data.store_dir: what changes one source leaves the others as they are.
    Of several ranks the first makes them, then the first of each machine, in case its disk is another; all others wait.

    Returns:
        (store, tokenizer).

    Raises:
        DataError: see `read_source` and `build_source`; sources of one name with different weights; a language that
            the tokenizer does not know.
    """
    config, _ = resolve(config)
    turn = 0 if world is None or world.first else 1 if world.local == 0 else 2
    for now in range(1 if world is None else 3):
        if now == turn:
            tokenizer = _tokenizer(config)
            store = _store(config, tokenizer, verify=turn < 2)
            if turn == 0:
                _check_tokens(config, store, tokenizer)
        if world is not None:
            world.barrier()
    return store, tokenizer


def _groups(config: Config) -> dict[str, list[Source]]:
    """The sources by name: those of one name are one."""
    if not config.data.sources:
        raise DataError("data.sources is empty; name at least one source")
    groups: dict[str, list[Source]] = {}
    for source in config.data.sources:
        groups.setdefault(source_name(source), []).append(source)
    for name, group in groups.items():
        for setting in OF_ALL:
            found = [getattr(source, setting) for source in group]
            if any(value != found[0] for value in found):
                raise DataError(
                    f"data.sources: those named {name!r} are one source, but their {setting} differs: "
                    f"{', '.join(map(str, found))}; write one, or other names"
                )
    return groups


def _inputs(config: Config, group: Iterable[Source]) -> list[object]:
    """Everything that the rows of a group of sources are a function of."""
    data = config.data
    parts: list[object] = [FORMAT, data.languages, data.on_error]
    if data.on_error == "skip":  # elsewhere they end the run, and change no row
        parts += [data.longest_line, data.longest_text]
    for source in group:
        parts += [replace(source, weight=None, hard_negatives=None), *input_files(source)]
    return parts


def rows_of(config: Config, group: Iterable[Source], tally: Tally) -> Iterator[Row]:
    """The rows of a group of sources, as the settings want them.

    Args:
        config: its data settings.
        group: read one after the other.
        tally: gets what is read and left out.

    Raises:
        DataError: see `read_source`.
    """
    data = config.data
    languages, limits = tuple(data.languages) if data.languages else None, (data.longest_line, data.longest_text)
    for source in group:
        yield from read_source(
            source, languages, data.on_error, tally=tally, longest_line=limits[0], longest_text=limits[1]
        )


def _tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The checkpoint's tokenizer, or one trained on the data and kept beside the stores."""
    model = config.model
    if model.path is not None:
        return load_tokenizer(model.path)
    prompts = model.query_prompt, model.passage_prompt
    name = fingerprint([*_inputs(config, config.data.sources), model.scratch.vocabulary, *prompts])
    folder = Path(config.data.store_dir) / f"tokenizer-{name}"
    if not all((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        print(f"training a tokenizer of {model.scratch.vocabulary:,} tokens", flush=True)
        made = train_tokenizer(texts_of(config, negatives=False), model.scratch.vocabulary)
        if len(made) < model.scratch.vocabulary:
            print(f"it has {len(made):,} tokens: there is no text to make more of", flush=True)
        with whole_folder(folder) as begun:
            made.save_pretrained(begun)
    return load_tokenizer(folder)


def texts_of(config: Config, negatives: bool = True) -> Iterator[str]:
    """The texts of the sources, with their prompts.

    Args:
        config: the settings, prompts resolved.
        negatives: hard negatives, too.
    """
    for group in _groups(config).values():
        rows, (query, passage) = _with_roles(config, group, Tally())
        for row in rows:
            yield from (query.prompt + text for text in row.queries.values())
            yield from (passage.prompt + text for text in row.passages.values())
            if negatives:
                yield from (passage.prompt + text for texts in row.negatives.values() for text in texts)


def _with_roles(config: Config, group: list[Source], tally: Tally) -> tuple[Iterator[Row], tuple[Role, Role]]:
    """The rows of a group of sources, and how they are written: its own prompts, those of its records, or of all."""
    rows = rows_of(config, group, tally)
    given, (query, passage) = group[0].prompts, roles(config.model)
    if "query" not in given and (first := next(rows, None)) is not None:
        rows = _of_one_prompt(chain([first], rows), first.prompt)
        given = given if first.prompt is None else {**given, "query": first.prompt}
    return rows, (
        replace(query, prompt=given.get("query", query.prompt)),
        replace(passage, prompt=given.get("passage", passage.prompt)),
    )


def _of_one_prompt(rows: Iterable[Row], prompt: str | None) -> Iterator[Row]:
    """The rows; see that their records name one prompt."""
    for row in rows:
        if row.prompt != prompt:
            raise DataError(
                f"{row.where}: its prompt is {row.prompt!r}, that of the rows before it {prompt!r}, and a source has "
                "one. Write a file for each prompt, or set the source's prompts: {query: ...}, which stands before all"
            )
        yield row


def _store(config: Config, tokenizer: PreTrainedTokenizerFast, verify: bool) -> Store:
    """The sources' stores, found or built."""
    made, weights, made_of = [], [], []
    for name, group in _groups(config).items():
        parts = [name, *_inputs(config, group), *roles(config.model), *tokenizer_parts(tokenizer)]
        contents = xxhash.xxh3_128()
        folder = Path(config.data.store_dir) / f"source-{fingerprint(parts, contents)}"
        if folder.is_dir():
            made.append(SourceStore.open(folder, verify=verify))
        else:
            (rows, own), skip = _with_roles(config, group, tally := Tally()), config.data.on_error == "skip"
            made.append(build_source(folder, name, rows, tokenizer, *own, tally=tally, skip=skip))
        if (listing := folder / "skipped.txt").exists() and verify:  # of an earlier run, too
            count = listing.read_text(encoding="utf-8").count("\n")
            print(f"{count:,} malformed rows left out (data.on_error: skip), listed in {listing}", flush=True)
        weights.append(group[0].weight)
        settings = [asdict(replace(source, weight=None, hard_negatives=None)) for source in group]
        made_of.append(
            {
                "contents of files": contents.hexdigest()[:16],
                "source": settings[0] if len(settings) == 1 else settings,
                "languages": config.data.languages,
                "on_error": config.data.on_error,
                "query": asdict(made[-1].roles[0]),
                "passage": asdict(made[-1].roles[1]),
                "tokenizer": fingerprint(tokenizer_parts(tokenizer)),
                "store": fingerprint([folder / "source.json"]),  # which has the checksums of the arrays
            }
        )
    hard_negatives = tuple(group[0].hard_negatives for group in _groups(config).values())
    return Store(tuple(made), tuple(weights), tuple(made_of), hard_negatives)


def _check_tokens(config: Config, store: Store, tokenizer: PreTrainedTokenizerFast) -> None:
    """Say where the tokenizer hardly knows a language, and refuse where it does not."""
    seen = [one for source in store.sources for one in tokens_seen(source, tokenizer)]
    for line in check_unknown(seen, config.model.path):
        print(line, flush=True)


def roles(model: ModelConfig) -> tuple[Role, Role]:
    """How queries and passages are written, by settings that `resolve` gave."""
    return Role(model.query_prompt, model.query_max_length), Role(model.passage_prompt, model.passage_max_length)


def tokenizer_parts(tokenizer: PreTrainedTokenizerFast) -> list[object]:
    """What token ids depend on; not the truncation and padding that earlier calls left set."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core.pop("truncation", None)
    core.pop("padding", None)
    return [json.dumps(core), tokenizer_options(tokenizer)]


def fingerprint(parts: Iterable[object], contents: xxhash.xxh3_128 | None = None) -> str:
    """A short hash of settings (anything with a stable repr) and of the contents of files (given as Path).

    Args:
        parts: what is hashed.
        contents: a state that gets the contents of the files alone.
    """
    state = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 22):
                    state.update(block)
                    if contents is not None:
                        contents.update(block)
        else:
            state.update(repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()[:16]


def source_name(source: Source) -> str:
    """What reports call a source."""
    return source.name or Path(source.path or next(iter(source.files.values()))).stem


def summary(store: Store) -> str:
    """Rows, contents, texts and tokens of a store, per source and language, as text."""
    lengths = np.zeros(1, np.int64)  # how many texts have so many tokens
    for source in store.sources:
        for start in range(0, source.texts, BLOCK):
            found = np.bincount(np.diff(source.token_offsets[start : start + BLOCK + 1]), minlength=len(lengths))
            found[: len(lengths)] += lengths
            lengths = found
    texts, tokens = int(lengths.sum()), sum(len(source.tokens) for source in store.sources)
    median = int(np.searchsorted(lengths.cumsum(), (texts + 1) // 2))
    lines = [
        f"{store.rows:,} rows, {sum(source.contents for source in store.sources):,} contents, {texts:,} texts, "
        f"{tokens:,} tokens (median {median}, longest {len(lengths) - 1} per text)",
        "",
        f"{'source':<20} {'rows':>10}  languages (texts as query / as passage)",
    ]
    for source in store.sources:
        queries, passages = (texts_by_language(source, f) for f in (source.field_queries, source.field_passages))
        counts = sorted(zip(source.languages, queries, passages, strict=True))
        shown = ", ".join(f"{code} {asked:,}/{answered:,}" for code, asked, answered in counts if asked or answered)
        lines += [f"{source.name:<20} {source.rows:>10,}  {shown}", f"{'':<20} {'':>10}  {source.folder}"]
    return "\n".join(lines)


def texts_by_language(source: SourceStore, fields: np.ndarray) -> list[int]:
    """How many of a source's fields hold a text, by language number."""
    counts = np.zeros(len(source.languages), np.int64)
    for start in range(0, len(fields), BLOCK):
        block = fields[start : start + BLOCK]
        places = np.arange(start, start + len(block)) % len(source.field_languages)
        counts += np.bincount(source.field_languages[places][block >= 0], minlength=len(counts))
    return counts.tolist()


if __name__ == "__main__":
    main()
