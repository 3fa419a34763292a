"""What a built store holds: the texts as read, their tokens as the tokenizer gives them, what all rows share once."""

import json

import numpy as np
import pytest
import xxhash
from conftest import build_store, parallel_rows

from hbt_fast.config import parse
from hbt_fast.data.build import build_source
from hbt_fast.data.rows import DataError, Row
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.store import Role, SourceStore, at, span
from hbt_fast.prepare import prepare, summary

ROLES = Role("Query: ", 10), Role("Passage: ", 14)


def build(folder, rows, tokenizer, **options):
    return build_source(folder, "made", rows, tokenizer, *ROLES, progress=False, **options)


def read_back(store):
    """The rows of a store, by its arrays alone."""
    for r in range(store.rows):
        queries, passages, negatives = {}, {}, {}
        for f in range(*span(store.field_offsets, r)):
            code = store.languages[at(store.field_languages, f)]
            if store.field_queries[f] >= 0:
                queries[code] = store.text(store.field_queries[f])
            if store.field_passages[f] >= 0:
                passages[code] = store.text(store.field_passages[f])
            both = code in queries and code in passages
            assert at(store.field_mono, f) == (both and queries[code].casefold() != passages[code].casefold())
        for n in range(*span(store.negative_offsets, r)):
            code = store.languages[store.negative_languages[n]]
            negatives[code] = (*negatives.get(code, ()), store.text(store.negative_texts[n]))
        yield queries, passages, negatives


def ragged(count):
    """Rows of which no two neighbours have the same languages or number of negatives."""
    for i in range(count):
        codes = ("en", "de", "fr", "zh")[: 1 + i % 4]
        passages = {code: f"{code} the {i}" for code in codes[i % 2 :] or codes}
        passages[codes[-1]] = f"{codes[-1]} ASK {i}" if i % 5 == 0 else passages[codes[-1]]
        negatives = {"en": tuple(f"no {i} {k}" for k in range(i % 3))} if i % 3 else {}
        yield Row({code: f"{code} ask {i}" for code in codes}, passages, negatives)


