"""One code per language, whatever a source calls it."""

from __future__ import annotations

from functools import cache

from hbt_fast.base.ranges import Rule
from hbt_fast.data.rows import DataError


@cache
def normalise(code: str) -> str:
    """The shortest standard code of a language, without region and script: "eng-US" -> "en", "zho-CN" -> "zh".

    Raises:
        DataError: not a language code; names a near one.
    """
    import langcodes

    text = code.strip().replace("_", "-")
    language = langcodes.standardize_tag(text, macro=True).partition("-")[0] if langcodes.tag_is_valid(text) else ""
    if not language or language == "und":
        common = "ar bn de el en es fa fi fr he hi id it ja ko nl pl pt ru sv sw te th tr uk ur vi zh".split()  # noqa: SIM905
        near = text.lower()[:2]
        hint = f"; did you mean {near!r}?" if near in common else ""
        raise DataError(f"{code!r} is not a language code (write one of ISO 639 or BCP 47, as 'en' or 'zh-CN'){hint}")
    return language


@cache
def standard(code: str) -> str:
    """The standard code of a language, with region and script where it has them: "EN" -> "en", "deu-AT" -> "de-AT".

    Raises:
        DataError: not a language code; names a near one.
    """
    import langcodes

    normalise(code)
    return langcodes.standardize_tag(code.strip().replace("_", "-"), macro=True)


def is_language(code: str) -> bool:
    """Whether `normalise` knows it."""
    try:
        return bool(normalise(code))
    except DataError:
        return False


LANGUAGE = Rule(
    "a language code of ISO 639 or BCP 47, as en or zh-CN",
    is_language,
    ("no", "zh-CN", "deu"),
    ("", "null", "English", "und", "\udc80"),
)
