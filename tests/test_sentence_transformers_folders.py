"""A sentence-transformers checkpoint gives the embeddings it gives there, by folder or hub name, or is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hbt_fast.encoder import Encoder, EncoderError
from hbt_fast.encoder.export import export

TEXTS = ["en the red blue 7", "de which green", "fr the old new big small", "x"]
LABSE = [(32, True, nn.Tanh)]  # dimensions, bias, activation of each Dense
GEMMA = [(48, False, nn.Identity), (16, False, nn.Identity)]
OTHERS = [(24, True, nn.GELU), (24, False, nn.ReLU), (20, True, nn.SiLU), (12, True, nn.Sigmoid)]


@pytest.fixture
def make_folder(make_encoder, tmp_path):
    """A folder that sentence-transformers wrote."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    def make(dense=LABSE, pooling="cls", normalize=True, **options):
        encoder = make_encoder()
        encoder.model.save_pretrained(tmp_path / "plain")
        encoder.tokenizer.save_pretrained(tmp_path / "plain")
        chain = [
            modules.Transformer(str(tmp_path / "plain"), max_seq_length=32),
            modules.Pooling(32, pooling, **options),
        ]
        torch.manual_seed(1)
        width = 32
        for out, bias, activation in dense:
            chain.append(modules.Dense(width, out, bias=bias, activation_function=activation()))
            width = out
        chain += [modules.Normalize()] * normalize
        made = sentence_transformers.SentenceTransformer(modules=chain, device="cpu", prompts={"query": "Q: "})
        made.save(str(tmp_path / "made"))
        return tmp_path / "made"

    return make


