"""Line-aligned files of translations, in pairs (Tatoeba) or of many languages at once (NTREX-128, FLORES)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from hbt_fast.data.languages import normalise
from hbt_fast.data.rows import DataError

# The languages of Tatoeba in XTREME (arXiv 2003.11080), each against English, by the codes of LASER's files. Its
# program looks for the sentence of every English one, so that its figures compare with "out of en" here. XTREME-R
# (arXiv 2104.07412) adds aze, lit, pol, ron and ukr.
XTREME_36 = (
    "afr", "ara", "ben", "bul", "cmn", "deu", "ell", "est", "eus", "fin", "fra", "heb", "hin", "hun", "ind", "ita",
    "jav", "jpn", "kat", "kaz", "kor", "mal", "mar", "nld", "pes", "por", "rus", "spa", "swh", "tam", "tel", "tgl",
    "tha", "tur", "urd", "vie",
)  # fmt: skip

LAYOUTS = """\
  tatoeba.deu-eng.deu, tatoeba.deu-eng.eng   pairs, as LASER's Tatoeba; de-en.de, de-en.en too
  newstest2019-src.eng.txt, newstest2019-ref.deu.txt   many languages, as NTREX-128
  eng_Latn.devtest, deu_Latn.devtest   many languages, as FLORES; one split in a folder
  en.txt, de.txt   many languages; or NAME.en, NAME.de"""
_CODE = r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*"
_PAIR = re.compile(r"(?:.+\.)?(?P<a>[A-Za-z]{2,3}(?:_\w+)?)-(?P<b>[A-Za-z]{2,3}(?:_\w+)?)\.(?P<side>(?P=a)|(?P=b))")
_NO_CODES = "txt|tsv|csv|zip|pdf|png|npy|log|yml|sh|py|ids|xml|bin|tar|tex|doc|bib|cfg|src|ref|bpe|spm|sgm|gz|bz2|md"
_MANY = [  # the first one that two files of a folder have
    # newstest2019-ref-2.spa.txt is a second translation: left out
    re.compile(rf"newstest\d+-(?:src|ref)\.(?P<code>{_CODE})\.txt"),
    re.compile(rf"(?P<code>{_CODE})\.(?:dev|devtest|test)"),
    re.compile(rf"(?P<code>{_CODE})\.txt"),
    re.compile(rf".+\.(?P<code>(?!(?:{_NO_CODES})$){_CODE})"),
]


@dataclass(frozen=True, eq=False)
class BitextTask:
    """Sentences and their translations, line by line.

    Args:
        name: shown in reports.
        sentences: the sentences of each file, by its path (or by any other name that a message can use).
        languages: the language of each file, as reports show it.
        pairs: names of two files whose lines are translations of each other. Each pair is evaluated in both directions.
        groups: languages whose mean is reported too, by the name of the group.

    Raises:
        DataError: files of one pair with different numbers of lines, an empty line, a pair of languages that is there
            twice, a group with a language that is not there.
    """

    name: str
    sentences: dict[str, list[str]]
    languages: dict[str, str]
    pairs: list[tuple[str, str]]
    groups: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pairs:
            raise DataError(f"{self.name}: no pair of languages; at least two files are needed")
        for file, sentences in self.sentences.items():
            empty = next((number for number, text in enumerate(sentences, 1) if not text.strip()), None)
            if empty:
                raise DataError(f"{file}:{empty}: an empty line; its translation could not be found. Delete it in all "
                                "files of the data set")  # fmt: skip
        for a, b in self.pairs:
            lines = len(self.sentences[a]), len(self.sentences[b])
            if lines[0] != lines[1] or not lines[0]:
                raise DataError(
                    f"{a} has {lines[0]:,} lines, {b} has {lines[1]:,}; line by line they must be translations of each "
                    "other"
                )
        shown = Counter(frozenset((self.languages[a], self.languages[b])) for a, b in self.pairs)
        twice = next((sorted(pair) for pair, count in shown.items() if count > 1 or len(pair) < 2), None)
        if twice:
            raise DataError(f"{self.name}: more than one pair of files for {' and '.join(twice)}")
        for group, languages in self.groups.items():
            unknown = sorted(set(languages) - set(self.languages.values()))
            if unknown:
                there = ", ".join(sorted(set(self.languages.values())))
                raise DataError(f"group {group!r}: no language {', '.join(unknown)} in {self.name}; there are {there}")


def n_way(name: str, sentences: dict[str, list[str]], languages: dict[str, str] | None = None) -> BitextTask:
    """A task of sentences that exist in many languages: every pair of languages is evaluated.

    Args:
        name: shown in reports.
        sentences: by file, or by language.
        languages: the language of each file; None: `sentences` is by language.

    Raises:
        DataError: as `BitextTask` does.
    """
    languages = languages or {language: language for language in sentences}
    return BitextTask(name, sentences, languages, list(combinations(sentences, 2)))


def load_bitext(folder: str | Path, languages: Sequence[str] | None = None) -> BitextTask:
    """The data set in a folder of line-aligned files; see `LAYOUTS` for the names that are recognised.

    Texts are stripped, not otherwise changed. Languages are shown by their shortest code ("deu" is "de"), with script
    or region where the folder has several of one language ("zh-CN", "zh-TW"), whichever of them are selected.

    Args:
        folder: of the files. Those that are not named as the others are passed over (README.md, LICENSE).
        languages: take these only: codes as in the files' names, or as shown, or a language that stands for all its
            varieties ("zh"), or "xtreme" for `XTREME_36`. Where all pairs share a language (English in Tatoeba), that
            one need not be named. None: all.

    Raises:
        DataError: the layout is not recognised, a language is not there, a file is not UTF-8; and as `BitextTask` does.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it must hold line-aligned files, named as one of\n{LAYOUTS}")
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    pairs = _pairs(folder, names)
    files = {} if pairs else _many(folder, names)
    if not pairs and not files:
        some = ", ".join(names[:5]) or "nothing"
        raise DataError(
            f"{folder}: no two files named as line-aligned data are; it has {some}. Name them as\n{LAYOUTS}"
        )
    codes = list(dict.fromkeys(code for pair in pairs for code in pair)) if pairs else list(files)
    shown = shown_codes(codes)
    wanted = _select(languages, shown, folder) if languages is not None else set(codes)
    if not pairs:
        paths = {str(folder / files[code]): shown[code] for code in files if code in wanted}
        return n_way(folder.resolve().name, {path: _read(path) for path in paths}, paths)
    wanted |= set.intersection(*map(set, pairs))
    taken = {pair: paths for pair, paths in pairs.items() if wanted.issuperset(pair)}
    paths = {str(folder / path): shown[code] for pair in taken for code, path in zip(pair, taken[pair], strict=True)}
    pairs_taken = [(str(folder / a), str(folder / b)) for a, b in taken.values()]
    return BitextTask(folder.resolve().name, {path: _read(path) for path in paths}, paths, pairs_taken)


