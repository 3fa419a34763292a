"""Content ids against the plain definition: rows are one content if a chain of equal keys connects them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbt_fast.data.build import build_source
from hbt_fast.data.contents import label_contents
from hbt_fast.data.rows import Row
from hbt_fast.data.store import Role, folded


def brute_force(keys, nodes, rows, negatives):
    """Content ids of rows and negatives: flood every component, in the order of its first node."""
    nodes = [rows - 1 - n if n < 0 else n for n in nodes]
    ids = [-1] * (rows + negatives)
    found = 0
    for node in range(rows + negatives):
        if ids[node] >= 0:
            continue
        reached, front = {node}, [node]
        while front:
            mine = {k for k, n in zip(keys, nodes, strict=True) if n == front[-1]}
            front.pop()
            new = {n for k, n in zip(keys, nodes, strict=True) if k in mine} - reached
            reached |= new
            front += new
        for n in reached:
            ids[n] = found
        found += 1
    return ids[:rows], ids[rows:]


@st.composite
def keyed_nodes(draw):
    rows, negatives = draw(st.integers(1, 12)), draw(st.integers(0, 6))
    key = st.sampled_from([0, 1, 2, 3, 5, 2**40, 2**62, 2**63 + 1, 3 * 2**62, 2**64 - 2, 2**64 - 1])
    pairs = [(draw(key), row) for row in range(rows) for _ in range(draw(st.integers(1, 3)))]
    pairs += [(draw(key), -1 - n) for n in range(negatives)]
    return rows, negatives, draw(st.permutations(pairs))


@settings(max_examples=150, deadline=None)
@given(keyed_nodes(), st.integers(1, 40))
def test_content_ids_are_those_of_the_definition_whatever_fits_a_block(tmp_path_factory, made, block):
    rows, negatives, pairs = made
    keys, nodes = zip(*pairs, strict=True)
    of_rows, of_negatives = [], []
    found = label_contents(
        np.array(keys, np.uint64), np.array(nodes, np.int64), rows, negatives,
        tmp_path_factory.getbasetemp() / "contents", of_rows.extend, of_negatives.extend, block=block,
    )  # fmt: skip
    expected = brute_force(keys, nodes, rows, negatives)
    assert of_negatives == expected[1]
    assert (of_rows or list(range(rows))) == expected[0]
    assert found == max(expected[0]) + 1


words = st.sampled_from(["a b", "A  b", "a\tB", "c", "C", "ﬁ x", "FI X", "d", "Straße", "STRASSE", "e", "f"])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(["en", "de", "fr"]), words, min_size=1, max_size=2),
            st.sampled_from([None, None, "a b", "c", "c1"]),  # a content id may look like a text, it is none
            st.lists(words, max_size=2),
        ),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 4),
)
def test_rows_of_equal_texts_or_content_ids_are_one_content(tokenizer, tmp_path_factory, made, chunk_rows):
    rows = [Row({"en": f"q{i}"}, p, {"en": tuple(n)} if n else {}, c) for i, (p, c, n) in enumerate(made)]
    folder = tmp_path_factory.mktemp("contents") / "s"
    role = Role("", 9)
    store = build_source(folder, "s", rows, tokenizer, role, role, progress=False, chunk_rows=chunk_rows)
    keys, nodes = [], []
    for i, row in enumerate(rows):
        own = [("text", folded(text)) for text in row.passages.values()] + [("id", row.content)] * (
            row.content is not None
        )
        keys += own
        nodes += [i] * len(own)
    hard = [text for row in rows for texts in row.negatives.values() for text in texts]
    keys += [("text", folded(text)) for text in hard]
    nodes += [-1 - n for n in range(len(hard))]
    of_rows, of_negatives = brute_force(keys, nodes, len(rows), len(hard))
    assert (store.row_contents.tolist() or list(range(len(rows)))) == of_rows
    assert store.negative_contents.tolist() == of_negatives
    assert store.contents == max(of_rows) + 1
    assert (len(store.row_contents) == 0) == (store.contents == len(rows))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A  b", "a\tB ", True),
        ("ﬁne", "FINE", True),
        ("Straße", "STRASSE", True),
        ("１２", "12", True),
        ("a b", "ab", False),
        ("é", "e", False),
    ],
)
def test_texts_are_equal_after_compatibility_case_and_white_space(tokenizer, tmp_path, one, other, same):
    rows = [Row({"en": "q"}, {"en": one}), Row({"en": "r"}, {"de": other}), Row({"en": other}, {"en": one})]
    store = build_source(tmp_path / "s", "s", rows, tokenizer, Role("", 9), Role("", 9), progress=False)
    assert store.contents == (1 if same else 2)
    assert bool(store.field_mono[-1]) != same


def test_a_key_that_all_rows_have_does_not_fill_a_bucket(tmp_path):
    seen = []
    original = np.fromfile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "fromfile", lambda *a: seen.append(original(*a)) or seen[-1])
        count = 100_000
        hashes = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        keys = np.where(np.arange(count) % 2, np.uint64(7), hashes)
        found = label_contents(
            keys, np.arange(count), count, 0, tmp_path / "c", lambda _: None, lambda _: None, block=1000
        )
    assert found == count // 2 + 1
    assert max(map(len, seen)) < 2500
