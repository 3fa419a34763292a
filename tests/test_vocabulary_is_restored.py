"""`python -m hbt_fast.vocabulary restore`: the whole model has, to the bit, the vectors of the one that was trained."""

import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from programs import status
from safetensors.torch import load_file, save_file
from small_checkpoints import KINDS, OTHERS, TEXTS, WORDS, save, unigram, wordpiece, write_texts

from hbt_fast.encoder import Encoder
from hbt_fast.encoder.export import export
from hbt_fast.encoder.kept import KEPT, Kept
from hbt_fast.encoder.load import load_tokenizer
from hbt_fast.vocabulary import main


def cut(folder, whole, name="small"):
    texts = write_texts(folder / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", texts, "--field", "text", "--out", str(folder / name)])
    return folder / name


def trained(small, out, seed=1):
    """The export of a model that has other weights than it had, as training leaves it."""
    encoder = Encoder.from_pretrained(small, prompts={"query": "Q: ", "passage": ""})
    encoder.tokenizer.model_max_length = 24
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in encoder.parameters():
            parameter.data += torch.randn_like(parameter) * 0.1
    return export(encoder, out)


def restore(model, full, out):
    return status(main, ["restore", "--model", str(model), "--full", str(full), "--out", str(out)])


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_restored_model_has_the_vectors_of_the_trained_one(tmp_path, kind):
    whole = save(tmp_path / "whole", KINDS[kind]())
    model = trained(cut(tmp_path, whole), tmp_path / "model")
    assert restore(model, whole, tmp_path / "restored") == 0
    before, made, full = map(Encoder.from_pretrained, (model, tmp_path / "restored", whole))
    np.testing.assert_array_equal(made.encode(TEXTS), before.encode(TEXTS))
    assert not np.allclose(made.encode(TEXTS), full.encode(TEXTS), atol=1e-3)
    assert made.tokenizer(OTHERS)["input_ids"] == full.tokenizer(OTHERS)["input_ids"]
    assert made.tokenizer.get_vocab() == full.tokenizer.get_vocab()
    assert made.tokenizer.model_max_length == before.tokenizer.model_max_length
    tables = [encoder.model.get_input_embeddings().weight for encoder in (made, full)]
    others = torch.ones(len(tables[0]), dtype=torch.bool)
    others[torch.from_numpy(Kept.read(str(model)).old_k)] = False
    assert others.any()
    assert torch.equal(tables[0][others], tables[1][others])
    assert (made.pooling, made.prompts, made.max_length) == (before.pooling, before.prompts, before.max_length)
    ids = [{k: v for k, v in encoder.model.config.to_dict().items() if "_token_id" in k} for encoder in (made, full)]
    assert ids[0] == ids[1]


def test_automodel_and_sentence_transformers_load_the_restored_folder(tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    whole = save(tmp_path / "whole", wordpiece())
    restored = tmp_path / "restored"
    assert restore(trained(cut(tmp_path, whole), tmp_path / "model"), whole, restored) == 0
    ours = Encoder.from_pretrained(restored).encode(TEXTS, "Q: ")
    theirs = SentenceTransformer(str(restored), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name="query"), ours, atol=2e-6)
    inputs = AutoTokenizer.from_pretrained(restored)(["Q: " + t for t in TEXTS], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    hidden = AutoModel.from_pretrained(restored).eval()(**inputs).last_hidden_state
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(pooled.detach(), ours, atol=2e-6)


def test_a_run_trains_on_the_cut_folder_and_its_export_is_restored(tmp_path, monkeypatch):
    from hbt_fast.train import main as train

    monkeypatch.chdir(tmp_path)
    whole = save(tmp_path / "whole", unigram())
    rows = [{"query": f"{a} {b}", "passage": f"the {b} {a} {i}"} for i, (a, b) in enumerate(pairwise(WORDS))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = ["data.sources=[{path: rows.jsonl, language: en}]", "model.query_prompt=q: ", "model.passage_prompt=p: "]
    main(["cut", "--model", str(whole), *settings, "--out", "small"])
    lengths = ["model.query_max_length=32", "model.passage_max_length=32", "model.max_length=32", "data.store_dir=s"]
    steps = ["batch.size=8", "batch.strategy=mono", "train.steps=2", "train.run_dir=run", "train.learning_rate=0.01"]
    train([*settings, *lengths, *steps, "model.path=small", "eval.task=none", "train.micro_batch_tokens=128"])
    assert restore("run/model", whole, "restored") == 0
    texts = [row[key] for row in rows for key in row]
    before, model, made = map(Encoder.from_pretrained, ("small", "run/model", "restored"))
    np.testing.assert_array_equal(made.encode(texts, "p: "), model.encode(texts, "p: "))
    assert not np.allclose(made.encode(texts, "p: "), before.encode(texts, "p: "), atol=1e-4)
    assert made.prompts["query"] == "q: "


def test_what_was_kept_survives_sentence_transformers_and_transformers(tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    whole = save(tmp_path / "whole", unigram())
    small = cut(tmp_path, whole)
    SentenceTransformer(str(small), device="cpu").save(str(tmp_path / "st"))
    AutoModel.from_pretrained(small).save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(small).save_pretrained(tmp_path / "hf")
    for name in ("st", "hf"):
        assert Kept.read(str(tmp_path / name)) == Kept.read(str(small))
        assert restore(tmp_path / name, whole, tmp_path / f"restored-{name}") == 0


def test_halves_are_restored_without_a_lost_bit(tmp_path):
    """A trained model in half precision beside the others' rows in float32, and the other way round."""
    whole = save(tmp_path / "whole", unigram())
    small = cut(tmp_path, whole)
    weights = load_file(small / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, small / "model.safetensors", {"format": "pt"})
    assert restore(small, whole, tmp_path / "restored") == 0
    np.testing.assert_array_equal(
        Encoder.from_pretrained(tmp_path / "restored").encode(TEXTS), Encoder.from_pretrained(small).encode(TEXTS)
    )
    full = load_file(whole / "model.safetensors")
    table = load_file(tmp_path / "restored" / "model.safetensors")["embeddings.word_embeddings.weight"]
    others = sorted(set(range(len(table))) - set(Kept.read(str(small)).old_k.tolist()))
    assert torch.equal(table[others], full["embeddings.word_embeddings.weight"][others])


def _another_vocabulary(model, whole, folder):
    save(whole, wordpiece())


def _another_table(model, whole, folder):
    weights = load_file(whole / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, whole / "model.safetensors", {"format": "pt"})


def _no_field(model, whole, folder):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings[KEPT]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def _field(**changed):
    def change(model, whole, folder):
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings[KEPT] |= changed
        (model / "tokenizer_config.json").write_text(json.dumps(settings))

    return change


def _added_tokens(model, whole, folder):
    encoder = Encoder.from_pretrained(model)
    encoder.tokenizer.add_tokens(["new"])
    encoder.model.resize_token_embeddings(len(encoder.tokenizer))
    export(encoder, model)


def _whole_again(model, whole, folder):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    shutil.copy(whole / "tokenizer_config.json", folder / "own.json")
    shutil.rmtree(model)
    shutil.copytree(whole, model)
    made = json.loads((folder / "own.json").read_text()) | {KEPT: settings[KEPT]}
    (model / "tokenizer_config.json").write_text(json.dumps(made))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_another_vocabulary, "is not that of whole, from which"),
        (_another_table, "but its table of embeddings is another (trained further, or of another dtype)"),
        (_no_field, 'it has no "kept_tokens", so it is not known which tokens of which model these are'),
        (_field(ids="0-4,x"), '"kept_tokens" is damaged'),
        (_field(ids="0-4,3"), '"ids" must be ascending numbers below'),
        (_field(ids="0-9,99999"), '"ids" must be ascending numbers below'),
        (_field(ids="7-5"), '"ids" must be ascending numbers below'),
        (_field(ids="0-" + "9" * 400), '"ids" must be ascending numbers below'),
        (_field(ids=5), '"ids" is 5; it must be a text'),
        (_field(rows=0), '"rows" is 0; it must be a whole number from 1 on'),
        (_field(model=None), '"kept_tokens" is damaged'),
        (_field(ids="0-9"), "is of 10 tokens, or of others; tokens that were added after the cut cannot be restored"),
        (_added_tokens, "tokens that were added after the cut cannot be restored"),
        (_whole_again, "tokens that were added after the cut cannot be restored"),
    ],
)
def test_models_that_do_not_belong_together_are_told_and_nothing_is_written(tmp_path, capsys, damage, message):
    whole = save(tmp_path / "whole", unigram())
    model = trained(cut(tmp_path, whole), tmp_path / "model")
    damage(model, whole, tmp_path)
    assert restore(model, whole, tmp_path / "restored") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "restored").exists()


def test_runs_of_ids_are_read_as_they_were_written():
    rng = np.random.default_rng(0)
    for count in (1, 2, 50, 999, 1000):
        old_k = np.sort(rng.permutation(1000)[:count])
        text = Kept.runs(old_k)
        assert Kept("m", 1000, "v", "t", text).old_k.tolist() == old_k.tolist()
    assert Kept.runs(np.array([0, 1, 2, 5, 7, 8])) == "0-2,5,7-8"


def test_the_table_says_where_no_path_of_this_machine_is(tmp_path):
    small = cut(tmp_path, save(tmp_path / "whole", unigram()))
    assert Kept.read(str(small)).model == "whole"
    assert str(tmp_path) not in (small / "config.json").read_text() + (small / "tokenizer_config.json").read_text()
    assert load_tokenizer(small).is_fast
