"""The readers: each format gives the rows that a person would read out of it."""

import gzip
import json
import zipfile

import pytest

from hbt_fast.data.rows import Row
from hbt_fast.data.sources import Source, read_source
from hbt_fast.data.squad import paragraphs, sentences


def rows(source, languages=None):
    return [(r.queries, r.passages) for r in read_source(source, languages)]


def squad(path, *questions, context="It rained. The sun came out! Was it warm? Yes."):
    qas = [
        {"id": str(i), "question": q, "answers": [{"text": "", "answer_start": at}]}
        for i, (q, at) in enumerate(questions)
    ]
    path.write_text(
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}), encoding="utf-8"
    )
    return str(path)


def test_squad_gives_the_sentence_that_answers(tmp_path):
    path = squad(tmp_path / "a.json", ("What came out?", 15), ("Weather?", 0))
    assert rows(Source(path=path, language="en")) == [
        ({"en": "What came out?"}, {"en": "The sun came out!"}),
        ({"en": "Weather?"}, {"en": "It rained."}),
    ]
    whole = rows(Source(path=path, language="en", passage="paragraph"))
    assert {p["en"] for _, p in whole} == {"It rained. The sun came out! Was it warm? Yes."}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two? Three!", 3),
        ("約1958年。次の文。", 2),
        ("यह एक है। यह दो है।", 2),
        ("هل هذا؟ نعم.", 2),
        ("It cost 3.5 dollars, e.g. this one. Really.", 2),
        ('He said: "Go." Then he left.', 2),
        ("ประโยค " * 60, 3),
    ],
)
def test_sentences_end_where_a_reader_says(text, count):
    spans = sentences(text)
    assert len(spans) == count
    assert "".join(text[a:b] for a, b in spans).replace(" ", "") == text.replace(" ", "")


def test_an_unreliable_offset_or_no_answer_gives_no_pair(tmp_path):
    path = tmp_path / "a.json"
    qas = [
        {"id": "1", "question": "q?", "answers": [{"answer_start": 0}], "answer_occurrences": 2},
        {"id": "2", "question": "q?", "answers": [], "is_impossible": True},
    ]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "A. B.", "qas": qas}]}]}))
    assert rows(Source(path=str(path), language="en")) == []


def test_translations_of_squad_are_joined_by_question(tmp_path):
    files = {
        "en": squad(tmp_path / "en.json", ("What came out?", 15), ("Weather?", 0)),
        "es": squad(tmp_path / "es.json", ("¿Qué salió?", 9), context="Llovió. Salió el sol."),
    }
    first, second = rows(Source(files=files, format="squad"))
    assert first == ({"en": "What came out?", "es": "¿Qué salió?"}, {"en": "The sun came out!", "es": "Salió el sol."})
    assert second == ({"en": "Weather?"}, {"en": "It rained."})


def test_excluded_paragraphs_go_in_every_language_by_id_and_by_text(tmp_path):
    held_out = squad(tmp_path / "eval.json", ("What?", 0), context="Something else.")
    files = {
        "en": squad(tmp_path / "en.json", ("a?", 0), ("b?", 0)),
        "es": squad(tmp_path / "es.json", ("c?", 0), ("d?", 0)),
    }
    assert rows(Source(files=files, format="squad", exclude_paragraphs_of=[held_out])) == []  # id "0" is in all of them
    same_text = squad(tmp_path / "text.json", context="IT rained.  The sun came out! Was it warm? Yes.")
    assert rows(Source(path=files["en"], language="en", exclude_paragraphs_of=[same_text])) == []
    assert rows(Source(path=files["en"], language="en")) != []


def test_no_paragraph_of_xquad_survives_in_the_training_sources(shared_data):
    held_out = shared_data / "xquad-r"
    files = {
        "en": shared_data / "squad-v1.1" / "dev-v1.1.json.gz",
        "es": shared_data / "squad-es-dev" / "dev-v1.1-es_small.json",
        "it": shared_data / "squad-it-test" / "SQuAD_it-test.json.gz",
    }
    evaluated = {str(qa["id"]) for _, p in paragraphs(str(held_out / "en.json")) for qa in p["qas"]}
    texts = {p["context"] for _, p in paragraphs(str(held_out / "en.json"))}
    assert len(texts) == 240
    kept, seen = set(), 0
    source = Source(files={k: str(v) for k, v in files.items()}, format="squad", exclude_paragraphs_of=[str(held_out)])
    for row in read_source(source, on_error="skip"):
        seen += 1
        kept.add(row.where.rpartition("question ")[2].strip("'"))
        assert not any(passage in text for passage in row.passages.values() for text in texts if len(passage) > 40)
    assert seen > 5000
    assert len(evaluated) == 1190
    assert not kept & evaluated
    dropped = [p for _, p in paragraphs(str(files["en"])) if {str(qa["id"]) for qa in p["qas"]} & evaluated]
    assert len(dropped) == 240
    assert not kept & {str(qa["id"]) for p in dropped for qa in p["qas"]}


