"""Fonts for plots whose names may be in any script: installed ones that together draw every character."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

FIRST = "DejaVu Sans"  # comes with matplotlib
LISTED = 20  # characters that a warning lists


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """Within it, matplotlib draws these texts as they are, with as many installed fonts as they need.

    Characters that no font has are drawn as boxes; one warning says which they are and what to install.

    Args:
        texts: everything that will be drawn and is not plain ASCII.
    """
    import matplotlib

    families, missing = choose(texts)
    if missing:
        some = " ".join(missing[:LISTED]) + (" ..." if len(missing) > LISTED else "")
        scripts = sorted({unicodedata.name(character, "unnamed").split()[0].title() for character in missing})
        warnings.warn(
            f"no installed font has {len(missing)} of the characters in the plots ({', '.join(scripts[:6])}: {some}); "
            "they are drawn as boxes. Noto's fonts have nearly all scripts (Debian: fonts-noto-core, fonts-noto-cjk)",
            stacklevel=3,
        )
    no_formulas = {"text.parse_math": False}  # in names with dollars
    with matplotlib.rc_context({"font.family": families, **no_formulas}), warnings.catch_warnings():
        if missing:  # said once, in plain words
            warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def choose(texts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Font families that draw all of the characters, and the characters that no installed font has.

    Fonts are read only where the first does not do; of the others each one that is taken has the most of what is
    still missing, plain sans-serif ones before the rest.

    Args:
        texts: in any scripts.

    Returns:
        families for matplotlib's font.family, the first being the usual one; characters, in order.
    """
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    wanted = {c for text in texts for c in text if not unicodedata.category(c).startswith(("C", "Z"))}
    wanted -= _drawn(findfont(FontProperties(family=FIRST)))
    families = [FIRST]
    if not wanted:
        return families, []
    plain = {}  # family -> file; one face tells what a family has
    for font in fontManager.ttflist:
        if font.name.startswith("Last Resort"):  # matplotlib's own: it has a box for every character
            continue
        if font.style == "normal" and font.stretch == "normal" and str(font.weight) in ("400", "normal", "regular"):
            plain.setdefault(font.name, font.fname)
    has = {name: found for name, file in plain.items() if (found := _drawn(file) & wanted)}
    while wanted and has:
        best = max(sorted(has), key=lambda name: (len(has[name]), "Sans" in name, name.startswith("Noto")))
        families.append(best)
        wanted -= has[best]
        has = {name: found & wanted for name, found in has.items() if found & wanted}
    return families, sorted(wanted)


def _drawn(file: str) -> set[str]:
    """The characters that a font file has."""
    from matplotlib.font_manager import get_font

    try:
        return set(map(chr, get_font(file).get_charmap()))
    except (RuntimeError, OSError):  # bitmap fonts and damaged files, which matplotlib lists all the same
        return set()