def uniform_but_the_last(count):
    yield from parallel_rows(count // 2)
    yield Row({"en": "one"}, {"sw": "moja"}, {"sw": ("mbili",)})


@pytest.mark.parametrize("rows", [lambda: ragged(50), lambda: parallel_rows(20), lambda: uniform_but_the_last(20)])
@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
def test_rows_come_back_as_they_were_read(tokenizer, tmp_path, rows, chunk_rows):
    store = build(tmp_path / "s", rows(), tokenizer, chunk_rows=chunk_rows)
    assert list(read_back(store)) == [(row.queries, row.passages, dict(row.negatives)) for row in rows()]


def test_tokens_are_the_tokenizers_own_cut_and_with_prompt_and_ends(tokenizer, tmp_path):
    rows = list(ragged(60))
    store = build(tmp_path / "s", rows, tokenizer, chunk_rows=16)
    longest = 0
    for numbers, role in ((store.field_queries, ROLES[0]), (store.field_passages, ROLES[1])):
        for n in numbers[numbers >= 0]:
            wanted = tokenizer([role.prompt + store.text(n)], truncation=True, max_length=role.max_length).input_ids[0]
            assert store.text_tokens(n).tolist() == wanted
            assert store.token_hashes[n] == xxhash.xxh3_64_intdigest(np.array(wanted, np.int32).tobytes())
            longest = max(longest, len(wanted))
    assert longest == ROLES[1].max_length


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_own_settings_count(tokenizer, tmp_path, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "truncation_side", side)
    monkeypatch.setattr(tokenizer, "split_special_tokens", side == "left")
    tokenizer.backend_tokenizer.enable_padding(length=99)  # as an earlier call may have left it
    rows = [Row({"en": "a <mask> of " + "red blue green " * 9}, {"en": "x </s>"})]
    store = build(tmp_path / "s", rows, tokenizer)
    for n, (text, role) in enumerate(zip(("Query: " + rows[0].queries["en"], "Passage: x </s>"), ROLES, strict=True)):
        assert store.text_tokens(n).tolist() == tokenizer(text, truncation=True, max_length=role.max_length).input_ids


def test_real_text_of_many_scripts_comes_back(shared_data, tokenizer, tmp_path):
    files = {path.stem: str(path) for path in sorted((shared_data / "xquad-r").glob("*.json"))}
    rows = list(read_source(Source(files=files, format="squad", limit=150)))
    store = build(tmp_path / "s", rows, tokenizer, chunk_rows=40)
    assert [(q, p) for q, p, _ in read_back(store)] == [(row.queries, row.passages) for row in rows]
    assert len(store.languages) == len(files) == 11
    assert len(store.field_offsets) == 1
    assert store.field_languages.tolist() == list(range(11))


def test_what_all_rows_share_is_written_once(tokenizer, tmp_path):
    store = build(tmp_path / "uniform", parallel_rows(40), tokenizer, chunk_rows=8)
    assert store.field_offsets.tolist() == [3]
    assert store.field_languages.tolist() == [0, 1, 2]
    assert store.field_mono.tolist() == [True]
    assert store.negative_offsets.tolist() == [0]
    bitext = [Row({"en": f"x {i}", "de": f"y {i}"}, {"en": f"X  {i}", "de": f"why {i}"}) for i in range(20)]
    store = build(tmp_path / "bitext", bitext, tokenizer, chunk_rows=8)
    assert (store.field_offsets.tolist(), store.field_mono.tolist()) == ([2], [True, False])
    assert store.row_contents.tolist() == []  # row r is content r
    pairs = [Row({"en": f"q {i}"}, {"en": f"p {i}"}, {"en": ("n", f"m {i}")}) for i in range(20)]
    store = build(tmp_path / "pairs", pairs, tokenizer, chunk_rows=8)
    assert (store.field_offsets.tolist(), store.negative_offsets.tolist()) == ([1], [2])
    assert store.field_languages.tolist() == [0]


def test_the_first_row_that_differs_is_found_wherever_it_is(tokenizer, tmp_path):
    for place in (0, 1, 7, 8, 9, 23):
        rows = parallel_rows(12)
        rows[place] = Row({"en": "q"}, {"en": "p"}, {"en": ("n",)})
        store = build(tmp_path / str(place), rows, tokenizer, chunk_rows=8)
        assert len(store.field_offsets) == len(store.negative_offsets) == 25
        assert np.diff(store.field_offsets).tolist() == [1 if r == place else 3 for r in range(24)]
        assert [q for q, _, _ in read_back(store)] == [row.queries for row in rows]


def test_counts_say_in_how_many_rows_something_is_there(tokenizer, tmp_path):
    rows = [*ragged(50), Row({"de": "a"}, {"sw": "b"})]
    store = build(tmp_path / "s", rows, tokenizer, chunk_rows=9)
    n = {code: i for i, code in enumerate(store.languages)}
    wanted = {"queries": [0] * 5, "passages": [0] * 5, "mono": [0] * 5, "cross": [0], "any_mono": [0]}
    for row in rows:
        mono = [c for c in row.queries if c in row.passages and row.queries[c].casefold() != row.passages[c].casefold()]
        for what, codes in (("queries", row.queries), ("passages", row.passages), ("mono", mono)):
            for code in codes:
                wanted[what][n[code]] += 1
        wanted["cross"][0] += any(a != b for a in row.queries for b in row.passages)
        wanted["any_mono"][0] += bool(mono)
    assert store.counts == wanted


def test_a_text_is_stored_once_per_chunk_and_role(tokenizer, tmp_path):
    rows = [Row({"en": f"q {i}"}, {"en": "same"}, {"en": ("same", "q 0")}) for i in range(8)]
    store = build(tmp_path / "s", rows, tokenizer, chunk_rows=4)
    assert [store.text(n) for n in range(store.texts)] == [
        *("q 0", "same", "q 0", "q 1", "q 2", "q 3"),
        *("q 4", "same", "q 0", "q 5", "q 6", "q 7"),
    ]


def test_a_hard_negative_that_is_a_positive_has_its_content_id(tokenizer, tmp_path):
    rows = [Row({"en": f"q {i}"}, {"en": f"p {i}"}, {"en": (f"P  {9 - i}", f"n {i // 2}")}) for i in range(10)]
    store = build(tmp_path / "s", rows, tokenizer, chunk_rows=4)
    assert store.contents == 10
    assert store.negative_contents.tolist() == [x for i in range(10) for x in (9 - i, 10 + i // 2)]


def test_what_cannot_be_stored_is_named(tokenizer, tmp_path):
    good = Row({"en": "q"}, {"en": "p"}, where="f:1")

    def of(*rows, tokenizer=tokenizer):
        return build(tmp_path / "s", rows, tokenizer)

    with pytest.raises(DataError, match=r"source 'made' gave no rows; check its path and data.languages, or remove it"):
        of()
    with pytest.raises(DataError, match="f:2: a row needs at least one query and one passage"):
        of(good, Row({"en": "q"}, {}, where="f:2"))
    with pytest.raises(DataError, match=r"f:3: the text 'a\\ud800' holds half of a surrogate pair"):
        of(good, Row({"en": "q"}, {"en": "a\ud800"}, where="f:3"))
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"q": 0, "p": 1}, [])))  # drops what is new
    role = Role("", 9)
    rows = [good, Row({"en": "q"}, {"en": "p"}, {"en": ("z",)}, where="f:4")]
    with pytest.raises(DataError, match=r"f:4: no token is left of the text 'z'; leave it out"):
        build_source(tmp_path / "s", "made", rows, bare, role, role, progress=False)
    assert not (tmp_path / "s").exists()


