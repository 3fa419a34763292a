"""What mteb says of an encoder is the same through its own search and through ours, and as hbt_fast itself says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import parallel_rows

mteb = pytest.importorskip("mteb")

from datasets import Dataset  # noqa: E402 - comes with mteb
from mteb.models import EncoderProtocol, SearchProtocol  # noqa: E402
from mteb.models.model_meta import ScoringFunction  # noqa: E402
from mteb.tasks import TatoebaBitextMining, XQuADRetrieval  # noqa: E402

from hbt_fast.encoder.export import export  # noqa: E402
from hbt_fast.evaluation import mteb_adapter  # noqa: E402
from hbt_fast.evaluation.lareqa import xquad_r  # noqa: E402
from hbt_fast.evaluation.mteb_adapter import MTEBEncoder, MTEBSearch  # noqa: E402
from hbt_fast.evaluation.mteb_tasks import MultilingualPoolRetrieval  # noqa: E402
from hbt_fast.evaluation.run import evaluate  # noqa: E402
from hbt_fast.evaluation.tasks import offsets_and_members, task_from_rows  # noqa: E402

ROWS = parallel_rows(40)
PROMPTS = {"query_prompt": "Query: ", "passage_prompt": "Passage: "}
SILENT = {"cache": None, "show_progress_bar": False, "co2_tracker": False}


class LocalXQuAD(XQuADRetrieval):
    """mteb's XQuADRetrieval with made-up data: documents with and without titles, a query that comes twice."""

    top_ranked = instructed = False

    def load_data(self, *args, **kwargs):
        self.hf_subsets, self.dataset, self.data_loaded = ["de", "en"], {}, True
        for language in self.hf_subsets:
            ids, query_ids = [f"d{i:02}" for i in range(len(ROWS) // 2)], [f"q{i:02}" for i in range(len(ROWS))]
            corpus = {
                "id": ids,
                "title": ["", "red stone"] * (len(ids) // 2),
                "text": [f" {row.passages[language]} " for row in ROWS[::2]],
            }
            queries = {"id": query_ids, "text": [row.queries[language] for row in (ROWS[1], *ROWS[1:])]}
            if self.instructed:
                queries["instruction"] = ["green old wind", "say moon"] * (len(query_ids) // 2)
            ranked = {query: ids[i % 7 : i % 7 + 9] for i, query in enumerate(query_ids)}
            self.dataset[language] = {
                "validation": {
                    "corpus": Dataset.from_dict(corpus),
                    "queries": Dataset.from_dict(queries),
                    "relevant_docs": {query: {ids[i // 2]: 1} for i, query in enumerate(query_ids)},
                    "top_ranked": ranked if self.top_ranked else None,
                }
            }


class LocalReranking(LocalXQuAD):
    top_ranked = True


class LocalInstructions(LocalXQuAD):
    """Queries with instructions; and fewer results than documents."""

    instructed = True
    k_values = (1, 10)


class LocalTatoeba(TatoebaBitextMining):
    def load_data(self, *args, **kwargs):
        self.hf_subsets = ["deu-eng"]
        columns = {"sentence1": [row.queries["de"] for row in ROWS], "sentence2": [row.queries["en"] for row in ROWS]}
        self.dataset, self.data_loaded = {"deu-eng": {"test": Dataset.from_dict(columns)}}, True


def scores(model, task) -> dict[str, dict[str, float]]:
    """The scores of each subset, numbers only."""
    (result,) = mteb.evaluate(model, task, **SILENT).task_results
    (split,) = result.scores.values()
    return {s["hf_subset"]: {k: v for k, v in s.items() if isinstance(v, float)} for s in split}


def some_of(source, count):
    """A task of `count` of the queries, half of them from the end."""
    chosen = [*range(count // 2), *range(len(source.queries) - count // 2, len(source.queries))]
    members = [source.relevant[source.offsets[i] : source.offsets[i + 1]].tolist() for i in chosen]
    offsets, relevant = offsets_and_members(members)
    some = {name: [getattr(source, name)[i] for i in chosen] for name in ("queries", "query_languages", "query_ids")}
    return replace(source, **some, offsets=offsets, relevant=relevant)


def assert_equal(some, others, tolerance):
    assert some.keys() == others.keys()
    for subset, values in some.items():
        assert values.keys() == others[subset].keys()
        assert values == pytest.approx(others[subset], abs=tolerance, nan_ok=True), subset


def test_the_adapters_are_what_mteb_asks_for(make_encoder):
    assert isinstance(MTEBEncoder(make_encoder()), EncoderProtocol)
    assert not isinstance(MTEBEncoder(make_encoder()), SearchProtocol)
    search = MTEBSearch(make_encoder())
    assert isinstance(search, SearchProtocol)
    assert isinstance(search, EncoderProtocol)  # bitext mining and all else without a search


@pytest.mark.parametrize("task", [LocalXQuAD, LocalReranking, LocalInstructions])
def test_our_search_scores_as_mtebs_own(make_encoder, task):
    encoder = make_encoder()
    ours, theirs = scores(MTEBSearch(encoder, **PROMPTS), task()), scores(MTEBEncoder(encoder, **PROMPTS), task())
    assert_equal(ours, theirs, 1e-6)
    assert 0 < ours["en"]["ndcg_at_10"] < 1
    assert ours["en"] != ours["de"]


@pytest.mark.parametrize("task", [LocalXQuAD, LocalReranking, LocalTatoeba])
def test_the_exported_folder_scores_the_same_by_sentence_transformers(make_encoder, tmp_path, task):
    library = pytest.importorskip("sentence_transformers")
    encoder = make_encoder()
    export(encoder, tmp_path / "model")
    theirs = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert_equal(scores(MTEBSearch(encoder), task()), scores(theirs, task()), 1e-4)


def test_bitext_mining_is_the_accuracy_of_nearest_neighbours(make_encoder):
    encoder = make_encoder()
    source, target = (encoder.encode([row.queries[code] for row in ROWS], "Query: ") for code in ("de", "en"))
    expected = np.mean((source @ target.T).argmax(axis=1) == np.arange(len(source)))
    for model in (MTEBSearch(encoder, other_prompt="Query: "), MTEBEncoder(encoder, other_prompt="Query: ")):
        assert scores(model, LocalTatoeba())["deu-eng"]["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert 0 < expected < 1


def test_the_multilingual_pool_scores_as_hbt_fast_does(make_encoder):
    encoder, source = make_encoder(), task_from_rows("made-up", ROWS)
    # mteb would strip them
    source = replace(source, candidates=[text + "  " * (i % 2) for i, text in enumerate(source.candidates)])
    own = evaluate(encoder, source, log=None)
    got = scores(MTEBSearch(encoder, **PROMPTS), MultilingualPoolRetrieval(source))["default"]
    assert got["mul_map"] == got["main_score"] == own.mul
    assert got["rank_distance"] == own.rank_distance
    assert (got["mo_map"], got["cr_map"]) == (own.mo, own.cr)
    for language, mul, distance in zip(own.languages, own.mul_by_language, own.rank_distance_by_language, strict=True):
        assert got[f"mul_map_{language}"] == mul
        assert got[f"rank_distance_{language}"] == distance
    # all 60 candidates are within mteb's 1,000: there its mAP is over the full ranking too
    assert got["map_at_1000"] == pytest.approx(own.mul, abs=1e-4)


def test_a_candidate_that_is_to_be_ignored_is_so_in_all_scores(make_encoder):
    encoder, source = make_encoder(), task_from_rows("made-up", ROWS)
    q_Nd, p_Md = encoder.encode(source.queries, "Query: "), encoder.encode(source.candidates, "Passage: ")
    best_NM = np.argsort(-q_Nd @ p_Md.T, axis=1)
    relevant = np.split(source.relevant, source.offsets[1:-1])
    ignored = [next(c for c in best if c not in mine) for best, mine in zip(best_NM, relevant, strict=True)]
    heeded = replace(source, ignored=np.array(ignored))
    own = evaluate(encoder, heeded, **PROMPTS, log=None)
    got = scores(MTEBSearch(encoder, **PROMPTS), MultilingualPoolRetrieval(heeded))["default"]
    assert got["ndcg_at_10"] == pytest.approx(own.cutoffs["all"]["ndcg@10"], abs=1e-5)
    assert got["mul_map"] == own.mul
    assert got["map_at_1000"] == pytest.approx(own.mul, abs=1e-4)
    names = {MultilingualPoolRetrieval(task).metadata.name for task in (source, heeded)}
    assert len(names) == 2  # or what is kept of one would be shown of the other


def test_other_models_of_mteb_run_on_the_multilingual_pool(make_encoder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    encoder, task = make_encoder(), MultilingualPoolRetrieval(task_from_rows("made-up", ROWS))
    export(encoder, tmp_path / "model")
    theirs = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert_equal(scores(MTEBEncoder(encoder), task), scores(theirs, task), 1e-4)


class Longer:
    """An encoder of mteb's, to be compared by cosine, whose vectors are no unit vectors."""

    similarity = similarity_pairwise = MTEBEncoder.similarity

    def __init__(self, model, similarity=ScoringFunction.COSINE):
        self.model = model
        self.mteb_model_meta = model.mteb_model_meta.model_copy(update={"similarity_fn_name": similarity})

    def encode(self, inputs, **options):
        vectors = torch.from_numpy(self.model.encode(inputs, **options))
        return vectors * torch.linspace(1, 3, len(vectors))[:, None]


def test_vectors_of_any_length_are_compared_by_cosine(make_encoder):
    model, task = MTEBEncoder(make_encoder()), MultilingualPoolRetrieval(task_from_rows("made-up", ROWS))
    assert_equal(scores(Longer(model), task), scores(model, task), 1e-6)
    products = scores(Longer(model, ScoringFunction.DOT_PRODUCT), task)
    assert products["default"]["mul_map"] != pytest.approx(scores(model, task)["default"]["mul_map"], abs=1e-3)
    with pytest.raises(TypeError, match="compares by euclidean"):
        scores(Longer(model, ScoringFunction.EUCLIDEAN), task)


def test_real_questions_score_the_same_too(shared_data, make_encoder):
    encoder, source = make_encoder(), some_of(xquad_r(shared_data / "xquad-r", languages=["de", "en"]), 60)
    own = evaluate(encoder, source, log=None)
    got = scores(MTEBSearch(encoder, **PROMPTS), MultilingualPoolRetrieval(source))["default"]
    assert (got["mul_map"], got["rank_distance"]) == (own.mul, own.rank_distance)


def test_vectors_on_disk_and_in_shards_score_the_same(make_encoder, tmp_path, monkeypatch):
    encoder = make_encoder()
    expected = scores(MTEBSearch(encoder), LocalXQuAD())
    monkeypatch.setattr(mteb_adapter, "SHARD", 7)
    assert_equal(scores(MTEBSearch(encoder, folder=tmp_path / "vectors"), LocalXQuAD()), expected, 1e-6)
    assert [file.name for file in sorted((tmp_path / "vectors").iterdir())] == [
        "XQuADRetrieval-de-validation.npy",
        "XQuADRetrieval-en-validation.npy",
    ]


def test_kept_results_are_of_the_same_weights_prompts_and_data(make_encoder, tmp_path):
    cache = mteb.ResultCache(cache_path=tmp_path)

    def made(encoder, rows=ROWS, **options):
        task = MultilingualPoolRetrieval(task_from_rows("made-up", rows))
        (result,) = mteb.evaluate(MTEBSearch(encoder, **options), task, **SILENT | {"cache": cache}).task_results
        return result.date

    first = made(make_encoder())
    assert made(make_encoder()) == first  # shown again
    assert made(make_encoder(seed=1)) > first
    assert made(make_encoder(), query_prompt="ask ") > first
    assert made(make_encoder(), rows=ROWS[:-1]) > first


def test_a_task_can_be_run_again(make_encoder):
    task = MultilingualPoolRetrieval(task_from_rows("made-up", ROWS))
    name, model = task.metadata.name, MTEBEncoder(make_encoder())
    assert scores(model, task) == scores(model, task)
    assert task.metadata.name == name != MultilingualPoolRetrieval.metadata.name


def test_search_returns_the_best_documents(make_encoder):
    prompts = {"query_prompt": "Query: ", "passage_prompt": "Passage: "}
    model, task = MTEBSearch(make_encoder(), **prompts), LocalXQuAD()
    task.load_data()
    data, about = task.dataset["en"]["validation"], {"hf_split": "validation", "hf_subset": "en"}
    about |= {"task_metadata": task.metadata, "encode_kwargs": {"show_progress_bar": False}, "num_proc": None}
    with pytest.raises(ValueError, match="call index"):
        model.search(data["queries"], top_k=3, **about)
    columns = data["corpus"].to_dict()
    columns["id"] = ["same", "same", *columns["id"][2:]]
    columns["text"][6] = columns["text"][4]
    corpus = Dataset.from_dict(columns)
    model.index(corpus, later_versions="may pass more", **about)
    found = model.search(data["queries"], top_k=3, **about)
    everything = model.search(data["queries"], top_k=1000, **about)
    q_Nd = model.encoder.encode(data["queries"]["text"], "Query: ")
    p_Md = model.encoder.encode(list(mteb_adapter.document_texts(corpus)), "Passage: ")
    for i, query in enumerate(data["queries"]["id"]):
        cosines = p_Md @ q_Nd[i]
        assert sorted(everything[query]) == sorted({"same", *corpus["id"]})
        assert everything[query]["same"] == pytest.approx(cosines[:2].max(), abs=1e-6)
        best = {corpus["id"][j]: cosines[j] for j in np.argsort(-cosines)[:3]}
        assert {k: v for k, v in best.items() if k != "same"} == pytest.approx(
            {k: v for k, v in found[query].items() if k != "same"}, abs=1e-6
        )
    unknown = {query: ["d99"] for query in data["queries"]["id"]}
    with pytest.raises(ValueError, match="'q00' the document 'd99'"):
        model.search(data["queries"], top_k=3, top_ranked=unknown, **about)
    few = model.search(data["queries"], top_k=2, top_ranked={"q01": ["d05", "d06", "d05", "d07", "d08"]}, **about)
    assert few["q00"] == {}
    best = sorted(range(5, 9), key=lambda j: -(p_Md[j] @ q_Nd[1]))[:2]
    assert few["q01"] == pytest.approx({f"d{j:02}": p_Md[j] @ q_Nd[1] for j in best}, abs=1e-6)


def test_what_cannot_be_measured_is_refused(make_encoder):
    encoder, source = make_encoder(), task_from_rows("made-up", ROWS)
    with pytest.raises(ValueError, match="organisation/model"):
        MTEBEncoder(encoder, name="mine")
    with pytest.raises(ValueError, match="precision 'int8'"):
        MTEBEncoder(encoder).embed(["a"], None, precision="int8")
    pools = np.arange(len(source.queries) + 1), source.relevant[source.offsets[:-1]]
    with pytest.raises(ValueError, match="re-ranking"):
        MultilingualPoolRetrieval(replace(source, pools=pools))
    with pytest.raises(ValueError, match="whole numbers"):
        MultilingualPoolRetrieval(replace(source, gains=np.full(len(source.relevant), 0.5, np.float32)))
    unknown = replace(source, query_languages=["qq"] * len(source.queries))
    with pytest.raises(ValueError, match=r"no code for the languages \['qq'\]"):
        MultilingualPoolRetrieval(unknown)
    assert "cat-Latn" in MultilingualPoolRetrieval(unknown, codes={"qq": "cat-Latn"}).metadata.eval_langs

    class OnlySearch:
        mteb_model_meta = MTEBEncoder(encoder).mteb_model_meta
        index = search = None

    with pytest.raises(TypeError, match="OnlySearch gives no vectors"):
        scores(OnlySearch(), MultilingualPoolRetrieval(source))
    with torch.no_grad():
        next(encoder.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        scores(MTEBSearch(encoder), LocalTatoeba())
