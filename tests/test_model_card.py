"""The card of an exported model: what the hub reads of it is valid, and its lines, run as printed, put the prompts."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from torch import nn

from hbt_fast.config import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from hbt_fast.data.sources import Source
from hbt_fast.data.store import Role
from hbt_fast.encoder import Encoder
from hbt_fast.encoder.towers import Towers
from hbt_fast.evaluation.results import Results
from hbt_fast.model_card import write_model_card

LIBRARIES = {  # of the card's sections -> what has to be installed
    "sentence-transformers": ["sentence_transformers"],
    "LangChain": ["langchain_huggingface", "sentence_transformers"],
    "LlamaIndex": ["llama_index.embeddings.huggingface", "sentence_transformers"],
    "Chroma": ["chromadb", "sentence_transformers"],
    "transformers": ["transformers"],
}
PROMPTS = {"query": 'Find "it":\n', "passage": "passage: "}
ROLES = Role(PROMPTS["query"], 64), Role(PROMPTS["passage"], 64)
STORE = SimpleNamespace(languages=("de", "en", "no"), sources=[SimpleNamespace(name="pairs", rows=1234, roles=ROLES)])
RESULTS = Results(
    task="/home/me/tasks/questions.jsonl", model="x", languages=["de", "en", "no"], queries=10, candidates=20,
    mo=0.5, cr=0.25, mul=0.125, rank_distance=3.5, matrix=[[0.5] * 3] * 3,
    mul_by_language=[], rank_distance_by_language=[],
    cutoffs={"own": {"ndcg@10": 0.75, "mrr@10": 0.5}},
)  # fmt: skip


@pytest.fixture
def made(make_encoder, tmp_path):
    """A folder with an export of one encoder, or of two, and its card."""

    def make(pooling="mean", count=1, dense=None, before=None, after=None, **settings):
        encoders = [make_encoder(seed) for seed in range(count)]
        for encoder in encoders:
            encoder.pooling, encoder.prompts, encoder.dense = pooling, PROMPTS, dense
        Towers(encoders).export(tmp_path / "run" / "model")
        given = {f"{kind}_prompt": prompt for kind, prompt in PROMPTS.items()}
        model = ModelConfig(separate_towers=count == 2, **given, **settings.pop("model", {}))
        config = Config(model=model, train=TrainConfig(run_dir=str(tmp_path / "run")), **settings)
        write_model_card(tmp_path / "run" / "model", config, STORE, before, after)
        return tmp_path / "run" / "model"

    return make


def sections(folder):
    """The code of the card, by library."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"### ([^\n]+)\n\n```python\n(.*?)```", card, re.DOTALL))


def check_as_printed(code, folder, monkeypatch):
    """Run it beside the folder: it makes the vectors that the encoders make, which those without prompts are not."""
    monkeypatch.chdir(folder.parent)
    made: dict = {}
    exec(compile(code, "README.md", "exec"), made)
    for kind, plural in (("query", "queries"), ("passage", "passages")):
        encoder = Encoder.from_pretrained(folder / kind if (folder / kind).exists() else folder)
        np.testing.assert_allclose(np.asarray(made[plural]), encoder.encode(["..."], PROMPTS[kind]), atol=2e-6)
        assert np.abs(encoder.encode(["..."]) - np.asarray(made[plural])).max() > 1e-3


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_lines_for_each_library_put_the_prompts(made, monkeypatch, library):
    for package in LIBRARIES[library]:
        pytest.importorskip(package, reason=f"{package} is not installed, and only its users need it")
    folder = made()
    check_as_printed(sections(folder)[library], folder, monkeypatch)


@pytest.mark.parametrize("pooling", ["cls", "last", "weighted_mean"])
def test_transformers_alone_gives_the_vectors_of_every_pooling(made, monkeypatch, pooling):
    folder = made(pooling)
    code = sections(folder)["transformers"]
    check_as_printed(code, folder, monkeypatch)
    own: dict = {}
    exec(code, own)
    texts = ["en the red blue 7", "x", "de which green " * 30]  # padded, and cut off
    expected = Encoder.from_pretrained(folder).encode(texts, "a ")
    np.testing.assert_allclose(own["encode"](texts, "a "), expected, atol=2e-6)


