"""What a tokenizer makes of the texts is looked at before it is trained on: unknown tokens, and texts that are cut."""

import pytest
from conftest import build_store, parallel_rows

from hbt_fast.config import parse
from hbt_fast.data import tokens_seen as module
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.store import Role
from hbt_fast.data.tokens_seen import TokensSeen, check_unknown, tokens_seen
from hbt_fast.encoder.export import export
from hbt_fast.prepare import prepare

QUERY, PASSAGE = Role("Query: ", 40), Role("Passage: ", 40)


@pytest.fixture
def look(tokenizer, tmp_path):
    def made(rows):
        (source,) = build_store(tmp_path, [("s", None, rows)], tokenizer, QUERY, PASSAGE).sources
        return tokens_seen(source, tokenizer)

    return made


def test_shares_are_those_that_the_tokenizer_gives(look, tokenizer):
    rows = [Row({"en": f"red {i}", "ru": f"ж {i}"}, {"en": f"the blue {i}", "ru": "голубой 7"}) for i in range(30)]
    seen = {one.language: one for one in look(rows)}
    assert list(seen) == ["en", "ru"]
    for code, one in seen.items():
        texts = dict.fromkeys(row.queries[code] for row in rows), dict.fromkeys(row.passages[code] for row in rows)
        assert (one.queries, one.passages) == tuple(map(len, texts))
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for part in texts for text in part]
        assert one.unknown == sum(list.count(i, tokenizer.unk_token_id) for i in ids)
        assert one.tokens == pytest.approx(sum(map(len, ids)), abs=len(ids))  # prompt and text may share a token
    assert seen["en"].unknown_share == 0
    assert 0.2 < seen["ru"].unknown_share < 1


def test_of_texts_without_a_prompt_every_token_is_counted_and_no_special_one(tokenizer, tmp_path):
    rows = [Row({"en": f"red {i}"}, {"en": f"ж blue {i}"}) for i in range(9)]
    plain = Role("", 40)
    (source,) = build_store(tmp_path, [("s", None, rows)], tokenizer, plain, plain).sources
    (one,) = tokens_seen(source, tokenizer)
    texts = [text["en"] for row in rows for text in (row.queries, row.passages)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert one.tokens == sum(map(len, ids))
    assert one.unknown == sum(found.count(tokenizer.unk_token_id) for found in ids) > 0


def test_texts_at_the_limit_are_counted(look):
    rows = [Row({"en": "red"}, {"en": "blue " * (50 if i % 3 == 0 else 1) + str(i)}) for i in range(9)]
    (one,) = look(rows)
    assert (one.queries, one.passages, one.cut_queries, one.cut_passages) == (1, 9, 0, 3)


def test_the_first_texts_are_looked_at_whatever_the_size_of_a_block(look, monkeypatch):
    whole = look(parallel_rows(40))
    monkeypatch.setattr(module, "BLOCK", 7)
    assert look(parallel_rows(40)) == whole
    monkeypatch.setattr(module, "FIRST", 5)
    assert {(one.queries, one.passages) for one in look(parallel_rows(40))} == {(5, 5)}


def seen(unknown, tokens=100):
    return TokensSeen("s", "ru", 5, 5, tokens, unknown, 0, 0)


def test_a_high_share_is_said_and_an_extreme_one_refused():
    assert check_unknown([seen(4)], "m") == []
    said = "5% of the tokens of language 'ru' in source 's' are unknown to the tokenizer: it hardly fits this language"
    assert check_unknown([seen(5)], "m") == [said]
    with pytest.raises(DataError, match=r"50% .* take a model.path whose tokenizer knows the language \(that of m"):
        check_unknown([seen(4), seen(50)], "m")
    with pytest.raises(DataError, match=r"raise model\.scratch\.vocabulary"):
        check_unknown([seen(99)], None)
    assert len(check_unknown([seen(9, tokens=10)], "m")) == 1  # too few to refuse


def test_preparing_refuses_data_that_the_tokenizer_does_not_know(make_encoder, tmp_path, capsys):
    folder = export(make_encoder(), tmp_path / "model")
    lines = [f'{{"query": "что {i} это", "passage": "вот это {i}", "language": "ru"}}\n' for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = [f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]", f"data.store_dir={tmp_path / 'stores'}"]
    with pytest.raises(DataError, match="of the tokens of language 'ru' in source 'rows' are unknown"):
        prepare(parse("test", "", [f"model.path={folder}", *settings]))
    prepare(parse("test", "", settings))  # an encoder from nothing learns the characters
    assert "unknown" not in capsys.readouterr().out


def test_a_byte_level_tokenizer_has_no_unknown_tokens(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    core.train_from_iterator(["red"], trainer)
    ends = [("<|end|>", core.token_to_id("<|end|>"))]
    core.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=ends)
    names = {"unk_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}  # as GPT-2 has it
    byte_level = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    rows = [Row({"ru": f"что {i}"}, {"ru": f"это {i}"}) for i in range(9)]
    (source,) = build_store(tmp_path, [("s", None, rows)], byte_level, QUERY, PASSAGE).sources
    (one,) = tokens_seen(source, byte_level)
    assert (one.unknown, one.tokens > 50) == (0, True)
