"""Evaluation from embeddings, at XQuAD-R's shape: beside the bare product, and rivals beside ours.

Made-up unit vectors of 384 dimensions: 11 languages of 1,190 queries and 1,183 candidates, each query with one parallel
answer in every language. Rivals measure less: the multilingual pool alone, and mAP to a depth (in brackets), 13,013
being the full ranking that ours is exact for. They are given one query in so many, and their "floor" is our whole
evaluation of the same.
"""

import numpy as np
import pytest
import torch

from hbt_fast.evaluation import metrics
from hbt_fast.evaluation.counting import is_compiled
from hbt_fast.evaluation.ranks import exact_ranks

CODES = [f"l{i:02}" for i in range(11)]
QUERIES, CANDIDATES, DIMENSION = 1190, 1183, 384  # of each language
HAS_GPU = torch.cuda.is_available()


def vectors(share=1):
    """Queries and candidates, by language; what is parallel is alike. `share`: one query in so many."""
    rng = np.random.default_rng(0)
    content = rng.standard_normal((CANDIDATES, DIMENSION), dtype=np.float32)
    answer = np.arange(QUERIES // share) % CANDIDATES
    q = content[np.tile(answer, 11)]
    p = np.tile(content, (11, 1))
    for x in (q, p):
        x += 2 * rng.standard_normal(x.shape, dtype=np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return q, p


def problem(share=1):
    """Arguments of exact_ranks."""
    q, p = vectors(share)
    answer = np.tile(np.arange(len(q) // 11) % CANDIDATES, 11)
    relevant = (answer[:, None] + CANDIDATES * np.arange(11)).ravel()
    languages = (np.repeat(CODES, len(x) // 11).tolist() for x in (q, p))
    return q, p, *languages, 11 * np.arange(len(q) + 1), relevant


def evaluated(arguments, **options):
    """mAP in three settings, rank distance, nDCG@10, recall@100 and MRR@10 in the own and in the whole pool."""
    ranks = exact_ranks(*arguments, **options)
    cutoffs = [metrics.cutoff_metrics(ranks, pool) for pool in ("own", "all")]
    return metrics.map_matrix(ranks), metrics.mul_map(ranks), metrics.rank_distance(ranks), *cutoffs


@pytest.mark.parametrize(
    ("backend", "device"), [("cpu", "cpu"), ("torch", "cpu"), *[("triton", "cuda"), ("torch", "cuda")] * HAS_GPU]
)
def test_xquad_r_three_settings_and_rank_distance(against_floor, backend, device):
    if backend == "cpu" and not is_compiled():
        pytest.skip("csrc/ was not built")
    share = 70 if (backend, device) == ("torch", "cpu") else 1  # the specification takes 40 times the product
    arguments = problem(share)
    q_Nd, p_Md = (torch.from_numpy(x).to(device) for x in arguments[:2])
    s_NM = torch.zeros(len(q_Nd), len(p_Md), device=device)
    against_floor(
        lambda: evaluated(arguments, backend=backend, device=device),
        lambda: torch.mm(q_Nd, p_Md.T, out=s_NM),
        f"one product of {len(q_Nd):,} x {len(p_Md):,} x {DIMENSION}",
        work=2 * len(q_Nd) * p_Md.numel(),
        passes="1",
    )


def sentence_transformers(q, p, qrels, depth):
    """InformationRetrievalEvaluator with vectors given; `depth`: of its mAP, 100 by default."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    class Given(InformationRetrievalEvaluator):
        def embed_inputs(self, *args, **kwargs):
            return torch.from_numpy(q)

    texts = ({f"{kind}{i}": "" for i in range(len(x))} for kind, x in (("q", q), ("d", p)))
    similarity = {"dot": library.util.dot_score}
    evaluator = Given(*texts, qrels, map_at_k=[depth], score_functions=similarity, write_csv=False)
    return lambda: evaluator.compute_all_metrics(None, corpus_embeddings=torch.from_numpy(p))


def mteb(q, p, qrels, depth):
    """mteb's search of `depth` results (1,000 by default) and its metrics, with vectors given."""
    library = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores
    from mteb.models import SearchEncoderWrapper

    class Given:
        mteb_model_meta = None

        def encode(self, inputs, *, prompt_type, **kwargs):
            return {"query": q, "document": p}[prompt_type.value]

        def similarity(self, q_Nd, p_Md):
            return torch.from_numpy(q_Nd) @ torch.from_numpy(p_Md).T

    queries, corpus = (
        Dataset.from_dict({"id": [f"{kind}{i}" for i in range(len(x))], "text": [""] * len(x)})
        for kind, x in (("q", q), ("d", p))
    )
    graded = {query: dict.fromkeys(found, 1) for query, found in qrels.items()}
    about = {"task_metadata": library.tasks.XQuADRetrieval.metadata, "hf_split": "validation", "hf_subset": "en"}
    about |= {"num_proc": None, "encode_kwargs": {"show_progress_bar": False}}

    def run():
        model = SearchEncoderWrapper(Given())
        model.index(corpus, **about)
        found = model.search(queries, top_k=depth, **about)
        return calculate_retrieval_scores(found, graded, (1, 3, 5, 10, 20, 100, 1000))

    return run


@pytest.mark.parametrize(
    ("rival", "depth", "share"),
    [
        (sentence_transformers, 100, 10),  # its default
        (sentence_transformers, 1000, 10),
        (sentence_transformers, 11 * CANDIDATES, 70),
        (mteb, 1000, 10),  # its default
    ],
)
def test_rival_in_units_of_ours(against_floor, rival, depth, share):
    arguments = problem(share)
    q, p, _, _, offsets, relevant = arguments
    qrels = {f"q{i}": {f"d{j}" for j in relevant[offsets[i] : offsets[i + 1]]} for i in range(len(q))}
    against_floor(
        rival(q, p, qrels, depth),
        lambda: evaluated(arguments, device="cpu"),
        "our whole evaluation",
        rounds=3 if depth <= 1000 else 1,
    )