def vectors_there(folder, texts=TEXTS):
    """What sentence-transformers makes of the texts, normalised."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)


def rewrite(folder, name, change):
    """Change a JSON file of the folder."""
    content = json.loads((folder / name).read_text())
    content = change(content) or content
    (folder / name).write_text(json.dumps(content))


def to_older_names(modules):
    """The types as sentence-transformers before 5.4 wrote them."""
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dense", [LABSE, GEMMA, OTHERS, []], ids=["labse", "gemma", "others", "none"])
def test_dense_layers_are_loaded_and_exported(make_folder, tmp_path, dense, normalize):
    folder = make_folder(dense, normalize=normalize)
    encoder = Encoder.from_pretrained(folder)
    ours = encoder.encode(TEXTS)
    assert ours.shape == (4, encoder.dimension) == (4, dense[-1][0] if dense else 32)
    assert (encoder.dense is None) == (not dense)
    np.testing.assert_allclose(ours, vectors_there(folder), atol=1e-6)

    exported = export(encoder, tmp_path / "exported")
    np.testing.assert_array_equal(Encoder.from_pretrained(exported).encode(TEXTS), ours)
    np.testing.assert_allclose(vectors_there(exported), ours, atol=1e-6)
    assert not [p for p in exported.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".py")]


def test_older_names_are_known(make_folder):
    folder = make_folder(GEMMA)
    new = Encoder.from_pretrained(folder).encode(TEXTS)
    rewrite(folder, "modules.json", to_older_names)
    (folder / "4_Normalize" / "config.json").unlink()  # older ones have none
    for i in (2, 3):
        rewrite(folder, f"{i}_Dense/config.json", lambda c: {k: c[k] for k in c if not k.startswith("module_")})
    np.testing.assert_array_equal(Encoder.from_pretrained(folder).encode(TEXTS), new)


@pytest.mark.parametrize("file", ["sentence_bert_config.json", "sentence_xlm-roberta_config.json"])
def test_lower_case_and_length_are_as_recorded_under_older_names_too(make_folder, tmp_path, file):
    folder, texts = make_folder(), ["EN The Red BLUE 7", "de Which Green", "fr the OLD new Big small", "X"]
    plain = Encoder.from_pretrained(folder)
    (folder / "sentence_bert_config.json").unlink()
    (folder / file).write_text(json.dumps({"max_seq_length": 5, "do_lower_case": True}))
    encoder = Encoder.from_pretrained(folder)
    assert encoder.max_length == 5
    ours = encoder.encode(texts)
    np.testing.assert_allclose(ours, vectors_there(folder, texts), atol=1e-6)
    plain.max_length = 5
    np.testing.assert_array_equal(plain.encode([text.lower() for text in texts]), ours)
    assert np.abs(plain.encode(texts) - ours).max() > 1e-4

    exported = export(encoder, tmp_path / "exported")
    np.testing.assert_array_equal(Encoder.from_pretrained(exported).encode(texts), ours)
    np.testing.assert_allclose(vectors_there(exported, texts), ours, atol=1e-6)


def test_dense_layers_are_trained(make_folder):
    encoder = Encoder.from_pretrained(make_folder(OTHERS))
    tokens, offsets = encoder.tokenise(TEXTS)
    encoder(torch.from_numpy(tokens), torch.from_numpy(offsets))[:, 0].sum().backward()
    trained = {name: p for name, p in encoder.named_parameters() if name.startswith("dense.")}
    assert len(trained) == 7
    assert all(p.grad.abs().sum() > 0 for p in trained.values())


def test_whole_tensors_of_dense_layers_can_be_handed_to_the_export(make_folder, tmp_path):
    encoder = Encoder.from_pretrained(make_folder(LABSE))
    wanted = encoder.encode(TEXTS)
    state = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
    export(encoder, tmp_path / "exported", state)
    np.testing.assert_array_equal(Encoder.from_pretrained(tmp_path / "exported").encode(TEXTS), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_layers_take_the_dtype_of_the_weights(make_folder, dtype):
    encoder = Encoder.from_pretrained(make_folder(LABSE))
    before = encoder.encode(TEXTS)
    tokens, offsets = encoder.tokenise(TEXTS)
    after = encoder.to(dtype).eval()(torch.from_numpy(tokens), torch.from_numpy(offsets)).detach()
    assert after.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(after, before, atol=1e-6 if dtype == torch.float64 else 0.05)


def test_loading_draws_no_random_numbers(make_folder):
    folder = make_folder(GEMMA)
    state = torch.get_rng_state()
    Encoder.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Puts a folder into a hub cache, where no network is asked, and gives the hub's name for it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(folder):
        repository, commit = tmp_path / "cache" / "models--someone--encoder", "0" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return "someone/encoder"

    return put


def test_a_hub_name_gives_what_its_folder_gives(make_folder, cached):
    folder = make_folder(GEMMA)
    rewrite(folder, "config_sentence_transformers.json", lambda c: c | {"prompts": {"query": "Q: ", "document": "D: "}})
    rewrite(folder, "sentence_bert_config.json", lambda c: c | {"max_seq_length": 24})
    by_folder, by_name = Encoder.from_pretrained(folder), Encoder.from_pretrained(cached(folder))
    assert (by_name.pooling, by_name.max_length) == ("cls", 24)
    assert by_name.prompts == by_folder.prompts == {"query": "Q: ", "passage": "D: "}
    np.testing.assert_array_equal(by_name.encode(TEXTS), by_folder.encode(TEXTS))


def test_a_hub_name_without_modules_is_said_where_the_hub_cannot_be_asked(make_folder, cached, tmp_path, capsys):
    folder = make_folder()
    (folder / "modules.json").unlink()
    name = cached(folder)
    assert Encoder.from_pretrained(name).pooling == "mean"
    assert f"{name}: no modules.json in the cache" in capsys.readouterr().err

    absent = tmp_path / "cache" / "models--someone--encoder" / ".no_exist" / ("0" * 40)  # how the hub's no is noted
    absent.mkdir(parents=True)
    (absent / "modules.json").touch()
    Encoder.from_pretrained(name)
    assert "modules.json" not in capsys.readouterr().err


def dense_config(**settings):
    return lambda folder: rewrite(folder, "2_Dense/config.json", lambda config: config | settings)


def modules_json(change):
    return lambda folder: rewrite(folder, "modules.json", change)


def pooling_config(**settings):
    return lambda folder: rewrite(folder, "1_Pooling/config.json", lambda config: settings)


def without_weights(folder):
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "weights.npz")


def a_weight_more(folder):
    path = folder / "2_Dense" / "model.safetensors"
    save_file(load_file(path) | {"residual.weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            modules_json(lambda m: m[2].update(type="sentence_transformers.models.LSTM")),
            r"modules.json: .*2_Dense.*LSTM",
        ),
        (modules_json(lambda m: m[0].update(type="custom_st.Transformer")), "custom_st.Transformer, which is not supp"),
        (modules_json(lambda m: [m[0], m[1], m[3], m[2]]), "Transformer, Pooling, Normalize, Dense; supported are"),
        (modules_json(lambda m: m[:1]), "the modules are Transformer; supported are"),
        (
            modules_json(lambda m: m[0].update(path="0_Other")),
            'transformer is in "0_Other", where no config.json',
        ),
        (modules_json(lambda m: m[1].clear()), 'every module must have a "type" and a "path"'),
        (modules_json(lambda m: {"modules": m}), "modules.json: not a JSON list"),
        (
            modules_json(lambda m: [m[0], m[1], m[2], m[2], m[3]]),
            "gives 24 dimensions is followed by one that takes 32",
        ),
        (lambda folder: (folder / "modules.json").write_text("[{"), "modules.json: not valid JSON"),
        (pooling_config(pooling_mode=["mean", "cls"]), "1_Pooling/config.json: a pooling that is not supported"),
        (pooling_config(pooling_mode="max"), "a pooling that is not supported"),
        (pooling_config(pooling_mode="mean", include_prompt=False), "a pooling that is not supported.*prompt included"),
        (
            pooling_config(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True),
            "a pooling that is not supported",
        ),
        (
            dense_config(activation_function="torch.nn.modules.activation.Hardtanh"),
            "the activation torch.*Hardtanh is n",
        ),
        (dense_config(activation_function="os.Tanh"), "the activation os.Tanh is not supported"),
        (dense_config(use_residual=True), "use_residual is not supported"),
        (dense_config(module_input_name="token_embeddings"), "a Dense of token_embeddings is not supported"),
        (dense_config(out_features=25), "config.json beside it says .*25"),
        (dense_config(bias=False), "config.json beside it says"),
        (
            without_weights,
            "2_Dense: no model.safetensors or pytorch_model.bin, and weights in ot",
        ),
        (a_weight_more, "residual.weight.* config.json beside it says"),
        (lambda folder: (folder / "2_Dense" / "model.safetensors").write_bytes(b"{}"), "not a safetensors file"),
    ],
)
def test_what_is_not_supported_is_refused(make_folder, damage, message):
    folder = make_folder([(24, True, nn.Tanh)])
    Encoder.from_pretrained(folder)
    damage(folder)
    with pytest.raises(EncoderError, match=message):
        Encoder.from_pretrained(folder)


def test_dense_layers_must_fit_the_model(make_folder):
    encoder = Encoder.from_pretrained(make_folder())
    with pytest.raises(EncoderError, match="dense takes 7 dimensions, and the model's vectors have 32"):
        Encoder(encoder.model, encoder.tokenizer, dense=nn.Sequential(nn.Linear(7, 4), nn.Tanh()))
