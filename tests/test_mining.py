"""Mined negatives against the plain definition: sort all candidates, drop what may not be one, take the first."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import parallel_rows

from hbt_fast import mine as program
from hbt_fast.config import Config, ModelConfig
from hbt_fast.data import mining
from hbt_fast.data.mining import MiningConfig
from hbt_fast.data.rows import Row
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.store import folded
from hbt_fast.encoder.export import export
from hbt_fast.evaluation import search as faiss_search

OPEN = MiningConfig(num_negatives=4, range_min=0, range_max=6, absolute_margin=None, sampling_strategy="top")


@cache
def drawn(text, d):
    return np.random.default_rng(list(text.encode())).integers(-2, 3, d).astype(np.float32) / 4


class Mock:
    """Vectors on a coarse grid, a function of prompt and text: equal scores are frequent, and exact in any order."""

    def __init__(self, chosen=(), d=4):
        self.chosen, self.d, self.encoded = dict(chosen), d, []

    def vector(self, text, prompt):
        return np.array(self.chosen[text], np.float32) if text in self.chosen else drawn(prompt + text, self.d)

    def encode(self, texts, prompt=""):
        self.encoded += [prompt + text for text in texts]
        return np.stack([self.vector(text, prompt) for text in texts])


def dump(rows, path):
    records = [
        {"query": r.queries, "passage": r.passages, "negatives": r.negatives, "content": r.content} for r in rows
    ]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def arguments(settings):
    made = []
    for name, value in vars(settings).items():
        made += [f"--{name}", "null" if value is None else str(value)]
    return made


@pytest.fixture
def run(tokenizer, tmp_path):
    """Mines made-up sources: name -> rows. Gives the records written."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def mine(sources, settings, encoder=None, *more, out="mined.jsonl"):
        for name, rows in sources.items():
            dump(rows, tmp_path / f"{name}.jsonl")
        given = ", ".join(f"{{name: {name}, path: {tmp_path / name}.jsonl}}" for name in sources)
        command = ["--model", "mock", "--out", str(tmp_path / out), *arguments(settings), *more, "--output_scores"]
        command[:0] = ["--query_prompt", "Query: ", "--passage_prompt", "Passage: "]
        command += [f"model.path={tmp_path / 'tokenizer'}", f"data.store_dir={tmp_path / 'stores'}"]
        program.main([*command, f"data.sources=[{given}]"], lambda *_: (encoder or Mock(), "mock"))
        written = tmp_path / out
        return [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else None

    return mine


def components(sources):
    """A number for every row: equal where rows share a passage text, in any source, or a source's content id."""
    keys = [
        {folded(t) for t in row.passages.values()} | ({(name, row.content)} if row.content else set())
        for name, rows in sources.items()
        for row in rows
    ]
    label = list(range(len(keys)))
    for _ in keys:
        label = [min(label[j] for j in range(len(keys)) if keys[i] & keys[j]) for i in range(len(keys))]
    return label


def positive_of(row, language):
    """(language, text) of the positive, by its definition, or None."""
    if language in row.passages and folded(row.passages[language]) != folded(row.queries[language]):
        return language, row.passages[language]
    codes = sorted(row.queries.keys() | row.passages.keys())
    place = codes.index(language)
    for code in codes[place + 1 :] + codes[:place]:
        if code in row.passages and folded(row.passages[code]) != folded(row.queries[language]):
            return code, row.passages[code]
    return None


def oracle(sources, settings, encoder, prompts=("Query: ", "Passage: ")):
    """Per row and query language: (rank, score, language, text) of all candidates that may be taken."""
    rows, label = [row for rows in sources.values() for row in rows], components(sources)
    pool = {}
    for i, row in enumerate(rows):
        for code in sorted(row.passages):
            key = (folded(row.passages[code]), code if settings.pool == "language" else None)
            pool.setdefault(key, (code, row.passages[code], label[i]))
    answers = {}
    for i, row in enumerate(rows):
        for text in row.queries.values():
            answers.setdefault(folded(text), set()).add(label[i])
    result = []
    for row in rows:
        result.append({})
        for code in sorted(row.queries):
            if (positive := positive_of(row, code)) is None:
                continue
            q = encoder.vector(row.queries[code], prompts[0]).astype(float)
            own_score = q @ encoder.vector(positive[1], prompts[1])
            there = [c for c in pool.values() if settings.pool == "all" or c[0] == positive[0]]
            scored = [(q @ encoder.vector(text, prompts[1]), lang, text, content) for lang, text, content in there]
            others = [c for c in sorted(scored, key=lambda c: -c[0]) if c[3] not in answers[folded(row.queries[code])]]
            limits = [np.inf if settings.max_score is None else settings.max_score]
            if settings.absolute_margin is not None:
                limits.append(own_score - settings.absolute_margin)
            if settings.relative_margin is not None:
                limits.append(own_score - abs(own_score) * settings.relative_margin)
            low = -np.inf if settings.min_score is None else settings.min_score
            result[-1][code] = [
                (rank, score, lang, text)
                for rank, (score, lang, text, _) in enumerate(others, 1)
                if settings.range_min < rank <= settings.range_max and low <= score <= min(limits)
            ]
    return result


def made_up(seed, size=25):
    """Two sources with shared and repeated texts, missing languages, bitext, repeated questions, content ids."""
    rng, sources = np.random.default_rng(seed), {}
    for name in ("one", "two"):
        sources[name] = rows = []
        for i in range(size):
            codes = ["de", "en", "fr"][: rng.integers(1, 4)]
            passages = {
                c: f"{c} text {rng.integers(60)}{' ' * rng.integers(1, 3)}x" for c in codes if rng.random() < 0.8
            }
            passages = passages or {"en": f"EN text {rng.integers(60)} x"}
            queries = {c: f"{c} ask {rng.integers(40)}" for c in codes}
            if rng.random() < 0.15 and len(passages) > 1:
                queries = passages
            negatives = {"en": (f"en text {rng.integers(60)} x", "kept")} if rng.random() < 0.3 else {}
            rows.append(Row(queries, passages, negatives, f"c{i // 2}" if rng.random() < 0.2 else None))
    return sources


VARIANTS = [
    {},
    {"pool": "all"},
    {"range_min": 3, "range_max": 9},
    {"absolute_margin": 0.25, "range_min": 2, "range_max": 20},
    {"relative_margin": 0.25, "pool": "all", "range_max": 400},
    {"max_score": 0.5, "min_score": 0.25, "range_max": 50},
    {"sampling_strategy": "random", "range_min": 1, "range_max": 12, "absolute_margin": 0.0},
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_what_is_mined_is_what_sorting_everything_gives(run, variant, monkeypatch):
    spare = 16 * (variant % 2)
    monkeypatch.setattr(mining, "SPARE", spare)  # 0: FAISS gives too few at first, and cuts through ties
    monkeypatch.setattr(mining, "CELLS", 50)
    monkeypatch.setattr(program, "CHUNK", 7)
    settings = replace(OPEN, **VARIANTS[variant])
    sources = made_up(variant)
    records = run(sources, settings)
    assert records is not None
    rows = [row for rows in sources.values() for row in rows]
    seen = 0
    for row, record, expected in zip(rows, records, oracle(sources, settings, Mock()), strict=True):
        assert record["mined"].keys() == expected.keys()
        for code, fits in expected.items():
            taken = [(n["rank"], n["score"], n["language"], n["text"]) for n in record["mined"][code]["negatives"]]
            if settings.sampling_strategy == "top":
                assert taken == fits[: settings.num_negatives]
            else:
                assert len(taken) == min(len(fits), settings.num_negatives)
                assert taken == [one for one in fits if one in taken]
            seen += len(taken)
        merged = {code: list(texts) for code, texts in row.negatives.items()}
        for code in sorted(expected):
            for n in record["mined"][code]["negatives"]:
                known = {folded(text) for text in merged.setdefault(n["language"], [])}
                merged[n["language"]] += [n["text"]] if folded(n["text"]) not in known else []
        assert {c: t for c, t in record.get("negatives", {}).items() if t} == {c: t for c, t in merged.items() if t}
    assert seen > 50


def test_negatives_are_those_of_sentence_transformers(run):
    datasets = pytest.importorskip("datasets")
    utility = pytest.importorskip("sentence_transformers.util")
    import torch

    rng = np.random.default_rng(3)
    names = [f"{kind} {i}" for i in range(60) for kind in ("ask", "text")]
    encoder = Mock({name: v / np.linalg.norm(v) for name, v in zip(names, rng.normal(size=(120, 8)), strict=True)})

    class Model:
        device = torch.device("cpu")

        def encode_query(self, texts, **_):
            return encoder.encode(texts)

        encode_document = encode_query

        def similarity(self, a, b):
            return torch.as_tensor(a) @ torch.as_tensor(b).T

        def similarity_pairwise(self, a, b):
            return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)

    pairs = {"query": [f"ask {i}" for i in range(60)], "passage": [f"text {i}" for i in range(60)]}
    rows = [Row({"en": q}, {"en": p}) for q, p in zip(*pairs.values(), strict=True)]
    for options in (
        {"range_min": 5, "range_max": 20},
        {"relative_margin": 0.1},
        {"absolute_margin": 0.2},
        {"max_score": 0.3},
    ):
        settings = replace(OPEN, **{"range_max": 59} | options)
        theirs = utility.mine_hard_negatives(
            datasets.Dataset.from_dict(pairs), Model(), num_negatives=4, verbose=False, **{"range_max": 59} | options
        )
        ours = [
            (r["query"]["en"], n)
            for r in run({"s": rows}, settings, encoder)
            for n in r.get("negatives", {}).get("en", [])
        ]
        assert ours == list(zip(theirs["query"], theirs["negative"], strict=True))


def rows_of(path):
    return [replace(row, where="") for row in read_source(Source(str(path)))]


def test_the_file_is_a_source_of_the_same_rows_in_the_same_order(run, tmp_path):
    sources = {"one": made_up(5)["one"]}
    run(sources, OPEN)
    dump(sources["one"], tmp_path / "one.jsonl")
    before, after = rows_of(tmp_path / "one.jsonl"), rows_of(tmp_path / "mined.jsonl")
    assert [replace(row, negatives={}) for row in after] == [replace(row, negatives={}) for row in before]
    for old, new in zip(before, after, strict=True):
        for code, texts in old.negatives.items():
            assert new.negatives[code][: len(texts)] == texts
    assert sum(len(t) for r in after for t in r.negatives.values()) > 2 * len(after)


def test_several_sources_in_one_file_keep_their_contents_apart_and_may_have_a_file_each(run, tmp_path):
    sources = {
        name: [Row({"en": f"{name} {i}"}, {"en": f"{name} say {i}"}, {}, str(i)) for i in range(4)] for name in "ab"
    }
    records = run(sources, OPEN)
    assert len({record["content"] for record in records}) == 8
    assert [record["source"] for record in records] == list("aaaabbbb")
    run(sources, OPEN, None, out="{source}-mined.jsonl")
    for name in "ab":
        assert [row.content for row in rows_of(tmp_path / f"{name}-mined.jsonl")] == list("0123")


def test_again_nothing_is_encoded_and_the_file_is_the_same_byte_for_byte(run, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "CHUNK", 7)
    settings = replace(OPEN, sampling_strategy="random", range_max=30, seed=3)
    sources, first, again, third = made_up(9), Mock(), Mock(), Mock()
    run(sources, settings, first)
    distinct = {
        (role, t)
        for rows in sources.values()
        for r in rows
        for role in ("queries", "passages")
        for t in getattr(r, role).values()
    }
    assert len(first.encoded) >= len(distinct)
    assert len(first.encoded) <= 2 * len(distinct)  # a text of both sources is encoded for each
    one = (tmp_path / "mined.jsonl").read_bytes()
    run(sources, settings, again, out="again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == one
    assert again.encoded == []
    damaged = next(iter((tmp_path / "stores" / "embeddings").glob("*.npy")))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    run(sources, settings, third, "--query_prompt", "Query: ", out="again.jsonl")
    assert 0 < len(third.encoded) <= 7
    assert (tmp_path / "again.jsonl").read_bytes() == one
    run(sources, replace(settings, seed=4), again, out="again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() != one
    assert again.encoded == []
    run(sources, settings, again, "--query_prompt", "q: ", out="again.jsonl")
    assert again.encoded
    assert all(text.startswith("q: ") for text in again.encoded)


def test_what_is_drawn_is_spread_evenly_and_does_not_depend_on_the_order_of_the_rows(run):
    settings = replace(OPEN, sampling_strategy="random", range_min=2, range_max=12, num_negatives=5)
    rows = [Row({"en": f"ask {i}"}, {"en": f"text {i}"}) for i in range(400)]
    rng = np.random.default_rng(0)
    encoder = Mock({f"{kind} {i}": rng.normal(size=8) for i in range(400) for kind in ("ask", "text")})
    ranks, texts = [], []
    for order in (rows, rows[::-1]):
        records = run({"s": order}, settings, encoder)
        ranks.append(np.bincount([n["rank"] for r in records for n in r["mined"]["en"]["negatives"]], minlength=14))
        texts.append({r["query"]["en"]: r["negatives"]["en"] for r in records})
    assert texts[0] == texts[1]
    assert ranks[0][:3].sum() == ranks[0][13:].sum() == 0
    assert abs(ranks[0][3:13] - 200).max() < 5 * (400 * 0.25) ** 0.5  # each of ten ranks with probability one half


@pytest.mark.parametrize(
    ("rows", "settings", "line"),
    [
        ([Row({"en": "q"}, {"en": "p"})], {}, "the pool has no more candidates"),
        ([Row({"en": f"q{i}"}, {"en": f"p{i}"}, {}, "c") for i in range(9)], {}, "of the query's own content"),
        ([Row({"en": f"q{i}"}, {"en": f"p{i}"}) for i in range(9)], {"max_score": -9.0}, "score too near"),
        ([Row({"en": "p", "de": "d"}, {"en": "P"})], {}, "no passage that is not the query itself"),
    ],
)
def test_the_summary_says_why_there_are_fewer(run, capsys, rows, settings, line):
    records = run({"s": rows}, replace(OPEN, **settings))
    assert all("negatives" not in record for record in records)
    said = capsys.readouterr().out
    assert line in said
    assert f"{len(rows) if line[0] in 'os' else 1:,}  " in next(text for text in said.splitlines() if line in text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_negatives", "0"], "num_negatives is 0; write a number of 1 or more"),
        (["--range_max", "2"], "range_min 0 and range_max 2 leave 2 candidates, of which num_negatives 4"),
        (["--absolute_margin", "-1"], "absolute_margin is -1.0; write a number of 0 or more"),
        (["--out", "mined.json"], "--out is mined.json; name the file to write, ending in .jsonl"),
        (["--data.langauges", "[en]"], "did you mean data.languages?"),
        (["--pool", "none"], "invalid choice"),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(run, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        run({"s": [Row({"en": "q"}, {"en": "p"})]}, OPEN, None, *more)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_faiss_is_named_before_anything_is_encoded(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    encoder = Mock()
    with pytest.raises(SystemExit) as stop:
        run({"s": [Row({"en": "q"}, {"en": "p"})]}, OPEN, encoder)
    assert stop.value.code == 2
    assert "pip install faiss-cpu" in capsys.readouterr().err
    assert encoder.encoded == []


def test_vectors_that_are_none_stop_the_run(run, capsys):
    with pytest.raises(SystemExit):
        run({"s": [Row({"en": "q"}, {"en": "p"})]}, OPEN, Mock({"p": [np.nan] * 4}))
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["encode", "search", "write"])
def test_a_run_that_stops_leaves_no_half_file_and_the_next_one_goes_on(run, tmp_path, monkeypatch, where):
    monkeypatch.setattr(program, "CHUNK", 7)
    sources, encoder, calls = made_up(2), Mock(), count()
    (tmp_path / "mined.jsonl").write_text("earlier\n")

    def stopping(function, after):
        def call(*given, **named):
            if next(calls) == after:
                raise KeyboardInterrupt
            return function(*given, **named)

        return call

    owner, name, after = {
        "encode": (encoder, "encode", 5),
        "search": (faiss_search, "search", 1),
        "write": (program, "_record", 20),
    }[where]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, stopping(original, after))
    with pytest.raises(SystemExit, match="130"):
        run(sources, OPEN, encoder)
    monkeypatch.setattr(owner, name, original)
    assert (tmp_path / "mined.jsonl").read_text() == "earlier\n"
    assert not list(tmp_path.glob("*.begun"))
    before = len(encoder.encoded)
    run(sources, OPEN, encoder)
    whole = Mock()
    run(sources, OPEN, whole, "--cache", str(tmp_path / "other"), out="other.jsonl")
    assert sorted(encoder.encoded) == sorted(whole.encoded)
    assert len(encoder.encoded) > before or where != "encode"
    assert (tmp_path / "mined.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_rows_that_changed_meanwhile_are_not_mixed_up(run, tmp_path, capsys, monkeypatch):
    rows = [Row({"en": f"q{i}"}, {"en": f"p{i}"}) for i in range(9)]
    for changed, message in (
        (rows[:4] + rows[5:] + rows[4:5], "has changed"),
        (rows[:8], "fewer rows"),
        (rows + rows[:1], "changed"),
    ):
        monkeypatch.setattr(
            program, "mine", lambda *a, c=changed, **k: (dump(c, tmp_path / "s.jsonl"), mining.mine(*a, **k))[1]
        )
        with pytest.raises(SystemExit):
            run({"s": rows}, OPEN)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "mined.jsonl").exists()


def test_embeddings_are_kept_apart_by_everything_that_makes_them(make_encoder, tmp_path):
    def name(weight=0.1, pooling="mean", **settings):
        encoder = make_encoder()
        dense = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh())
        for p in dense.parameters():
            torch.nn.init.constant_(p, weight)
        encoder.dense, encoder.pooling = dense, pooling
        folder = export(encoder, tmp_path / "model")
        return program.load_encoder(str(folder), Config(model=ModelConfig(**settings)))[1]

    assert name() == name()
    assert len({name(), name(weight=0.2), name(pooling="cls"), name(max_length=16)}) == 4


def test_the_program_with_a_real_encoder_killed_and_run_again(make_encoder, tmp_path):
    encoder = make_encoder()
    export(encoder, tmp_path / "model")
    dump(parallel_rows(60), tmp_path / "rows.jsonl")
    command = [
        sys.executable,
        "-m",
        "hbt_fast.mine",
        "--out",
        str(tmp_path / "m.jsonl"),
        "--range_min",
        "0",
        "--absolute_margin",
        "null",
    ]
    command += [f"model.path={tmp_path / 'model'}", f"data.store_dir={tmp_path / 'stores'}"]
    command += [f"data.sources=[{{path: {tmp_path / 'rows.jsonl'}}}]"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    until = time.monotonic() + 60
    while (
        not list((tmp_path / "stores").glob("embeddings/*.npy")) and time.monotonic() < until and killed.poll() is None
    ):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stores" / "embeddings").glob("*.npy")}
    assert kept
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "360 queries, 8.00 negatives each" in done.stdout
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stores" / "embeddings").glob("*.npy")}
    assert kept.items() <= now.items()
    rows = rows_of(tmp_path / "m.jsonl")
    assert len(rows) == 120
    for row in rows:
        for code, texts in row.negatives.items():
            assert len(texts) == 8
            assert row.passages[code] not in texts
            assert all(text.startswith(code) for text in texts)
    assert Path(tmp_path / "m.jsonl").read_text().count("\n") == 120