def test_errors_of_other_processes_are_named_too(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hbt_fast.data.build.ALONE", 1)
    rows = [Row({"en": "q"}, {"en": "p"} if i != 25 else {}, where=f"f:{i}") for i in range(40)]
    with pytest.raises(DataError, match="f:25: a row needs"):
        build(tmp_path / "s", rows, tokenizer, chunk_rows=10, workers=2)


def test_a_tokenising_process_that_dies_is_no_silent_loss(tokenizer, tmp_path, monkeypatch):
    from hbt_fast.data import workers

    monkeypatch.setattr("hbt_fast.data.build.ALONE", 1)

    def dying(self, *arguments):
        original(self, *arguments)
        self.processes[0].kill()

    original = workers.Workers.__init__
    monkeypatch.setattr(workers.Workers, "__init__", dying)
    with pytest.raises(DataError, match=r"a tokenising process ended with status -9.*it goes on where it stopped"):
        build(tmp_path / "s", parallel_rows(40), tokenizer, chunk_rows=10, workers=2)
    monkeypatch.undo()
    assert build(tmp_path / "s", parallel_rows(40), tokenizer, chunk_rows=10).rows == 80


def test_half_a_surrogate_pair_is_named_by_a_process_too(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("hbt_fast.data.build.ALONE", 1)
    rows = [*parallel_rows(20), Row({"en": "ask"}, {"en": "broken \ud83d text"}, where="file.jsonl:41")]
    with pytest.raises(DataError, match=r"file\.jsonl:41: the text 'broken .* holds half of a surrogate pair"):
        build(tmp_path / "s", rows, tokenizer, chunk_rows=10, workers=2)


def test_a_store_of_sources_numbers_languages_across_them(tokenizer, tmp_path):
    one = [Row({"fr": "q"}, {"de": "p"})]
    two = [Row({"en": "q"}, {"fr": "p"})]
    store = build_store(tmp_path, [("a", None, one), ("b", 2.0, two)], tokenizer, *ROLES)
    assert store.languages == ("de", "en", "fr")
    assert [n.tolist() for n in store.language_numbers] == [[0, 2], [1, 2]]
    assert (store.rows, store.weights) == (2, (None, 2.0))
    assert store.identity != build_store(tmp_path, [("b", 2.0, two), ("a", None, one)], tokenizer, *ROLES).identity


@pytest.fixture
def configured(tokenizer, tmp_path):
    """`configured(*sources)`: the settings of a run on these, with a tokenizer that is there already."""
    tokenizer.save_pretrained(tmp_path / "model")

    def make(*sources, **options):
        settings = [f"--model.path={tmp_path / 'model'}", f"--data.store_dir={tmp_path / 'stores'}"]
        return parse("test", "", [*settings, f"--data.sources={json.dumps(sources)}", *options.values()])

    return make


def pairs(path, *texts):
    lines = [json.dumps({"query": f"ask {t}", "passage": f"say {t}", "language": "en"}) for t in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_appending_a_source_leaves_the_others_alone(configured, tmp_path):
    a, b = ({"path": pairs(tmp_path / f"{n}.jsonl", *range(9))} for n in "ab")
    first, _ = prepare(configured(a))
    before = {p: p.stat().st_mtime_ns for p in first.sources[0].folder.iterdir()}
    both, _ = prepare(configured(a, {**b, "weight": 3}))
    assert [s.name for s in both.sources] == ["a", "b"]
    assert {p: p.stat().st_mtime_ns for p in both.sources[0].folder.iterdir()} == before
    assert both.weights == (None, 3)
    pairs(tmp_path / "b.jsonl", *range(8))
    changed, _ = prepare(configured({**a, "weight": 2}, b))
    assert changed.sources[0].folder == both.sources[0].folder  # a weight changes no row
    assert changed.sources[1].folder != both.sources[1].folder
    assert len(list((tmp_path / "stores").iterdir())) == 3
    assert "b                             8  en 8/8" in summary(changed)


def test_sources_of_one_name_are_one(configured, tmp_path):
    a, b = ({"path": pairs(tmp_path / f"{n}.jsonl", n), "name": "both"} for n in "ab")
    store, _ = prepare(configured(a, b))
    assert [(s.name, s.rows) for s in store.sources] == [("both", 2)]
    assert [q["en"] for q, _, _ in read_back(store.sources[0])] == ["ask a", "ask b"]
    with pytest.raises(DataError, match="named 'both' are one source, but their weight differs: None, 2"):
        prepare(configured(a, {**b, "weight": 2}))


def test_rows_left_out_are_listed_even_if_the_run_that_read_them_was_killed(configured, tmp_path, monkeypatch, capsys):
    path = pairs(tmp_path / "a.jsonl", *range(3))
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + "\nnonsense\n")
    config = configured({"path": path}, on_error="--data.on_error=skip")

    def killed(*_):
        raise RuntimeError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hbt_fast.data.draft.label_contents", killed)
        with pytest.raises(RuntimeError):
            prepare(config)
    store, _ = prepare(config)
    assert (store.sources[0].folder / "skipped.txt").read_text() == f"{path}:4: not JSON: Expecting value at column 1\n"
    said = "1 malformed rows left out (data.on_error: skip), listed in"
    assert said in capsys.readouterr().out
    prepare(config)  # finds it
    assert said in capsys.readouterr().out


def test_a_damaged_store_is_refused_by_prepare(configured, tmp_path):
    config = configured({"path": pairs(tmp_path / "a.jsonl", *range(3))})
    folder = prepare(config)[0].sources[0].folder
    path = folder / "tokens.npy"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokens.npy: its checksum is not that of what was written"):
        prepare(config)
    assert SourceStore.open(folder, verify=False).rows == 3
