"""What a tokenizer makes of the training texts: the share of unknown tokens, and texts cut at the length limit.

Counted from the token store, per source and language, in the first texts of each: a tokenizer that does not know a
language's script turns it into unknown tokens, and a model that trains on these learns nothing, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hbt_fast.data.rows import DataError
from hbt_fast.data.store import SourceStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST = 1000  # queries and as many passages of each language
FEW = 50  # tokens: of fewer nothing is refused
SAID, REFUSED = 0.05, 0.5  # shares of unknown tokens: tokenizers that fit a language stay below 1 %
BLOCK = 1 << 20  # fields looked at at a time


@dataclass(frozen=True)
class TokensSeen:
    """What was seen of the first texts of one language in one source.

    Attributes:
        source: its name.
        language: code.
        queries: texts looked at, at most `FIRST`.
        passages: the same.
        tokens: of these texts, without prompts and special tokens.
        unknown: of these tokens, those that the tokenizer does not know; a text of which nothing is left counts as one.
        cut_queries: texts as long as the limit: cut there, or just short enough.
        cut_passages: the same.
    """

    source: str
    language: str
    queries: int
    passages: int
    tokens: int
    unknown: int
    cut_queries: int
    cut_passages: int

    @property
    def unknown_share(self) -> float:
        """The share of unknown tokens, 0 to 1."""
        return self.unknown / self.tokens if self.tokens else 0.0


def tokens_seen(source: SourceStore, tokenizer: PreTrainedTokenizerFast) -> list[TokensSeen]:
    """Look at the first texts of each language of a source; nothing is tokenised again.

    Args:
        source: what was tokenised.
        tokenizer: by which.

    Returns:
        one per language that has texts, sorted by code.
    """
    unknown = _unknown_token(tokenizer)
    ignored = np.array(sorted(set(tokenizer.all_special_ids) - {unknown}), np.int32)
    found = []
    texts = [_first_texts(source, fields) for fields in (source.field_queries, source.field_passages)]
    prompts = [tokenizer(role.prompt, add_special_tokens=False)["input_ids"] for role in source.roles]
    for number, code in sorted(enumerate(source.languages), key=lambda pair: pair[1]):
        tokens = unknowns = 0
        cut = []
        for role, prompt, first in zip(source.roles, prompts, texts, strict=True):
            cut.append(0)
            for text in first[number]:
                ids = source.text_tokens(text)
                cut[-1] += len(ids) >= role.max_length
                own = len(ids) - int(np.isin(ids, ignored).sum()) - len(prompt)
                tokens += max(own, 1)
                here = int((ids == unknown).sum()) - prompt.count(unknown)
                unknowns += min(max(here, 0), own) if own > 0 else 1
        counts = [len(first[number]) for first in texts]
        if any(counts):
            found.append(TokensSeen(source.name, code, *counts, tokens, unknowns, *cut))
    return found


def check_unknown(seen: Iterable[TokensSeen], model: str | None) -> list[str]:
    """Lines that say where many tokens are unknown.

    Args:
        seen: of all sources.
        model: whose tokenizer it is; None: of an encoder from nothing.

    Raises:
        DataError: of a language half of the tokens or more are unknown.
    """
    lines = []
    for one in seen:
        share = (
            f"{one.unknown_share:.0%} of the tokens of language {one.language!r} in source {one.source!r} are unknown"
        )
        if one.unknown_share >= REFUSED and one.tokens >= FEW:
            instead = (
                "raise model.scratch.vocabulary, so that its characters have tokens"
                if model is None
                else f"take a model.path whose tokenizer knows the language (that of {model} does not)"
            )
            raise DataError(
                f"{share} to the tokenizer, and nothing can be learned from them; {instead}, or leave the "
                "language out by data.languages"
            )
        if one.unknown_share >= SAID:
            lines.append(f"{share} to the tokenizer: it hardly fits this language")
    return lines


def _first_texts(source: SourceStore, fields: np.ndarray) -> list[list[int]]:
    """The numbers of the first different texts in a role, per language number."""
    found: list[dict[int, None]] = [{} for _ in source.languages]
    for start in range(0, len(fields), BLOCK):
        block = np.asarray(fields[start : start + BLOCK])
        languages = source.field_languages[np.arange(start, start + len(block)) % len(source.field_languages)]
        for number, texts in enumerate(found):
            if len(texts) < FIRST:
                here = block[(languages == number) & (block >= 0)]
                for text in dict.fromkeys(here[: 4 * FIRST].tolist()):
                    if len(texts) < FIRST:
                        texts[text] = None
        if all(len(texts) >= FIRST for texts in found):
            break
    return [list(texts) for texts in found]


def _unknown_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token of what the tokenizer does not know; -1 where there is none, as in those that fall back to bytes.

    Some of these name the end of a text as their unknown token, which is in every text and stands for nothing.
    """
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
    unknown = tokenizer.unk_token_id
    if unknown is None:
        name = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
        unknown = None if name is None else tokenizer.backend_tokenizer.token_to_id(name)
    return -1 if unknown is None or unknown in ends else unknown
