"""Cut a model's vocabulary to the tokens that your texts use, and put the trained rows back into the whole model.

python -m hbt_fast.vocabulary cut --model FOLDER_OR_NAME --config FILE.yaml --out small
python -m hbt_fast.vocabulary restore --model runs/hbt/model --full FOLDER_OR_NAME --out whole

Texts of the data get the same tokens, and so the same vectors, from the model that was cut; every one is tokenised by
both to see it. Other texts get tokens too, but more and shorter ones: no character becomes unknown that was not.
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from hbt_fast.base.files import whole_folder
from hbt_fast.base.programs import program
from hbt_fast.encode import at_least_one, texts_of
from hbt_fast.encoder.model import EncoderError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from hbt_fast.config import Config

PROGRAM = "hbt_fast.vocabulary"
AT_ONCE = 1 << 20  # characters that are tokenised at a time
BYTES = 16  # of a parameter in training: float32 weight, gradient and AdamW's two moments


class Compared(NamedTuple):
    """What became of the texts.

    Attributes:
        texts: how many there are, with each of the prompts.
        others: texts that have other tokens now.
        more: tokens that these have more than before.
        unknown: unknown tokens that there are more than before.
        first: the first of these texts.
    """

    texts: int = 0
    others: int = 0
    more: int = 0
    unknown: int = 0
    first: str = ""


@program(PROGRAM)
def main(arguments: Sequence[str] | None = None) -> None:
    """Cut or restore from the command line, and say what became of it."""
    options, others = _parser().parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    out = Path(options.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise EncoderError(f"--out is {out}, which is there and not empty; name another folder")
    if options.what == "restore":
        if others:
            raise EncoderError(f"{others[0]}: restore has no such option; --help lists them")
        print(restore(options.model, options.full, out))
        return
    config = _config(others, options.model) if others else None
    if config is None and not options.texts:
        raise EncoderError("which texts? Give the settings of the run (--config FILE.yaml) or files (--texts FILE ...)")
    model = options.model or (config and config.model.path)
    if not model:
        raise EncoderError("which model is cut? Give --model FOLDER_OR_NAME")
    prompts = _prompts(options, config, model)

    def texts() -> Iterator[str]:
        yield from () if config is None else _texts_of_run(config)
        for text in texts_of(options.texts or (), options.field):
            yield from (prompt + text for prompt in prompts)

    print(cut(model, out, texts, options.min_count))


def cut(model: str, out: Path, texts: Callable[[], Iterator[str]], min_count: int = 1) -> str:
    """Write the folder of a model that has the tokens of texts alone.

    Args:
        model: folder or hub name.
        out: the folder to write; not there, or empty.
        texts: gives the texts, with their prompts; is called twice.
        min_count: a token stays if the texts have it so many times.

    Returns:
        a summary.

    Raises:
        EncoderError: the model cannot be cut, there is no text, or with min_count 1 a text would get other tokens.
        FileError: the folder cannot be written.
    """
    from hbt_fast.encoder.cut import write_cut
    from hbt_fast.encoder.load import load_tokenizer
    from hbt_fast.encoder.modules import read_recorded
    from hbt_fast.encoder.per_token import read_layout
    from hbt_fast.encoder.vocabulary import always_kept, check_core, names_by_id, with_parts

    tokenizer = load_tokenizer(model)
    whole = _plain(tokenizer)
    core = json.loads(whole.to_str())
    check_core(core, model)
    read_recorded(model)  # modules that are not supported are told now rather than when the folder is loaded
    layout, names = read_layout(model), names_by_id(core)
    counts_V, hashes = _count(texts(), whole, core, layout.rows)
    if not counts_V.any():
        raise EncoderError("there is no text to keep the tokens of; name other files or sources")
    used = set(np.flatnonzero(counts_V >= min_count).tolist())
    stay = always_kept(core) | layout.special_ids | set(range(layout.fixed))
    old_k = np.array(with_parts(core, (used | stay) & names.keys()), np.int64)
    with whole_folder(out) as begun:
        before, after = write_cut(model, begun, tokenizer, core, layout, old_k)
        made = load_tokenizer(begun)
        _check_names(made, names, old_k, model)
        compared = _compare(texts(), hashes, whole, _plain(made), old_k, made.unk_token_id)
        if compared.others and min_count == 1:
            raise EncoderError(
                f"{model}: its tokenizer cannot be cut: {compared.others:,} of {compared.texts:,} texts would get "
                f"other tokens, the first is {compared.first[:60]!r}; use the model whole"
            )
    saved = BYTES * (before - after) / 1e9
    return "\n".join(
        [
            f"{out}: {len(old_k):,} of {len(names):,} tokens are kept: {len(used):,} that the texts use, "
            f"{len(old_k) - len(used & set(old_k.tolist())):,} others (special, single characters, parts)",
            f"{before / 1e6:,.1f} M parameters become {after / 1e6:,.1f} M; weights, gradients and AdamW's moments "
            f"take {saved:,.2f} GB less",
            _said(compared, int(counts_V.sum())),
        ]
    )


def restore(model: str, full: str, out: Path) -> str:
    """Write the whole model with the rows, and all else, of one that was cut from it and trained.

    Args:
        model: folder of the trained one.
        full: the model that was cut, folder or hub name.
        out: the folder to write; not there, or empty.

    Returns:
        a summary.

    Raises:
        EncoderError: the two do not belong together, or one of them cannot be read.
        FileError: the folder cannot be written.
    """
    from hbt_fast.encoder.cut import write_restored
    from hbt_fast.encoder.load import load_tokenizer

    tokenizers = load_tokenizer(model), load_tokenizer(full)
    core = json.loads(_plain(tokenizers[1]).to_str())
    with whole_folder(out) as begun:
        rows = write_restored(model, full, begun, core, tokenizers)
    return f"{out}: {len(tokenizers[1]):,} tokens, of which {rows:,} have the rows of {model} and the others theirs"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="what", required=True)
    own = commands.add_parser("cut", help="write a model with the tokens of your texts alone", allow_abbrev=False)
    own.add_argument("--model", metavar="MODEL", help="folder or hub name of the whole model (default: model.path)")
    own.add_argument("--out", required=True, metavar="FOLDER", help="where the small model goes")
    settings = "the settings of the run: the texts of its training sources and lexicons, with its prompts"
    own.add_argument_group("with --config FILE.yaml (and overrides, as data.languages=[de])", settings)
    files = "more texts, one a line, or JSON Lines with --field; may be .gz, a glob, or zip://MEMBER::ARCHIVE"
    own.add_argument("--texts", nargs="+", metavar="FILE", help=files)
    own.add_argument("--field", action="append", help="the files are JSON Lines, this field is the text; see encode")
    prompt = "before each text of --texts, may be given several times (default: those of the run, or of the model)"
    own.add_argument("--prompt", action="append", help=prompt)
    count = "keep a token if the texts have it so many times (default: 1); with more, some texts get other tokens"
    own.add_argument("--min_count", type=at_least_one, default=1, metavar="N", help=count)
    own = commands.add_parser("restore", help="put what was trained back into the whole model", allow_abbrev=False)
    own.add_argument("--model", required=True, metavar="FOLDER", help="the small model that was trained and exported")
    own.add_argument("--full", required=True, metavar="MODEL", help="folder or hub name of the model that was cut")
    own.add_argument("--out", required=True, metavar="FOLDER", help="where the whole model goes")
    return parser


def _config(others: Sequence[str], model: str | None) -> Config:
    from hbt_fast.config import parse
    from hbt_fast.prepare import resolve

    given = [] if model is None else [f"--model.path={model}"]
    config, _ = resolve(parse(PROGRAM, __doc__.splitlines()[0], [*others, *given]))
    return config


def _prompts(options: argparse.Namespace, config: Config | None, model: str) -> list[str]:
    """What to put before texts of files, each once. Without a prompt they are taken too."""
    from hbt_fast.encoder.modules import recorded_prompts

    if options.prompt:
        return list(dict.fromkeys(options.prompt))
    run = [] if config is None else [config.model.query_prompt, config.model.passage_prompt]
    return list(dict.fromkeys(["", *run, *recorded_prompts(model).named.values()]))


def _texts_of_run(config: Config) -> Iterator[str]:
    """The texts of a run's training sources, and the words of its lexicons."""
    from hbt_fast import prepare
    from hbt_fast.data.lexicon import _files
    from hbt_fast.data.reading import lines

    yield from prepare.texts_of(config)
    for path in config.batch.code_switch.lexicons:
        for file, _ in _files(path):
            yield from (" ".join(text.split()) for _, text in lines(file))


