"""What mteb says of an encoder is the same through its own search and through ours, and as hbt_fast itself says."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import parallel_rows

mteb = pytest.importorskip("mteb")

from datasets import Dataset  # noqa: E402 - comes with mteb
from mteb.models import EncoderProtocol, SearchProtocol  # noqa: E402
from mteb.tasks import TatoebaBitextMining, XQuADRetrieval  # noqa: E402

from hbt_fast.encoder.export import export  # noqa: E402
from hbt_fast.evaluation.lareqa import xquad_r  # noqa: E402
from hbt_fast.evaluation.mteb_adapter import MTEBEncoder, MTEBSearch  # noqa: E402
from hbt_fast.evaluation.mteb_tasks import MultilingualPoolRetrieval  # noqa: E402
from hbt_fast.evaluation.run import evaluate  # noqa: E402
from hbt_fast.evaluation.tasks import task_from_rows  # noqa: E402

ROWS = parallel_rows(40)
PROMPTS = {"query_prompt": "Query: ", "passage_prompt": "Passage: "}
SILENT = {"cache": None, "show_progress_bar": False, "co2_tracker": False}


class LocalXQuAD(XQuADRetrieval):
    """mteb's XQuADRetrieval with made-up data; documents have titles, and some texts come twice."""

    top_ranked = False

    def load_data(self, *args, **kwargs):
        self.hf_subsets, self.dataset, self.data_loaded = ["de", "en"], {}, True
        for language in self.hf_subsets:
            texts = [row.passages[language] for row in ROWS[::2]]
            titles = ["", "red stone"] * (len(texts) // 2)
            ids = [f"d{i:02}" for i in range(len(texts))]
            queries = [f"q{i:02}" for i in range(len(ROWS))]
            ranked = {q: ids[i % 7 : i % 7 + 9] for i, q in enumerate(queries)} if self.top_ranked else None
            self.dataset[language] = {
                "validation": {
                    "corpus": Dataset.from_dict({"id": ids, "title": titles, "text": [f" {t} " for t in texts]}),
                    "queries": Dataset.from_dict(
                        {"id": queries, "text": [row.queries[language] for row in ROWS[:-1]] + [ROWS[0].queries["fr"]]}
                    ),
                    "relevant_docs": {q: {ids[i // 2]: 1} for i, q in enumerate(queries)},
                    "top_ranked": ranked,
                }
            }


class LocalReranking(LocalXQuAD):
    top_ranked = True


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


@pytest.mark.parametrize("task", [LocalXQuAD, LocalReranking])
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


def test_other_models_of_mteb_run_on_the_multilingual_pool(make_encoder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    encoder, task = make_encoder(), MultilingualPoolRetrieval(task_from_rows("made-up", ROWS))
    export(encoder, tmp_path / "model")
    theirs = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert_equal(scores(MTEBEncoder(encoder), task), scores(theirs, task), 1e-4)


def test_real_questions_score_the_same_too(shared_data, make_encoder):
    encoder, source = make_encoder(), xquad_r(shared_data / "xquad-r", languages=["de", "en"])
    few = task_of(source, 60)
    own = evaluate(encoder, few, log=None)
    got = scores(MTEBSearch(encoder, **PROMPTS), MultilingualPoolRetrieval(few))["default"]
    assert (got["mul_map"], got["rank_distance"]) == (own.mul, own.rank_distance)


def task_of(source, count):
    """A task of `count` of the queries, half of them from the end."""
    from dataclasses import replace

    from hbt_fast.evaluation.tasks import offsets_and_members

    chosen = [*range(count // 2), *range(len(source.queries) - count // 2, len(source.queries))]
    members = [source.relevant[source.offsets[i] : source.offsets[i + 1]].tolist() for i in chosen]
    offsets, relevant = offsets_and_members(members)
    some = {name: [getattr(source, name)[i] for i in chosen] for name in ("queries", "query_languages", "query_ids")}
    return replace(source, **some, offsets=offsets, relevant=relevant)