def test_json_lines_by_name_by_language_and_as_bitext(tmp_path):
    path = tmp_path / "a.jsonl"
    named = {"q": "Who?", "p": "She.", "query_language": "en", "passage_language": "de", "neg": ["He.", "They."]}
    nway = {"q": {"en": "Who?", "fr": "Qui ?"}, "p": {"en": "She."}}
    path.write_text(json.dumps(named) + "\n\n" + json.dumps(nway) + "\n")
    one, two = read_source(Source(path=str(path), fields={"query": "q", "passage": "p", "negatives": "neg"}))
    assert one == Row({"en": "Who?"}, {"de": "She."}, {"de": ("He.", "They.")}, None, f"{path}:1")
    assert two.queries == {"en": "Who?", "fr": "Qui ?"}
    path.write_text(json.dumps({"id": "x", "en-US": "house", "de-DE": "Haus", "fr-FR": "maison"}))
    (row,) = read_source(Source(path=str(path), bitext=True), ("de", "fr"))
    assert row.queries == row.passages == {"de": "Haus", "fr": "maison"}
    assert row.content == "x"


def test_a_pair_outside_the_wanted_languages_is_left_out(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("en\tde\nhouse\tHaus\n")
    assert rows(Source(path=str(path), bitext=True), ("en",)) == []
    assert len(rows(Source(path=str(path), bitext=True), ("en", "de"))) == 1


def test_a_table_without_a_first_line_of_names_is_told_them(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("house\tHaus\n")
    assert rows(Source(path=str(path), bitext=True, columns=["en", "de"])) == [({"en": "house", "de": "Haus"},) * 2]


def test_compressed_files_and_members_of_archives_are_read(tmp_path):
    text = 'query\tpassage\nWho "x"?\tShe.\n'
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.tsv", text)
    expected = [({"en": 'Who "x"?'}, {"en": "She."})]
    assert rows(Source(path=str(tmp_path / "a.tsv.gz"), language="en")) == expected
    assert rows(Source(path=f"zip://in/a.tsv::{tmp_path / 'a.zip'}", language="en", format="tsv")) == expected


def test_one_file_per_language_is_joined_by_id(tmp_path):
    for code, text in {"en": "who", "de": "wer"}.items():
        (tmp_path / f"{code}.jsonl").write_text(json.dumps({"id": f"7_{code}", "lang": code, "question": text}))
    files = {code: str(tmp_path / f"{code}.jsonl") for code in ("en", "de")}
    (row,) = read_source(Source(files=files, fields={"query": "question"}))
    assert row.queries == row.passages == {"en": "who", "de": "wer"}


def test_tmx_units_are_bitext(tmp_path):
    path = tmp_path / "a.tmx"
    path.write_text(
        '<tmx><body><tu><tuv xml:lang="en"><seg>a <b>house</b></seg></tuv>'
        '<tuv xml:lang="fr"><seg>maison</seg></tuv></tu></body></tmx>'
    )
    assert rows(Source(path=str(path))) == [({"en": "a house", "fr": "maison"},) * 2]


def test_aligned_lines_pair_translations_or_neighbours_within_a_document(tmp_path):
    for code in ("en", "de"):
        (tmp_path / f"{code}.txt").write_text("".join(f"{code}{i}\n" for i in range(5)))
    (tmp_path / "docs").write_text("a\na\na\nb\nb\n")
    files = {code: str(tmp_path / f"{code}.txt") for code in ("en", "de")}
    assert len(rows(Source(files=files))) == 5
    paired = rows(Source(files=files, pair="next", documents=str(tmp_path / "docs")))
    assert [(q["en"], p["de"]) for q, p in paired] == [("en0", "de1"), ("en3", "de4")]


def test_hugging_face_data_sets_are_read_from_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"question": ["Who?"], "context": ["She."]})
    made.save_to_disk(str(tmp_path / "saved"))
    source = Source(
        path=str(tmp_path / "saved"), format="hf", language="en", fields={"query": "question", "passage": "context"}
    )
    assert rows(source) == [({"en": "Who?"}, {"en": "She."})]


def test_a_limit_takes_so_many_rows(tmp_path):
    path = squad(tmp_path / "a.json", ("a?", 0), ("b?", 0), ("c?", 0))
    assert len(rows(Source(path=path, language="en", limit=2))) == 2