def _plain(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A tokenizer's core, which from now on neither cuts nor pads."""
    made = tokenizer.backend_tokenizer
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = tokenizer.split_special_tokens
    return made


def _tokenised(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[Iterator[tuple[str, int, list[int]]]]:
    """(text, how many times it is there, its tokens), some texts at a time, each once among these."""
    part, characters = Counter(), 0
    for text in chain(texts, [None]):
        if text is not None:
            characters += 0 if text in part else len(text)
            part[text] += 1
        if part and (text is None or characters >= AT_ONCE):
            encoded = tokenizer.encode_batch_fast(list(part))
            yield ((text, count, one.ids) for (text, count), one in zip(part.items(), encoded, strict=True))
            part, characters = Counter(), 0


def _count(texts: Iterator[str], tokenizer: Tokenizer, core: dict, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(V,) int64: how many times the texts have each token; and (n,) uint64: a hash of the tokens of each text."""
    from hbt_fast.encoder.vocabulary import matched_in_vain

    counts_V, hashes = np.zeros(rows, np.int64), array("Q")
    unknown = core["model"]["vocab"].get(core["model"]["unk_token"]) if core["model"]["type"] == "WordPiece" else None
    for part in _tokenised(texts, tokenizer):
        for text, count, ids in part:
            ids_T = np.array(ids, np.int64)
            hashes.append(xxhash.xxh3_64_intdigest(ids_T))
            np.add.at(counts_V, ids_T, count)
            if unknown is not None and unknown in ids:
                counts_V[list(matched_in_vain(core, tokenizer, text))] += count
    return counts_V, np.frombuffer(hashes, np.uint64)


def _check_names(made: PreTrainedTokenizerFast, names: dict[int, str], old_k: np.ndarray, model: str) -> None:
    """See that transformers loads the tokenizer with the ids that it was given."""
    wanted = {names[old]: new for new, old in enumerate(old_k.tolist())}
    if made.get_vocab() != wanted:
        raise EncoderError(
            f"{model}: its tokenizer cannot be cut: its added tokens are not the last ones, or a token is there twice; "
            "use the model whole"
        )


def _compare(
    texts: Iterator[str],
    hashes: np.ndarray,
    whole: Tokenizer,
    small: Tokenizer,
    old_k: np.ndarray,
    unknown: int | None,
) -> Compared:
    """Tokenise every text by the small tokenizer, and by both where that gives other tokens than before."""
    found, number = Compared(), 0
    for part in _tokenised(texts, small):
        for text, count, ids in part:
            now_T = old_k[np.array(ids, np.int64)]
            found = found._replace(texts=found.texts + count)
            if number >= len(hashes) or xxhash.xxh3_64_intdigest(now_T) != hashes[number]:
                was, now = whole.encode(text).ids, now_T.tolist()
                unk = None if unknown is None else int(old_k[unknown])
                found = found._replace(
                    others=found.others + count,
                    more=found.more + count * (len(now) - len(was)),
                    unknown=found.unknown + count * (now.count(unk) - was.count(unk)),
                    first=found.first or text,
                )
            number += 1
    return found


def _said(compared: Compared, tokens: int) -> str:
    texts = f"{compared.texts:,} texts ({tokens:,} tokens)"
    if not compared.others:
        return f"{texts} were tokenised again, and have the same tokens as before"
    return (
        f"{compared.others:,} of {texts} have other tokens than before: {compared.more:+,} tokens in all, "
        f"{compared.unknown:+,} of them unknown; the first: {compared.first[:60]!r}"
    )


if __name__ == "__main__":
    main()
