"""Which tokens of a tokenizer must stay so that given texts are tokenised as before, and the tokenizer of these alone.

A tokenizer is taken as the JSON of the tokenizers library ("core"). Its normaliser, pre-tokenizer, decoder and
post-processor stay; ids are numbered anew, in their old order. Why the texts' tokens stay the same, by kind of model:

Unigram    The best segmentation is still there, with its score, and every other one that is left was there before. The
           score of an unknown character follows from the lowest of all scores, so a piece that has this one stays.
BPE        Every merge that makes a token that stays, stays too, with its parts. So all merges on the way to the texts'
           tokens are there in their old order, and those that are gone were never made in these texts.
WordPiece  The longest match at each place of a word is still there. Of a word that ends as unknown the matches before
           the place at which it fails stay too (`matched_in_vain`): without them it might go another way and not fail.

In other texts no character becomes unknown that was not: every token of one character stays, the bytes of models that
fall back to bytes, and every token that has a character for which there is no token of one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hbt_fast.encoder.model import EncoderError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = ("Unigram", "BPE", "WordPiece")
Core = dict[str, Any]


def check_core(core: Core, where: str) -> None:
    """See that a tokenizer is of a kind that can be cut.

    Args:
        core: the tokenizer's JSON.
        where: names it in messages.

    Raises:
        EncoderError: it is of another kind, draws its tokens at random, or has a post-processor that is not known.
    """
    kind = core["model"]["type"]
    if kind not in KINDS:
        raise EncoderError(f"{where}: its tokenizer is a {kind} model; {', '.join(KINDS)} can be cut, so keep it whole")
    if core["model"].get("dropout"):
        raise EncoderError(
            f'{where}: its tokenizer draws merges at random ("dropout" in tokenizer.json), and a text has no tokens of '
            "its own; write null there"
        )
    for part in _processors(core):
        if part["type"] not in ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel"):
            raise EncoderError(f"{where}: its tokenizer has the post-processor {part['type']}, which is not supported")


def names_by_id(core: Core) -> dict[int, str]:
    """The tokens by id, added ones too."""
    vocabulary = core["model"]["vocab"]
    own = (
        enumerate(piece for piece, _ in vocabulary)
        if core["model"]["type"] == "Unigram"
        else ((number, name) for name, number in vocabulary.items())
    )
    return {**dict(own), **{token["id"]: token["content"] for token in core["added_tokens"]}}


def always_kept(core: Core) -> set[int]:
    """The ids that stay whatever the texts: added and unknown tokens, what is put around texts, and characters."""
    model, names = core["model"], names_by_id(core)
    kept = {token["id"] for token in core["added_tokens"]}
    numbers = {name: number for number, name in names.items()}
    for part in _processors(core):
        for special in part.get("special_tokens", {}).values():
            kept.update(special["ids"])
        kept.update(part[end][1] for end in ("sep", "cls") if end in part)
    if model["type"] == "Unigram":
        kept.update([] if model["unk_id"] is None else [model["unk_id"]])
        kept.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
    elif model["unk_token"] in numbers:
        kept.add(numbers[model["unk_token"]])
    if model.get("byte_fallback"):
        kept.update(numbers[name] for name in (f"<0x{byte:02X}>" for byte in range(256)) if name in numbers)
    for name, number in numbers.items():
        if number not in kept:
            characters = _characters(name, model)
            if len(characters) == 1 or not all(one in numbers for one in characters):
                kept.add(number)
    return kept


def with_parts(core: Core, kept: Collection[int]) -> list[int]:
    """The ids of `kept` and of all that BPE merges on the way to them, sorted.

    Args:
        core: the tokenizer's JSON.
        kept: ids that it has.
    """
    found = set(kept)
    if core["model"]["type"] != "BPE":
        return sorted(found)
    numbers, names = core["model"]["vocab"], names_by_id(core)
    merges: dict[str, list[tuple[str, str]]] = {}
    for pair in core["model"]["merges"]:
        merges.setdefault(_merged(pair, core["model"]), []).append(pair)
    left = [names[number] for number in found]
    while left:
        for part in (part for pair in merges.get(left.pop(), ()) for part in pair):
            if numbers[part] not in found:
                found.add(numbers[part])
                left.append(part)
    return sorted(found)


def cut_core(core: Core, kept: Iterable[int]) -> Core:
    """The tokenizer of the tokens that are kept.

    Args:
        core: the tokenizer's JSON.
        kept: (k,) old ids, ascending, closed under `with_parts` and with all of `always_kept`. The new ids are
            0 to k - 1, in their order.
    """
    new = {old: number for number, old in enumerate(kept)}
    model = dict(core["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    else:
        model["vocab"] = {name: new[number] for name, number in model["vocab"].items() if number in new}
    if model["type"] == "BPE":
        model["merges"] = [pair for pair in model["merges"] if _merged(pair, model) in model["vocab"]]
    added = [{**token, "id": new[token["id"]]} for token in core["added_tokens"]]
    return {**core, "model": model, "added_tokens": added, "post_processor": _renumbered(core["post_processor"], new)}


def matched_in_vain(core: Core, tokenizer: Tokenizer, text: str) -> set[int]:
    """Of a WordPiece model: the ids that match in words of a text before the place at which the word fails.

    Args:
        core: the tokenizer's JSON.
        tokenizer: the same; its normaliser and pre-tokenizer are used.
        text: one that has unknown tokens.
    """
    model, found = core["model"], set()
    if model["type"] != "WordPiece":
        return found
    normal = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    splitter = tokenizer.pre_tokenizer
    for word, _ in [(normal, None)] if splitter is None else splitter.pre_tokenize_str(normal):
        start, prefix = 0, ""
        while start < len(word) <= model["max_input_chars_per_word"]:
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in model["vocab"]), None)
            if end is None:
                break
            found.add(model["vocab"][prefix + word[start:end]])
            start, prefix = end, model["continuing_subword_prefix"]
    return found


def _merged(pair: tuple[str, str], model: Core) -> str:
    """The token that a merge makes."""
    return pair[0] + pair[1][len(model["continuing_subword_prefix"] or "") :]


def _characters(name: str, model: Core) -> list[str]:
    """A token as the tokens of one character that would stand for it: with the marks of their places in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    continues = bool(prefix) and name.startswith(prefix) and len(name) > len(prefix)
    ends = bool(suffix) and name.endswith(suffix) and len(name) > len(suffix)
    bare = list(name[len(prefix) * continues : len(name) - len(suffix) * ends])
    marked = [prefix + one if continues or place else one for place, one in enumerate(bare)]
    return [*marked[:-1], marked[-1] + suffix] if ends else marked


def _processors(core: Core) -> Iterator[dict]:
    """The post-processors, those of a sequence one by one."""
    left = [core["post_processor"]]
    while left:
        part = left.pop()
        if part is not None and part["type"] == "Sequence":
            left += part["processors"]
        elif part is not None:
            yield part


def _renumbered(part: dict | None, new: dict[int, int]) -> dict | None:
    """A post-processor with new ids."""
    if part is None:
        return None
    made = dict(part)
    if "processors" in part:
        made["processors"] = [_renumbered(one, new) for one in part["processors"]]
    if "special_tokens" in part:
        made["special_tokens"] = {
            name: {**special, "ids": [new[number] for number in special["ids"]]}
            for name, special in part["special_tokens"].items()
        }
    return made | {end: [part[end][0], new[part[end][1]]] for end in ("sep", "cls") if end in part}
