"""A task that mteb lacks: one pool of candidates in all languages, scored exactly, with the rank distance.

mteb scores the first 1,000 results of a query at most. mAP over the full ranking and rank distance (arXiv 2408.10536)
need the rank of every relevant candidate, so this task takes vectors from the model and counts (`ranks`); mteb's own
scores at its cut-offs stand beside them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mteb
import numpy as np
import xxhash
from datasets import Dataset
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol, ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.timing import TimingStack
from mteb.types import PromptType

from hbt_fast.evaluation.bias import language_bias
from hbt_fast.evaluation.metrics import per_query, summarise
from hbt_fast.evaluation.mteb_adapter import MTEBEncoder, best_by_id
from hbt_fast.evaluation.ranks import exact_ranks
from hbt_fast.evaluation.run import search_without

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mteb.models import MTEBModels

    from hbt_fast.evaluation.results import Results
    from hbt_fast.evaluation.tasks import RetrievalTask

METADATA = {
    "description": "Retrieval from one pool of candidates in all languages, where the answers in every language are "
    "relevant to a question (LAReQA, arXiv 2004.05484). mAP over the full ranking, and rank distance: the largest "
    "minus the smallest rank of a question's parallel answers.",
    "reference": "https://arxiv.org/abs/2408.10536",
    "type": "Retrieval",
    "category": "t2t",
    "modalities": ["text"],
    "eval_splits": ["test"],
    "main_score": "mul_map",
}


class MultilingualPoolRetrieval(AbsTaskRetrieval):
    """A `RetrievalTask` of this project as a task of mteb: `MultilingualPoolRetrieval(xquad_r("xquad-r"))`.

    Scores beside mteb's own: "mul_map" (the main score), "rank_distance", "mo_map" (query and pool in one language) and
    "cr_map" (pool in one other language), each the mean over query languages (over ordered language pairs), and
    mul_map_<language> and rank_distance_<language>; "accuracy_at_1" and "own_language_at_10" (share of the first ten
    results in the query's language) beside "pool_share". They are what `hbt_fast.evaluation.run.evaluate` gives.

    The model must be an encoder with cosine or inner product as its similarity.

    mteb shows kept results of a task without looking at its data, so a hash of them is part of the name.

    Args:
        source: the questions and candidates, as from `hbt_fast.evaluation.lareqa.xquad_r`.
        codes: mteb's codes for languages of `source` that mteb has no code for (it has those of XQuAD and MIRACL), as
            {"ca": "cat-Latn"}.
        options: of mteb's tasks, as seed.

    Raises:
        ValueError: a re-ranking task (its queries have pools of their own), a language without a code, or gains that
            are not whole numbers.
    """

    metadata = TaskMetadata(
        name="MultilingualPoolRetrieval",
        dataset={"path": "google-research-datasets/lareqa", "revision": "main"},
        eval_langs=["eng-Latn"],
        **METADATA,
    )

    def __init__(self, source: RetrievalTask, *, codes: Mapping[str, str] | None = None, **options: Any) -> None:
        if source.pools is not None:
            raise ValueError(f"{source.name} is a re-ranking task: its queries have pools of their own, and not one")
        if source.gains is not None and (source.gains % 1).any():
            raise ValueError(f"{source.name}: mteb's gains are whole numbers, and these are not")
        self.source, revision = source, _digest(source)
        self._described = TaskMetadata(
            name=f"MultilingualPool-{source.name}-{revision[:8]}",
            dataset={"path": f"local/{source.name}", "revision": revision},
            eval_langs=_codes(source.languages, codes or {}),
            **METADATA,
        )
        self.metadata = self._described
        super().__init__(**options)

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Puts `source` into mteb's form; nothing is downloaded."""
        task = self.source
        ids = task.candidate_ids or [f"{code}:{i}" for i, code in enumerate(task.candidate_languages)]
        query_ids = [f"{code}:{name}" for code, name in zip(task.query_languages, task.query_ids, strict=True)]
        gains = np.ones(len(task.relevant)) if task.gains is None else task.gains
        judged = {
            query: {ids[task.relevant[r]]: int(gains[r]) for r in range(task.offsets[i], task.offsets[i + 1])}
            for i, query in enumerate(query_ids)
        }
        whole = {
            "corpus": Dataset.from_dict({"id": ids, "text": task.candidates}),
            "queries": Dataset.from_dict({"id": query_ids, "text": task.queries}),
            "relevant_docs": judged,
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {"test": whole}}, True

    def unload_data(self) -> None:
        """Frees the data; the description, of which mteb would go back to the class's, stays."""
        super().unload_data()
        self.metadata = self._described

    def _evaluate_subset(self, model: MTEBModels, data_split: dict[str, Any], **kwargs: Any) -> dict[str, float]:
        if not isinstance(model, EncoderProtocol):
            raise TypeError(
                f"{type(model).__name__} gives no vectors, and full rankings are counted from them: give an encoder "
                "(mteb's EncoderProtocol), such as MTEBEncoder or a SentenceTransformer"
            )
        timer, where = kwargs.get("timer") or TimingStack(), (kwargs["hf_split"], kwargs["hf_subset"])
        with timer("Encoding queries", *where):
            q_Nd = self._vectors(model, self.source.queries, data_split["queries"], PromptType.query, kwargs)
        with timer("Encoding corpus", *where):
            p_Md = self._vectors(model, self.source.candidates, data_split["corpus"], PromptType.document, kwargs)
        with timer("Ranking", *where):
            task, k = self.source, min(self._top_k, len(p_Md))
            languages = task.query_languages, task.candidate_languages
            ranks = exact_ranks(q_Nd, p_Md, *languages, task.offsets, task.relevant, ignored=task.ignored)
            scores, indices = search_without(q_Nd, p_Md, k, task.ignored)
            bias = language_bias(indices[:, :10], task.query_languages, task.candidate_languages)
            results = summarise(ranks, task.name, measures=per_query(ranks, task.gains) | bias, gains=task.gains)
            ids = np.array(data_split["corpus"]["id"][:], dtype=object)
            found = best_by_id(data_split["queries"]["id"][:], ids, scores, indices)
        cut = super()._evaluate_subset(_Found(found, model.mteb_model_meta), data_split, **kwargs)
        return {**cut, **exact_scores(results)}

    def _vectors(
        self, model: MTEBModels, texts: list[str], rows: Dataset, prompt_type: PromptType, kwargs: dict[str, Any]
    ) -> np.ndarray:
        """(n, d) float32 vectors whose inner products are the model's similarity."""
        options = kwargs["encode_kwargs"]
        if isinstance(model, MTEBEncoder):
            unique, numbers = model.embed(texts, prompt_type, **options)
            return unique[numbers]
        similarity = model.mteb_model_meta.similarity_fn_name
        if similarity not in (None, ScoringFunction.COSINE, ScoringFunction.DOT_PRODUCT):
            raise TypeError(
                f"the model compares by {similarity.value}; ranks are counted from cosines or products only"
            )
        batches = create_dataloader(rows, task_metadata=self.metadata, prompt_type=prompt_type, **options)
        where = {name: kwargs[name] for name in ("hf_split", "hf_subset")}
        made = model.encode(batches, task_metadata=self.metadata, prompt_type=prompt_type, **where, **options)
        vectors = np.asarray(made.float().cpu() if hasattr(made, "cpu") else made, dtype=np.float32)
        if similarity is ScoringFunction.DOT_PRODUCT:
            return vectors
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def exact_scores(results: Results) -> dict[str, float]:
    """The scores over full rankings by name; those that the data cannot have, as cr_map of one language, are left out.

    Args:
        results: of `summarise`.
    """
    scores = {f"{name}_map": getattr(results, name) for name in ("mul", "mo", "cr")}
    scores["rank_distance"] = results.rank_distance
    for language, mul, distance in zip(
        results.languages, results.mul_by_language, results.rank_distance_by_language, strict=True
    ):
        scores |= {f"mul_map_{language}": mul, f"rank_distance_{language}": distance}
    scores |= {re.sub(r"[- ]", "_", name.replace("@", "_at_")): value for name, value in results.bias.items()}
    return {name: float(value) for name, value in scores.items() if not math.isnan(value)}


@dataclass
class _Found:
    """A search that has been made already, for mteb to score."""

    results: dict[str, dict[str, float]]
    mteb_model_meta: ModelMeta

    def index(self, corpus: Dataset, **kwargs: Any) -> None:
        """Nothing is left to do."""

    def search(self, queries: Dataset, **kwargs: Any) -> dict[str, dict[str, float]]:
        """What was found."""
        return self.results


def _codes(languages: list[str], given: Mapping[str, str]) -> list[str]:
    """mteb's language codes (ISO 639-3 and 15924, as "eng-Latn")."""
    known = {}
    for name in ("MIRACLRetrieval", "XQuADRetrieval"):
        known |= {language: codes[0] for language, codes in mteb.get_task(name).metadata.eval_langs.items()}
    known |= given
    missing = [language for language in languages if language not in known]
    if missing:
        raise ValueError(f'mteb has no code for the languages {missing}: give codes={{"{missing[0]}": "xxx-Latn"}}')
    return [known[language] for language in languages]


def _digest(task: RetrievalTask) -> str:
    """A hash of all that scores depend on."""
    state = xxhash.xxh3_128()
    ids = task.candidate_ids or []
    for texts in (task.queries, task.query_languages, task.query_ids, task.candidates, task.candidate_languages, ids):
        for text in texts:
            raw = text.encode("utf-8", "surrogatepass")
            state.update(len(raw).to_bytes(8, "little") + raw)
    for numbers in (task.offsets, task.relevant, task.gains, task.ignored):
        if numbers is not None:
            state.update(np.ascontiguousarray(numbers).tobytes())
    return state.hexdigest()
