"""Code-switching of batches: what the feed puts in place of the stored tokens, see `hbt_fast.data.code_switch`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from hbt_fast.data.build import tokenizer_options
from hbt_fast.data.code_switch import CodeSwitch, CodeSwitcher, check_switching
from hbt_fast.data.draws import draw, key_of
from hbt_fast.data.feed import QUERY
from hbt_fast.data.lexicon import Lexicon
from hbt_fast.data.rows import DataError
from hbt_fast.data.store import SourceStore, Store
from hbt_fast.data.tokenise import ChunkEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hbt_fast.data.plan import BatchPlan


class Switching:
    """Switches the texts of batches, a function of the seed, the step and the row: a `Rewrite` of the feed.

    Args:
        config: the settings, with at least one lexicon.
        store: whose texts.
        tokenizer: that made the store; a copy is used.
        seed: of the run.

    Attributes:
        unswitched: languages of the store of which the lexicons have no word: their texts stay as they are.
        identity: what, beside the settings, the switched texts depend on.

    Raises:
        DataError: no lexicon, none for any language of the store, or a setting out of range.
    """

    def __init__(
        self,
        config: CodeSwitch,
        store: Store,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seed: int,
    ) -> None:
        check_switching(config)
        lexicon = Lexicon.read(config.lexicons)
        self.config, self.store = config, store
        self.identity = {"lexicons' entries": lexicon.fingerprint}
        self.switcher = CodeSwitcher(config, lexicon, seed)
        self.known = {code: bool(set(lexicon.targets(code)) & set(self.switcher.allowed)) for code in store.languages}
        self.unswitched = tuple(code for code, known in self.known.items() if not known)
        if len(self.unswitched) == len(store.languages):
            raise DataError(
                f"batch.code_switch.lexicons: no word of the data's languages ({', '.join(store.languages)}) is in "
                f"them; they have {', '.join(lexicon.languages)}"
            )
        self.switcher.check([code for code in store.languages if self.known[code]])
        core, options = tokenizer.backend_tokenizer.to_str(), tokenizer_options(tokenizer)
        all_roles = {tuple((role.prompt, role.max_length) for role in source.roles) for source in store.sources}
        encoders = {roles: ChunkEncoder(core, options, roles) for roles in sorted(all_roles)}
        self.encoders = {
            source.name: encoders[tuple((role.prompt, role.max_length) for role in source.roles)]
            for source in store.sources
        }

    def __call__(
        self, plan: BatchPlan, source: SourceStore, texts: np.ndarray, roles: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The token ids of some texts of a batch, switched; see `hbt_fast.data.feed.Rewrite`."""
        is_query = roles == QUERY
        numbers = np.where(is_query, plan.query_languages[rows], plan.passage_languages[rows])
        codes = [self.store.languages[n] for n in numbers]
        wanted = np.where(is_query, self.config.queries, self.config.passages)
        chosen = [i for i in range(len(texts)) if wanted[i] and self.known[codes[i]]]
        keys = _keys(key_of(plan.step), plan.rows[rows], is_query, texts)
        before = [source.text(texts[i]) for i in chosen]
        after = self.switcher.switch(before, [codes[i] for i in chosen], keys[chosen].tolist())
        encoder = self.encoders[source.name]
        ids: list[np.ndarray | None] = [None] * len(texts)
        for role in (0, 1):
            mine = [k for k, i in enumerate(chosen) if is_query[i] == (role == 0) and after[k] != before[k]]
            for k, tokens in zip(mine, encoder.encode(role, [after[k] for k in mine]), strict=True):
                ids[chosen[k]] = np.array(tokens, np.int32)
        made = [source.text_tokens(texts[i]) if own is None else own for i, own in enumerate(ids)]
        return np.concatenate(made), np.cumsum([0, *map(len, made)])


@njit(cache=True, nogil=True)
def _keys(step: np.uint64, rows: np.ndarray, is_query: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(n,) int64 >= 0: what the draws of each text are a function of, beside the seed."""
    keys = np.empty(len(texts), np.int64)
    for i in range(len(texts)):
        keys[i] = np.int64(draw(draw(step, 2 * rows[i] + is_query[i]), texts[i]) >> np.uint64(1))
    return keys