@pytest.mark.parametrize("library", ["sentence-transformers", "transformers"])
def test_two_encoders_are_each_called_by_their_own_name(made, monkeypatch, library):
    pytest.importorskip("sentence_transformers")
    folder = made(count=2)
    assert sections(folder).keys() == {"sentence-transformers", "transformers"}
    check_as_printed(sections(folder)[library], folder, monkeypatch)


def test_transformers_alone_is_not_offered_where_dense_layers_come_after_it(made):
    folder = made(dense=nn.Sequential(nn.Linear(32, 8), nn.Tanh()))
    assert "transformers" not in sections(folder)
    assert "LangChain" in sections(folder)


def test_what_the_hub_reads_is_valid_and_whole(made, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/base\n---\n")
    folder = made(before=RESULTS, after=RESULTS, model={"path": str(tmp_path / "base")})
    card = ModelCard.load(folder / "README.md")  # which raises for metadata that is wrong
    data = card.data
    assert data.language == ["de", "en", "no"]  # "no" is false in YAML if nobody quotes it
    assert (data.license, data.base_model) == ("mit", "someone/base")
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert {"sentence-transformers", "multilingual", "hbt_fast"} <= set(data.tags)
    assert {one.metric_name: one.metric_value for one in data.eval_results} == {
        "Mo": 0.5, "Cr": 0.25, "Mul": 0.125, "rank distance": 3.5
    }  # fmt: skip
    assert {one.dataset_name for one in data.eval_results} == {"questions.jsonl"}
    assert card.text.index("## Results") < card.text.index("## Use") < card.text.index("## Settings")
    assert "| after" in card.text[: card.text.index("## Use")]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (None, None),
        ("someone/encoder", "someone/encoder"),
        ("cache/models--someone--base-x/snapshots/0123", "someone/base-x"),
        ("plain", None),
    ],
)
def test_a_base_and_a_licence_are_named_only_where_they_are_known(made, tmp_path, monkeypatch, path, name):
    monkeypatch.chdir(tmp_path)
    if path not in (None, "someone/encoder"):
        Path(path).mkdir(parents=True)
    data = ModelCard.load(made(model={"path": path}) / "README.md").data
    assert (data.base_model, data.license, data.eval_results) == (name, None, None)


@pytest.mark.parametrize("said", ["/home/me/base", "here/base", "[a/b, c/d]", "5"])
def test_what_a_card_of_the_base_calls_its_base_is_named_only_if_it_is_one_of_the_hubs(
    made, tmp_path, monkeypatch, said
):
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base" / "README.md").write_text(f"---\nbase_model: {said}\n---\n")
    assert ModelCard.load(made(model={"path": "here/base"}) / "README.md").data.base_model is None


def test_no_way_to_a_file_of_this_machine_is_in_the_card(made, tmp_path):
    paths = ["/home/me/data/train.jsonl", "zip://x.tsv::/home/me/data/all.zip", "../private/more.tsv"]
    sources = [Source(path=path) for path in [*paths, "~/private/my own.tsv", "data/kept.tsv"]]
    card = (
        made(
            after=RESULTS,
            data=DataConfig(sources=sources, store_dir="/home/me/stores"),
            eval=EvalConfig(task="jsonl", data="/home/me/tasks/questions.jsonl"),
            model={"path": str(tmp_path / "base")},
        )
        .joinpath("README.md")
        .read_text(encoding="utf-8")
    )
    for way in ("/home", "private", str(tmp_path), "/tmp"):
        assert way not in card
    for kept in ("train.jsonl", "zip://x.tsv::all.zip", "more.tsv", "questions.jsonl", "stores", "data/kept.tsv"):
        assert kept in card
    assert "started from\nbase." in card
    assert json.dumps(PROMPTS) in card
    assert "hidden * mask).sum(1) / mask.sum(1)" in card
