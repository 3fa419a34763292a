"""Which prompts stand before queries and passages, and where each is from: one choice for all programs.

What is given wins; else it is what the checkpoint records, else nothing. What a family of models is known to be trained
with is said and never put before a text unasked: a name is no proof of what a model has learned.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hbt_fast.encoder.model import EncoderError
from hbt_fast.encoder.modules import recorded_prompts

KINDS = ("query", "passage")
RECORDED = "recorded with the model"
SCRATCH = {"query": "Query: ", "passage": "Passage: "}  # of an encoder from nothing, as in arXiv 2408.10536
FAMILIES = [  # what model cards say, by a pattern in the name; the first that fits
    (r"e5.*(mistral|instruct)", "E5 instruct", "Instruct: <what is searched for>\nQuery: ", ""),
    (r"(^|[-_/])e5([-_]|$)", "E5", "query: ", "passage: "),
    (r"bge-.*-en", "BGE", "Represent this sentence for searching relevant passages: ", ""),
    (r"bge-.*-zh", "BGE", "为这个句子生成表示以用于检索相关文章：", ""),
    (r"arctic-embed.*v2", "Arctic Embed 2", "query: ", ""),
    (r"arctic-embed|mxbai-embed", "Arctic Embed", "Represent this sentence for searching relevant passages: ", ""),
    (r"nomic-embed", "Nomic Embed", "search_query: ", "search_document: "),
    (r"qwen3-embedding", "Qwen3 Embedding", "Instruct: <what is searched for>\nQuery:", ""),
    (r"embedding-?gemma", "EmbeddingGemma", "task: search result | query: ", "title: none | text: "),
]


class Prompt(NamedTuple):
    """A prompt that was chosen.

    Attributes:
        kind: "query" or "passage".
        text: put before every text; may be empty.
        source: where it is from, in a few words.
        hint: what the user may want to know besides; "" mostly.
    """

    kind: str
    text: str
    source: str
    hint: str = ""

    @property
    def line(self) -> str:
        """What programs say of it."""
        return f"{self.kind} prompt {self.text!r} ({self.source}{self.hint and '; '}{self.hint})"


@dataclass(frozen=True)
class Prompts:
    """The prompts that were chosen."""

    query: Prompt
    passage: Prompt

    @property
    def texts(self) -> tuple[str, str]:
        """Of queries and of passages."""
        return self.query.text, self.passage.text

    @property
    def lines(self) -> list[str]:
        """One for each, as every program says it."""
        return [self.query.line, self.passage.line]


def choose_prompts(
    model: str | None,
    given: Mapping[str, str | None],
    *,
    by: str | Mapping[str, str] = "command line",
    option: str = "model.{kind}_prompt",
    of: str | None = None,
) -> Prompts:
    """Choose the prompts of a model.

    Args:
        model: folder or hub name; None: an encoder from nothing.
        given: by the user, for "query" and "passage"; None: not.
        by: where what is given stands, for the line that says so: a text, in which {kind} may be, or one per prompt.
        option: what sets a prompt, for hints; may hold {kind}.
        of: take those that are recorded of a source that the model was trained on, by its name.

    Raises:
        EncoderError: what the checkpoint records cannot be read, or it records none of this source.
    """
    chosen = []
    recorded = None
    if of is not None:
        named, given = _of_source(model, of), {kind: text for kind, text in given.items() if text is not None}
        by = {kind: "command line" if kind in given else f"{RECORDED} for source {of}" for kind in KINDS}
        given = {**named, **given}
    for kind in KINDS:
        if (text := given.get(kind)) is not None:
            chosen.append(Prompt(kind, text, by.format(kind=kind) if isinstance(by, str) else by[kind]))
            continue
        if model is None:
            chosen.append(Prompt(kind, SCRATCH[kind], "of an encoder from nothing"))
            continue
        recorded = recorded_prompts(model) if recorded is None else recorded
        found = recorded.of(kind)
        source = "none is recorded with the model" if found is None else RECORDED
        hint = "" if found else _known(model, kind, option.format(kind=kind))
        chosen.append(Prompt(kind, found or "", source, hint))
    return Prompts(*chosen)


def name_of_source(source: str, kind: str) -> str:
    """What the prompt of a source is recorded as."""
    return f"{source} {kind}"


def _of_source(model: str | None, source: str) -> dict[str, str]:
    """The prompts that are recorded of a source."""
    named = {} if model is None else recorded_prompts(model).named
    found = {kind: named[name] for kind in KINDS if (name := name_of_source(source, kind)) in named}
    if not found:
        raise EncoderError(
            f"{model}: no prompts of a source {source!r} are recorded with it; there are {', '.join(named) or 'none'}"
        )
    return found


def _known(model: str, kind: str, option: str) -> str:
    """What the model cards of its family say, where its name tells the family and they say more than nothing."""
    name = "/".join(model.lower().rstrip("/").split("/")[-2:])
    for pattern, family, *texts in FAMILIES:
        if re.search(pattern, name):
            text = texts[KINDS.index(kind)]
            return f"{family} was trained with {text!r}: {option} sets it" if text else ""
    return ""