def shown_codes(codes: Iterable[str]) -> dict[str, str]:
    """What reports call the languages of files: the shortest code that tells them apart.

    Args:
        codes: of the files, as "deu", "zho-CN", "srp_Latn".
    """
    import langcodes

    shown = {code: normalise(code) for code in codes}
    for longer in (lambda code: langcodes.standardize_tag(code.replace("_", "-")), lambda code: code):
        count = Counter(shown.values())
        shown = {code: longer(code) if count[name] > 1 else name for code, name in shown.items()}
    return shown


def _select(languages: Sequence[str], shown: dict[str, str], folder: Path) -> set[str]:
    """The files' own codes that the user means."""
    taken: set[str] = set()
    for wanted in (code for name in languages for code in (XTREME_36 if name.lower() == "xtreme" else (name,))):
        exact = {code for code, name in shown.items() if wanted in (code, name)}
        found = exact or {code for code in shown if normalise(code) == normalise(wanted)}
        if not found:
            there = ", ".join(sorted(shown.values()))
            raise DataError(f"{folder}: no file for language {wanted!r}; there are {there}")
        taken |= found
    return taken


def _pairs(folder: Path, names: list[str]) -> dict[tuple[str, str], tuple[str, str]]:
    """The two files of each pair of codes, if these are named as pairs are."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if (match := _PAIR.fullmatch(name)) and _is_language(match["a"]) and _is_language(match["b"]):
            found[match["a"], match["b"]][match["side"]].append(name)
    for (a, b), sides in found.items():
        alone = [code for code in (a, b) if code not in sides]
        if alone:
            have = folder / next(iter(sides.values()))[0]
            raise DataError(f"{have}: its other side, {have.stem}.{alone[0]}, is not there")
        _one_each(folder, {f"{side} in {a}-{b}": files for side, files in sides.items()})
    return {(a, b): (sides[a][0], sides[b][0]) for (a, b), sides in found.items()}


def _many(folder: Path, names: list[str]) -> dict[str, str]:
    """The file of each code, if they are named as files of many languages are."""
    for pattern in _MANY:
        found: dict[str, list[str]] = defaultdict(list)
        for name in names:
            if (match := pattern.fullmatch(name)) and _is_language(match["code"]):
                found[match["code"]].append(name)
        if len(found) > 1:
            _one_each(folder, found)
            return {code: files[0] for code, files in found.items()}
    return {}


def _one_each(folder: Path, files: dict[str, list[str]]) -> None:
    for code, several in files.items():
        if len(several) > 1:
            raise DataError(f"{folder}: {' and '.join(several[:2])} are both of {code}; keep one data set in a folder")


def _is_language(code: str) -> bool:
    try:
        return bool(normalise(code))
    except DataError:
        return False


def _read(path: str) -> list[str]:
    from hbt_fast.data.reading import lines

    return [text.strip() for _, text in lines(path)]
