"""Encoders of this project in MTEB, as encoder and as search engine: `mteb.evaluate(MTEBSearch(encoder), tasks)`.

mteb scores; encoding and search are ours. Texts go through `Encoder.encode` (sorted by length, packed, no padding, each
distinct text once), and the best candidates are found by FAISS. mteb's own search takes the products, sorts them and
merges them by a heap in Python, one push per query and result.

Floor: mteb 2.15 (`mteb.timing`). Whatever later versions add to the calls is accepted and ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from mteb._create_dataloaders import create_dataloader  # what mteb tells authors of search models to use
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.similarity_functions import dot_score, pairwise_dot_score
from mteb.types import PromptType

from hbt_fast.encoder.encoding import How, identity
from hbt_fast.evaluation.search import search

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from torch import Tensor
    from torch.utils.data import DataLoader

    from hbt_fast.encoder import Encoder

SHARD = 131_072  # vectors that are looked at together: 200 MB at 384 dimensions


class MTEBEncoder:
    """An `Encoder` as mteb's EncoderProtocol asks for it.

    mteb keeps results by name and revision of the model and shows them again without running anything. The revision is
    therefore a hash of weights, tokenizer, settings and prompts as they are when this object is made.

    Args:
        encoder: where its weights are is where it runs.
        name: in mteb's results, as "organisation/model".
        query_prompt: put before queries; None: the encoder's own.
        passage_prompt: put before documents; None: the encoder's own.
        other_prompt: put before texts that are neither, as in bitext mining, classification and STS.
        batch_tokens: see `Encoder.encode`; mteb's batch_size is not used.
        devices: see `Encoder.encode`.

    Raises:
        ValueError: a name without its organisation.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        name: str = "hbt_fast/encoder",
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        other_prompt: str = "",
        batch_tokens: int = 8192,
        devices: Sequence[str] | None = None,
    ) -> None:
        if name.count("/") != 1 or name.startswith("/") or name.endswith("/"):
            raise ValueError(f'name is {name!r}; mteb files results under "organisation/model", as "hbt_fast/encoder"')
        self.encoder, self.batch_tokens, self.devices = encoder, batch_tokens, devices
        self.prompts = {
            PromptType.query: encoder.prompts["query"] if query_prompt is None else query_prompt,
            PromptType.document: encoder.prompts["passage"] if passage_prompt is None else passage_prompt,
            None: other_prompt,
        }
        self.mteb_model_meta = self._meta(name)

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """The vectors of mteb's batches.

        Args:
            inputs: batches with a list of strings under "text".
            task_metadata: not used.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: which prompt is put before each text; None: `other_prompt`.
            kwargs: mteb's encode_kwargs; show_progress_bar is heeded.

        Returns:
            (n, d) float32 unit vectors.

        Raises:
            ValueError: a precision other than float32, or vectors with NaN.
        """
        vectors, rows = self.embed((text for batch in inputs for text in batch["text"]), prompt_type, **kwargs)
        return vectors[rows]

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Inner products, which are cosines here: (n, m) of (n, d) and (m, d)."""
        return dot_score(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Inner products of vectors of equal number: (n,) of (n, d) and (n, d)."""
        return pairwise_dot_score(embeddings1, embeddings2)

    def embed(
        self,
        texts: Iterable[str],
        prompt_type: PromptType | None,
        *,
        out: Path | None = None,
        show_progress_bar: bool = True,
        precision: str = "float32",
        **kwargs: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed each distinct text once: equal texts have bit-equal vectors, whatever batch they would have met.

        Args:
            texts: taken as they come, and not held.
            prompt_type: which prompt is put before each.
            out: a .npy file for the vectors, which are then mapped into memory.
            show_progress_bar: on stderr.
            precision: of the vectors; only float32.
            kwargs: other encode_kwargs of mteb, not used.

        Returns:
            (u, d) float32 vectors of the distinct texts, and (n,) int64 rows: text i has vectors[rows[i]].

        Raises:
            ValueError: another precision, or vectors with NaN.
        """
        if precision != "float32":
            raise ValueError(f"encode_kwargs asks for precision {precision!r}; vectors are float32 here: leave it out")
        number: dict[bytes, int] = {}
        rows: list[int] = []

        def distinct() -> Iterator[str]:
            for text in texts:
                new = len(number)
                rows.append(number.setdefault(xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")), new))
                if rows[-1] == new:
                    yield text

        vectors = self.encoder.encode(
            distinct(),
            self.prompts[prompt_type],
            batch_tokens=self.batch_tokens,
            devices=self.devices,
            out=out,
            progress=show_progress_bar,
        )
        for first in range(0, len(vectors), SHARD):  # in pieces: the file may be larger than the memory
            if not np.isfinite(vectors[first : first + SHARD]).all():
                raise ValueError(
                    "the encoder's vectors hold NaN or infinity; a diverged training run or half precision that "
                    "overflows are the usual causes"
                )
        return vectors, np.array(rows, dtype=np.int64)

    def _meta(self, name: str) -> ModelMeta:
        encoder = self.encoder
        what = identity(encoder, How("", self.batch_tokens, encoder.dimension, "float32"))
        prompts = list(self.prompts.values())
        return ModelMeta.create_empty(
            {
                "name": name,
                "revision": xxhash.xxh3_128_hexdigest(json.dumps([what, prompts], sort_keys=True).encode()),
                "n_parameters": sum(p.numel() for p in encoder.parameters()),
                "max_tokens": encoder.max_length,
                "embed_dim": encoder.dimension,
                "framework": ["PyTorch"],
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": any(prompts),
            }
        )


class MTEBSearch(MTEBEncoder):
    """The same encoder with a search of its own (mteb's SearchProtocol): exact, by FAISS.

    In tasks without search (bitext mining, classification ...) mteb uses it as an encoder.

    Args:
        encoder: see `MTEBEncoder`.
        device: where FAISS searches; see `hbt_fast.evaluation.search.search`.
        folder: where the vectors of corpora are written as <task>-<subset>-<split>.npy and mapped from, so that they
            need not fit the memory, and an interrupted encoding goes on; None keeps them in memory.
        options: as in `MTEBEncoder`.
    """

    def __init__(
        self, encoder: Encoder, *, device: str = "auto", folder: str | Path | None = None, **options: Any
    ) -> None:
        super().__init__(encoder, **options)
        self.device, self.folder = device, None if folder is None else Path(folder)
        self._corpus: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # ids, vectors, rows

    def index(
        self,
        corpus: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Embed a corpus; it is read as a stream.

        Args:
            corpus: columns "id", "text" and perhaps "title".
            task_metadata: names the file in `folder`,
            hf_split: as does this,
            hf_subset: and this.
            encode_kwargs: see `MTEBEncoder.encode`.
            kwargs: num_proc and what later versions of mteb may add; not used.
        """
        self._corpus = None  # frees the one before
        out = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            out = self.folder / f"{task_metadata.name}-{hf_subset}-{hf_split}.npy"
        vectors, rows = self.embed(document_texts(corpus), PromptType.document, out=out, **encode_kwargs)
        self._corpus = np.array(corpus["id"][:], dtype=object), vectors, rows

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: dict[str, Any],
        top_ranked: dict[str, list[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """The best documents of each query in the corpus of `index`.

        Args:
            queries: columns "id", "text" and perhaps "instruction"; or conversations.
            task_metadata: of the task.
            hf_split: not used.
            hf_subset: not used.
            top_k: documents per query, or all if there are fewer.
            encode_kwargs: see `MTEBEncoder.encode`.
            top_ranked: document ids by query id, for re-ranking: each query is compared with its own only.
            num_proc: of mteb's preparation of the queries.
            kwargs: what later versions of mteb may add; not used.

        Returns:
            for each query id, document ids with cosines, in no order that counts.

        Raises:
            ValueError: no corpus is indexed, or `top_ranked` names a document that is not in it.
        """
        if self._corpus is None:
            raise ValueError("there is nothing to search in: call index with a corpus first")
        ids, vectors, rows = self._corpus
        texts = query_texts(queries, task_metadata, num_proc)
        unique, query_rows = self.embed(texts, PromptType.query, **encode_kwargs)
        q_Nd = unique[query_rows]
        query_ids = queries["id"][:]
        if top_ranked is not None:
            return _rerank(query_ids, q_Nd, ids, vectors, rows, top_ranked, top_k)
        scores, indices = search(q_Nd, _shards(vectors, rows), min(top_k, len(rows)), self.device)
        return best_by_id(query_ids, ids, scores, indices)


def document_texts(corpus: Dataset) -> Iterator[str]:
    """Title and text of each document, joined as mteb joins them, without its copy of the corpus on disk."""
    columns = [name for name in ("title", "text") if name in corpus.column_names]
    for batch in corpus.select_columns(columns).iter(batch_size=1024):
        titles = batch.get("title") or [""] * len(batch["text"])
        for title, text in zip(titles, batch["text"], strict=True):
            yield f"{title} {text}".strip() if title else text.strip()


def query_texts(queries: Dataset, task_metadata: TaskMetadata, num_proc: int | None = None) -> Iterator[str]:
    """The texts of queries as mteb prepares them: instructions added, conversations joined."""
    batches = create_dataloader(
        queries, task_metadata=task_metadata, prompt_type=PromptType.query, batch_size=1024, num_proc=num_proc
    )
    return (text for batch in batches for text in batch["text"])


def _shards(vectors: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(rows), SHARD):
        yield vectors[rows[first : first + SHARD]]


def best_by_id(
    query_ids: list[str], ids: np.ndarray, scores: np.ndarray, indices: np.ndarray
) -> dict[str, dict[str, float]]:
    """mteb's form of what was found.

    Args:
        query_ids: N ids.
        ids: (M,) object, ids of the candidates.
        scores: (N, k) float32, best first.
        indices: (N, k) int64; -1: none.

    Returns:
        for each query id, candidate ids with scores, worst first; of candidates with the same id the best one.
    """
    return {
        # of the same id, what comes later stays
        query: dict(zip(ids[best[best >= 0][::-1]].tolist(), score[best >= 0][::-1].tolist(), strict=True))
        for query, best, score in zip(query_ids, indices, scores, strict=True)
    }


def _rerank(
    query_ids: list[str],
    q_Nd: np.ndarray,
    ids: np.ndarray,
    vectors: np.ndarray,
    rows: np.ndarray,
    top_ranked: dict[str, list[str]],
    top_k: int,
) -> dict[str, dict[str, float]]:
    """Each query's own documents by inner product; a query that has none gets none, as in mteb."""
    row = dict(zip(ids.tolist(), rows.tolist(), strict=True))
    found: dict[str, dict[str, float]] = {}
    for query, q_d in zip(query_ids, q_Nd, strict=True):
        own = list(dict.fromkeys(top_ranked.get(query, [])))
        unknown = next((document for document in own if document not in row), None)
        if unknown is not None:
            raise ValueError(f"top_ranked gives query {query!r} the document {unknown!r}, which is not in the corpus")
        scores = vectors[[row[document] for document in own]] @ q_d if own else np.empty(0, np.float32)
        best = np.argsort(-scores, kind="stable")[:top_k]
        found[query] = {own[i]: float(scores[i]) for i in best}
    return found
