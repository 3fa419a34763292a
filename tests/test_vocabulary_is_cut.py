"""`python -m hbt_fast.vocabulary cut`: the texts have the tokens and, to the bit, the vectors of the whole model."""

import json

import numpy as np
import pytest
import torch
from programs import status
from safetensors import safe_open
from small_checkpoints import FILLERS, KINDS, OTHERS, TEXTS, save, unigram, wordpiece, write_texts

from hbt_fast.encoder import Encoder
from hbt_fast.encoder.kept import Kept
from hbt_fast.encoder.load import load_tokenizer
from hbt_fast.vocabulary import main


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request, tmp_path_factory):
    """The folder of a whole model, and of the same one cut to TEXTS."""
    folder = tmp_path_factory.mktemp("pair")
    whole = save(folder / "whole", KINDS[request.param]())
    texts = write_texts(folder / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", texts, "--field", "text", "--out", str(folder / "small")])
    return whole, folder / "small"


def tokens(folder, texts):
    return load_tokenizer(folder)(texts)["input_ids"]


def test_the_texts_have_the_same_tokens_and_vectors(pair):
    whole, small = map(Encoder.from_pretrained, pair)
    old = Kept.read(str(pair[1])).old_k
    assert len(old) == len(small.tokenizer) < len(whole.tokenizer)
    assert [old[ids].tolist() for ids in tokens(pair[1], TEXTS)] == tokens(pair[0], TEXTS)
    np.testing.assert_array_equal(small.encode(TEXTS), whole.encode(TEXTS))
    table = small.model.get_input_embeddings().weight
    assert torch.equal(table, whole.model.get_input_embeddings().weight[torch.from_numpy(old)])


def test_tokens_are_decoded_as_before(pair):
    whole, small = map(load_tokenizer, pair)
    for text in (*TEXTS, *OTHERS):
        for special in (True, False):
            now = small.decode(small(text)["input_ids"], skip_special_tokens=special)
            if text in TEXTS:
                assert now == whole.decode(whole(text)["input_ids"], skip_special_tokens=special)


def test_no_character_of_other_texts_becomes_unknown(pair):
    whole, small = map(load_tokenizer, pair)
    for text in (*OTHERS, *(a + b for a in OTHERS for b in TEXTS)):
        before, now = whole(text)["input_ids"], small(text)["input_ids"]
        assert now.count(small.unk_token_id) == before.count(whole.unk_token_id)
        assert len(now) >= len(before)
    assert any(len(small(text)["input_ids"]) > len(whole(text)["input_ids"]) for text in OTHERS)


def test_special_tokens_keep_their_meaning(pair):
    whole, small = map(load_tokenizer, pair)
    assert small.special_tokens_map == whole.special_tokens_map
    assert small.model_input_names == whole.model_input_names
    assert (small.model_max_length, small.padding_side) == (whole.model_max_length, whole.padding_side)
    added = [{token.content for token in t.added_tokens_decoder.values()} for t in (whole, small)]
    assert added[0] == added[1]
    written = json.loads((pair[1] / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert {token["content"]: token["id"] for token in written} == small.get_added_vocab()
    configs = [json.loads((folder / "config.json").read_text()) for folder in pair]
    for name in ("pad", "bos", "eos"):
        number, before = (config.get(f"{name}_token_id") for config in reversed(configs))
        if before is not None and getattr(whole, f"{name}_token_id") is not None:
            assert small.convert_ids_to_tokens(number) == whole.convert_ids_to_tokens(before)


def test_a_second_cut_to_the_same_texts_changes_nothing(pair, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(pair[1]), "--texts", texts, "--field", "text", "--out", str(tmp_path / "again")])
    count = len(load_tokenizer(pair[1]))
    assert f"{count:,} of {count:,} tokens are kept" in capsys.readouterr().out


@pytest.mark.parametrize("at_once", [1, 10, 1 << 20])
def test_a_minimum_count_says_how_many_texts_have_other_tokens(tmp_path, capsys, monkeypatch, at_once):
    monkeypatch.setattr("hbt_fast.vocabulary.AT_ONCE", at_once)
    whole = save(tmp_path / "whole", wordpiece())
    texts = ["red cat", "red cat", "red cat", "bluebird", "red running"]
    file = write_texts(tmp_path / "texts.jsonl", texts)
    arguments = ["cut", "--model", str(whole), "--texts", file, "--field", "text", "--min_count", "2"]
    main([*arguments, "--out", str(tmp_path / "small")])
    was, now = ([len(ids) for ids in tokens(folder, texts)] for folder in (whole, tmp_path / "small"))
    others = sum(a != b for a, b in zip(was, now, strict=True))
    assert others == 2
    said = capsys.readouterr().out
    assert f"2 of 5 texts ({sum(was)} tokens) have other tokens than before: +{sum(now) - sum(was)} tokens" in said
    assert "+0 of them unknown; the first: 'bluebird'" in said


def test_the_lowest_score_stays_for_unknown_characters_cost_by_it(tmp_path):
    """ "a" is unknown and costs 70, 10 more than "zz". Without that it would cost 60, and "abc" be "a" and "bc"."""
    whole = save(
        tmp_path / "whole",
        unigram(scores={"\u2581": -1.0, "ab": -50.0, "c": -15.0, "bc": -1.0, "zz": -60.0, "z": -1.0}),
    )
    assert load_tokenizer(whole).tokenize("abc") == ["\u2581", "ab", "c"]
    file = write_texts(tmp_path / "texts.jsonl", ["abc", "bc"])
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    assert load_tokenizer(tmp_path / "small").tokenize("abc") == ["\u2581", "ab", "c"]


def test_a_token_stays_that_alone_has_a_character(tmp_path):
    scores = {"\u2581": -1.0, "a": -1.0, "b": -1.0, "a\u0142": -2.0, "ab": -2.0, "ba": -3.0}
    whole = save(tmp_path / "whole", unigram(scores=scores))
    file = write_texts(tmp_path / "texts.jsonl", ["ba"])
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    small = load_tokenizer(tmp_path / "small")
    assert not {"ab", "aaa"} & small.get_vocab().keys()
    assert small.tokenize("ba\u0142") == ["\u2581", "b", "a\u0142"]
    assert small.convert_ids_to_tokens(small("b?")["input_ids"]) == ["<s>", "\u2581", "b", "<unk>", "</s>"]


def test_words_that_end_as_unknown_stay_unknown(tmp_path):
    """ "ab" is matched in vain in "abx"; without it "a" and "##bx" would be."""
    from tokenizers import Tokenizer, models

    tokenizer = wordpiece()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "x", "##a", "##b", "ab", "##bx", "bbb"]
    vocabulary = {name: number for number, name in enumerate(names)}
    core["model"] = json.loads(Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).to_str())["model"]
    core["added_tokens"] = [{**one, "id": vocabulary[one["content"]]} for one in core["added_tokens"]]
    core["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    whole = save(tmp_path / "whole", tokenizer)
    file = write_texts(tmp_path / "texts.jsonl", ["abx", "bab"])
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    kept = set(load_tokenizer(tmp_path / "small").get_vocab())
    assert kept == set(names) - {"bbb"}


def test_positions_are_counted_from_the_padding_token_as_before(tmp_path):
    """The tokens before it stay, used or not."""
    tokenizer = unigram()
    pad = 150
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    whole = save(tmp_path / "whole", tokenizer)
    file = write_texts(tmp_path / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    old, small = Kept.read(str(tmp_path / "small")).old_k, tmp_path / "small"
    assert old[: pad + 1].tolist() == list(range(pad + 1))
    np.testing.assert_array_equal(
        Encoder.from_pretrained(small).encode(TEXTS), Encoder.from_pretrained(whole).encode(TEXTS)
    )


@pytest.mark.parametrize(("make", "family"), [(unigram, "XLMRoberta"), (wordpiece, "Bert")])
def test_a_head_for_masked_tokens_is_cut_too(tmp_path, make, family):
    import transformers

    whole = save(tmp_path / "whole", make(), "ForMaskedLM", tie_word_embeddings=False)
    file = write_texts(tmp_path / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    kind = getattr(transformers, f"{family}ForMaskedLM")
    models = [kind.from_pretrained(folder, output_loading_info=True) for folder in (whole, tmp_path / "small")]
    assert not any(info["missing_keys"] or info["unexpected_keys"] for _, info in models)
    old = torch.from_numpy(Kept.read(str(tmp_path / "small")).old_k)
    ids = torch.tensor([tokens(tmp_path / "small", TEXTS)[0]])
    with torch.inference_mode():
        before, now = models[0][0].eval()(old[ids]).logits[..., old], models[1][0].eval()(ids).logits
    torch.testing.assert_close(now, before, rtol=0, atol=1e-5)  # products of other sizes may round otherwise


def test_a_sentence_transformers_folder_stays_one(make_encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    from hbt_fast.encoder.export import export

    encoder = make_encoder()
    encoder.prompts |= {"query": "house ", "passage": "stone ", "topic": "wind "}
    encoder.pooling, encoder.max_length = "cls", 9
    encoder.dense = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh())
    whole = export(encoder, tmp_path / "whole")
    texts = ["en the red 7", "fr old"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    main(["cut", "--model", str(whole), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "small")])
    small = Encoder.from_pretrained(tmp_path / "small")
    assert (small.pooling, small.max_length, small.prompts) == ("cls", 9, encoder.prompts)
    for prompt in ("", "house ", "stone ", "wind "):  # the recorded prompts' tokens were kept, without being named
        np.testing.assert_array_equal(small.encode(texts, prompt), encoder.eval().encode(texts, prompt))
    theirs = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(theirs.encode(texts, prompt_name="topic"), small.encode(texts, "wind "), atol=2e-6)


def test_ids_that_config_json_leaves_to_its_class_are_written(tmp_path):
    whole = save(tmp_path / "whole", wordpiece())
    config = json.loads((whole / "config.json").read_text())
    del config["pad_token_id"]
    (whole / "config.json").write_text(
        json.dumps(config | {"cls_token_id": 22, "eos_token_id": [5, 22], "image_token_id": 10**6})
    )
    assert load_tokenizer(whole).convert_ids_to_tokens(22) == "[CLS]"
    file = write_texts(tmp_path / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    made, tokenizer = json.loads((tmp_path / "small" / "config.json").read_text()), load_tokenizer(tmp_path / "small")
    assert made["cls_token_id"] == tokenizer.cls_token_id < 22
    assert made["pad_token_id"] == tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(made["eos_token_id"]) == [FILLERS[4], "[CLS]"]  # which no text has
    assert made["image_token_id"] is None  # no row of the model, and none of the small one
    assert made["vocab_size"] == len(tokenizer)


def test_weights_keep_their_type_and_are_in_one_file(tmp_path):
    from transformers import AutoModel

    whole = save(tmp_path / "whole", unigram())
    model = AutoModel.from_pretrained(whole, dtype=torch.float16)
    (whole / "model.safetensors").unlink()
    model.save_pretrained(whole, max_shard_size="8KB")
    assert (whole / "model.safetensors.index.json").exists()
    file = write_texts(tmp_path / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as opened:
        assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118
    assert not list((tmp_path / "small").glob("*.index.json"))
    np.testing.assert_array_equal(
        Encoder.from_pretrained(tmp_path / "small").encode(TEXTS), Encoder.from_pretrained(whole).encode(TEXTS)
    )


@pytest.mark.parametrize(
    ("kind", "named"),
    [("unigram", "XLMRobertaTokenizer"), ("wordpiece", "BertTokenizer"), ("byte-level bpe", "RobertaTokenizer")],
)
def test_tokenizers_that_transformers_builds_by_a_class_are_cut_as_they_are_built(tmp_path, kind, named):
    whole = save(tmp_path / "whole", KINDS[kind]())
    settings = json.loads((whole / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": named, "padding_side": "left"}
    (whole / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(load_tokenizer(whole)).__name__ == named
    file = write_texts(tmp_path / "texts.jsonl", TEXTS)
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    old, small = Kept.read(str(tmp_path / "small")).old_k, load_tokenizer(tmp_path / "small")
    assert small(TEXTS).keys() == load_tokenizer(whole)(TEXTS).keys()
    assert [old[ids].tolist() for ids in small(TEXTS)["input_ids"]] == tokens(whole, TEXTS)
    assert small.padding_side == "left"
    written = {path.name for path in (tmp_path / "small").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_texts_are_read_to_their_end(tmp_path):
    """A truncation that is written in tokenizer.json is not the length limit of training."""
    whole = save(tmp_path / "whole", unigram())
    core = json.loads((whole / "tokenizer.json").read_text(encoding="utf-8"))
    core["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (whole / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    file = write_texts(tmp_path / "texts.jsonl", texts := ["red green bluebird running stone"])
    main(["cut", "--model", str(whole), "--texts", file, "--field", "text", "--out", str(tmp_path / "small")])
    np.testing.assert_array_equal(
        Encoder.from_pretrained(tmp_path / "small").encode(texts), Encoder.from_pretrained(whole).encode(texts)
    )


def test_texts_that_sentence_transformers_puts_into_lower_case_are(tmp_path):
    """Lower case is put into tokenizer.json, from which BertTokenizer would not take it."""
    whole = save(tmp_path / "whole", wordpiece())
    settings = json.loads((whole / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (whole / "tokenizer_config.json").write_text(json.dumps(settings))
    (whole / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True, "max_seq_length": 32}))
    (tmp_path / "texts.txt").write_text("RED Blue", encoding="utf-8")
    main(["cut", "--model", str(whole), "--texts", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "small")])
    assert json.loads((tmp_path / "small" / "sentence_bert_config.json").read_text())["do_lower_case"] is False
    small = Encoder.from_pretrained(tmp_path / "small")
    assert small.tokenizer.tokenize("RED Blue") == load_tokenizer(whole).tokenize("red blue")
    np.testing.assert_array_equal(small.encode(["RED Blue"]), Encoder.from_pretrained(whole).encode(["red blue"]))


def test_a_vocabulary_with_ids_that_change_places_is_refused(tmp_path, capsys):
    """An added token whose id is not after those of the model's own: the tokenizers library would put it there."""
    from tokenizers import Tokenizer, models

    tokenizer = wordpiece()
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    vocabulary = {**{name: number for number, name in enumerate(names)}, "c": 50}
    core["model"] = json.loads(Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")).to_str())["model"]
    core["added_tokens"] = [{**one, "id": vocabulary[one["content"]]} for one in core["added_tokens"]]
    core["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
    tokenizer.add_tokens(["new"])
    assert tokenizer.convert_tokens_to_ids("new") < 50
    whole = save(tmp_path / "whole", tokenizer, vocab_size=51)
    file = write_texts(tmp_path / "texts.jsonl", ["c"])
    out = ["--out", str(tmp_path / "small")]
    assert status(main, ["cut", "--model", str(whole), "--texts", file, "--field", "text", *out]) == 2
    assert "its added tokens are not the last ones, or a token is there twice" in capsys.readouterr().err


def test_the_texts_of_a_run_are_those_of_its_sources_and_lexicons_with_its_prompts(tmp_path, capsys):
    whole = save(tmp_path / "whole", unigram())
    rows = [{"query": "red cat", "passage": "reddish bluebird", "negatives": ["running"]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "en_ru.tsv").write_text("cat\tпривет\n", encoding="utf-8")
    settings = [
        f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}, language: en}}]",
        "model.query_prompt=bird ",
        "model.passage_prompt=stone ",
        f"batch.code_switch.lexicons=[{tmp_path / 'en_ru.tsv'}]",
    ]
    main(["cut", "--model", str(whole), *settings, "--out", str(tmp_path / "small")])
    texts = ["bird red cat", "stone reddish bluebird", "stone running", "cat привет"]
    assert f"{len(texts)} texts (" in capsys.readouterr().out
    old = Kept.read(str(tmp_path / "small")).old_k
    assert [old[ids].tolist() for ids in tokens(tmp_path / "small", texts)] == tokens(whole, texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which texts? Give the settings of the run (--config FILE.yaml) or files (--texts FILE ...)"),
        (["{source}", "data.languages=[fr]"], "there is no text to keep the tokens of; name other files or sources"),
        (["--texts", "{file}", "--field", "text", "--min_count", "0"], "must be a whole number from 1 on, not 0"),
        (["--texts", "{file}"], "holds JSON Lines; say which field is the text"),
        (["--mincount", "3", "--texts", "{file}"], "mincount"),
    ],
)
def test_mistakes_on_the_command_line_are_said(tmp_path, capsys, arguments, message):
    whole = save(tmp_path / "whole", unigram())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "red", "passage": "blue"}))
    source = f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}, language: en}}]"
    places = {"{file}": write_texts(tmp_path / "t.jsonl", TEXTS), "{source}": source}
    arguments = [places.get(one, one) for one in arguments]
    assert status(main, ["cut", "--model", str(whole), *arguments, "--out", str(tmp_path / "small")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def _word_level(core):
    names = {name: number for number, name in enumerate(core["model"]["vocab"])}
    core["model"] = {"type": "WordLevel", "vocab": names, "unk_token": "[UNK]"}


def _draws(core):
    core["model"]["dropout"] = 0.1


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("wordpiece", _word_level, "its tokenizer is a WordLevel model; Unigram, BPE, WordPiece can be cut"),
        ("byte-level bpe", _draws, 'its tokenizer draws merges at random ("dropout" in tokenizer.json)'),
    ],
)
def test_tokenizers_that_cannot_be_cut_are_told(tmp_path, capsys, kind, change, message):
    whole = save(tmp_path / "whole", KINDS[kind]())
    core = json.loads((whole / "tokenizer.json").read_text(encoding="utf-8"))
    change(core)
    (whole / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    file = write_texts(tmp_path / "t.jsonl", ["red"])
    out = ["--out", str(tmp_path / "small")]
    assert status(main, ["cut", "--model", str(whole), "--texts", file, "--field", "text", *out]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_there_is_not_written_over(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert status(main, ["cut", "--model", "m", "--texts", "t", "--out", str(tmp_path / "out")]) == 2
    assert "is there and not empty; name another folder" in capsys.readouterr().err.replace("which ", "")
