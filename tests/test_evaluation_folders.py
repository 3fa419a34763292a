"""Claims about folders of languages: what they may be called, and that no collection is left out silently."""

from __future__ import annotations

import pytest
from test_evaluation_layouts import put

from hbt_fast.data.rows import DataError
from hbt_fast.evaluation.beir import beir


def collection(folder, text):
    put(folder / "corpus.jsonl", [{"_id": "d", "text": text}])
    put(folder / "queries.jsonl", [{"_id": "q", "text": f"{text}?"}])
    put(folder / "qrels" / "test.tsv", "q\td\t1\n")


def test_languages_may_be_called_by_their_english_names(tmp_path):
    names = {
        "ukrainian": "uk",
        "Turkish": "tr",
        "greek": "el",
        "bengali": "bn",
        "haitian_creole": "ht",
        "flemish": "nl-BE",
    }
    for name in names:
        collection(tmp_path / name, name)
    task = beir(tmp_path)
    assert dict(zip(task.candidates, task.candidate_languages, strict=True)) == names
    assert beir(tmp_path, languages=["uk"]).queries == ["ukrainian?"]


def test_a_code_comes_before_a_name(tmp_path):
    collection(tmp_path / "ga", "Irish, not Ga, a language of Ghana")
    collection(tmp_path / "mrtydi-v1.1-gan", "Gan")
    assert beir(tmp_path).languages == ["ga", "gan"]


def test_collections_that_no_language_names_are_refused(tmp_path):
    """CQADupStack: gis, tex and english are called as languages (North Giziga, Tennet), the others are not."""
    for name in ("android", "english", "gaming", "gis", "tex"):
        collection(tmp_path / name, name)
    for languages in (None, ["en"]):
        with pytest.raises(
            DataError, match=r"collections in android, gaming, which are .* by its code, as sw, .* give"
        ):
            beir(tmp_path, languages=languages)
    assert beir(tmp_path / "android").candidates == ["android"]


def test_folders_that_hold_no_whole_collection_are_passed_over(tmp_path):
    collection(tmp_path / "sw", "one")
    put(tmp_path / "scripts" / "corpus.jsonl", [{"_id": "d", "text": "a corpus alone"}])
    put(tmp_path / "judgements" / "qrels.tsv", "q\td\t1\n")
    put(tmp_path / "backup" / "sw" / "corpus.jsonl", [{"_id": "d", "text": "of a language, a level below"}])
    put(tmp_path / "backup" / "sw" / "qrels.tsv", "q\td\t1\n")
    collection(tmp_path / ".old", "hidden")
    assert beir(tmp_path).candidates == ["one"]


def test_a_collection_is_whole_wherever_its_files_lie(tmp_path):
    put(tmp_path / "main" / "collection" / "docs.jsonl", [{"id": "d", "contents": "text"}])
    put(tmp_path / "main" / "ir-format-data" / "qrels.test.txt", "q 0 d 1\n")
    collection(tmp_path / "sw", "one")
    with pytest.raises(DataError, match="holds collections in main, which"):
        beir(tmp_path)


def test_two_collections_of_one_language_are_refused(tmp_path):
    for name in ("de", "german"):
        collection(tmp_path / name, name)
    with pytest.raises(DataError, match="de and german hold qrels of one language, de; keep one of them"):
        beir(tmp_path)
