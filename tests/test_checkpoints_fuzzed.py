"""Whatever stands in a checkpoint's files, the result is a finite vector or an error that the user can mend."""

import json
import os
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbt_fast.base.errors import UserError
from hbt_fast.encoder import Encoder
from hbt_fast.encoder.export import export

EXAMPLES = int(os.environ.get("HBT_FUZZ", "100"))  # of each kind
TEXTS = ["en the red blue 7", "de which green, \u4e2d\u6587", "x"]
FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
]
KEYS = {  # that a file may have besides those that it has
    "attn_implementation": ["evil/kernel", "flash_attention_2", 5],
    "_attn_implementation": ["evil/kernel", {"": "evil/kernel"}],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {}, "gptq"],
    "auto_map": [{"AutoModel": "own.Own", "AutoConfig": "own.Own"}, [], "x"],
    "transformers_weights": ["../../x.safetensors", 3],
    "num_labels": [10**9, "x"],
    "path": ["../outside", "/etc", "\0"],
    "max_seq_length": ["x", 0, -1, 10**30, 2.5],
    "do_lower_case": ["no", 1],
    "prompts": [{"query": 5}, [], {"query": None}, "x"],
    "default_prompt_name": ["absent", 5],
    "normalizer": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in ("(", "(?<=a+)b", "(a*)*$")
    ],
    "post_processor": [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[ZZ]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": special,
        }
        for special in ({}, {"[ZZ]": {"id": "[ZZ]", "ids": [99999], "tokens": ["[ZZ]"]}})
    ],
}
VALUES = [None, True, False, 0, -1, 1, 7, 10**6, 10**12, -(10**400), 0.5, 1e308, float("nan"), "", "x", "../x", [], {}]
VALUES += [[None], ["x"], {"x": 1}, [[[]]], "cls_token", "gpt2", "bert"]
RAW = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"3",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 5000,
    b'{"hidden_size": ' + b"9" * 5000 + b"}",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    from hbt_fast.encoder.scratch import ScratchConfig, encoder_from_scratch

    encoder = encoder_from_scratch(tokenizer, ScratchConfig(len(tokenizer), 8, 1, 2), max_length=32, dropout=0, seed=0)
    encoder.dense = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh())
    return export(encoder, tmp_path_factory.mktemp("whole") / "model")


def loads_or_says(folder):
    """A vector of every text, or the message of a UserError; anything else that is raised goes on."""
    try:
        vectors = Encoder.from_pretrained(folder).encode(TEXTS)
    except UserError as error:
        return str(error)
    assert np.isfinite(vectors).all()
    assert len(vectors) == len(TEXTS)
    return None


@pytest.fixture
def damaged(whole, tmp_path):
    def damage(name, content):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        (folder / name).write_bytes(content)
        return loads_or_says(folder)

    return damage


def places(value, path=()):
    """The paths to all values in JSON."""
    yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if len(path) < 4:
            yield from places(one, (*path, key))


@st.composite
def changes(draw, content):
    """JSON with one to three values replaced, removed or added."""
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from([path for path in places(content) if path] or [()]))
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if not where or kind == "add":
            key = draw(st.sampled_from(sorted(KEYS)))
            target = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else content
            if isinstance(target, dict):
                target[key] = deepcopy(draw(st.sampled_from(KEYS[key])))  # it may be changed in turn
            continue
        inner = content
        for key in where[:-1]:
            inner = inner[key]
        if kind == "remove":
            del inner[where[-1]]
        else:
            inner[where[-1]] = deepcopy(draw(st.sampled_from(VALUES) | st.integers(-3, 70) | st.text(max_size=3)))
    return content


FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="HBT_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@FUZZ
@given(data=st.data())
def test_changed_json_loads_or_is_refused(data, damaged, whole):
    name = data.draw(st.sampled_from(FILES))
    content = json.loads((whole / name).read_text(encoding="utf-8"))
    changed = data.draw(changes(content))
    damaged(name, json.dumps(changed).encode("utf-8", "surrogatepass"))


@settings(FUZZ, max_examples=EXAMPLES // 4)
@given(data=st.data())
def test_weights_with_changed_bytes_load_or_are_refused(data, damaged, whole):
    name = data.draw(st.sampled_from(["model.safetensors", "2_Dense/model.safetensors"]))
    content = bytearray((whole / name).read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    damaged(name, bytes(content[: data.draw(st.none() | st.integers(0, len(content)))]))


@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json", "adapter_config.json"])
def test_no_kind_of_broken_json_is_a_traceback(damaged, name):
    for content in RAW:
        said = damaged(name, content)
        assert said is None or "damaged" in said  # the folder's name
