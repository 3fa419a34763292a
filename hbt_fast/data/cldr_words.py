"""How CLDR writes dates, quantities, amounts and territories in one language; the texts of `hbt_fast.data.cldr`.

Babel carries CLDR's data but not all of its rules, and three things are set right here:
- Babel caches resolved aliases inside data that its locales share, so that what a locale says can depend on which one
  was asked first (German quarters in Greek). Each language here reads data of its own.
- Babel writes Latin digits everywhere. CLDR's numbering systems replace digit by digit; so is done here where the
  locale's default is another (Arabic as in Egypt, Bangla).
- A unit without a long form is written in its short form, as in CLDR's root locale; Babel's fallback is not text.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache, lru_cache

from babel import Locale, localedata
from babel.dates import format_date, format_interval, format_skeleton
from babel.lists import format_list
from babel.numbers import format_compact_decimal, format_currency, format_decimal, get_currency_symbol

REGIONAL = {"ar": "ar_EG"}  # the default digits are Arabic-Indic there
ZERO = {"arab": "٠", "beng": "০"}
NATIVE_DIGITS = {
    system: str.maketrans({str(n): chr(ord(zero) + n) for n in range(10)}) for system, zero in ZERO.items()
}


class Words:
    """CLDR's texts in one language.

    Args:
        code: the language.
    """

    def __init__(self, code: str) -> None:
        self.locale = _own_locale(REGIONAL.get(code, code))
        self._digits = NATIVE_DIGITS.get(self.locale.default_numbering_system, {})
        data = self.locale._data
        self.unknown_currency = self.locale.currencies["XXX"]
        self.unknown_language = self.locale.languages["und"]
        self.unknown_city = data["time_zones"]["Etc/Unknown"]["city"]
        self._long_compact = "long" if "long" in data["compact_decimal_formats"] else "short"
        # a fact's questions and passage write the same numbers one after the other
        self.number = lru_cache(16)(self.number)
        self.quantity = lru_cache(16)(self.quantity)
        self._unit = cache(self._unit)  # Babel looks a pattern up through its aliases, every time

    def _written(self, text: str) -> str:
        return unicodedata.normalize("NFC", text.translate(self._digits))

    def full_date(self, day: datetime.date) -> str:
        """Thursday, March 5, 2020."""
        return self._written(format_date(day, "full", self.locale))

    def long_date(self, day: datetime.date) -> str:
        """March 5, 2020."""
        return self._written(format_date(day, "long", self.locale))

    def shaped(self, moment: datetime.date, skeleton: str) -> str:
        """A date or time with the fields of a CLDR skeleton: yMd is 3/5/2020, Bhm is 4:30 in the afternoon."""
        return self._written(format_skeleton(skeleton, moment, locale=self.locale))

    def date_and_time(self, date: str, time: str) -> str:
        """A date and a time, joined as in this language."""
        return str(self.locale.datetime_formats["medium"]).replace("'", "").replace("{1}", date).replace("{0}", time)

    def weekday(self, day: datetime.date) -> str:
        """Thursday."""
        return self.locale.days["format"]["wide"][day.weekday()]

    def interval(self, start: datetime.date, end: datetime.date, skeleton: str) -> str:
        """Mar 5 - May 9, 2020."""
        return self._written(format_interval(start, end, skeleton, locale=self.locale))

    def both_dates(self, start: datetime.date, end: datetime.date) -> str:
        """March 5, 2020 - May 9, 2020."""
        return self.locale.interval_formats[None].format(self.long_date(start), self.long_date(end))

    def number(self, value: Fraction | int) -> str:
        """1,234.5."""
        return self._written(format_decimal(_decimal(value), locale=self.locale, numbering_system="default"))

    def compact(self, value: int, *, short: bool = False) -> str:
        """1.23 million, or 1.23M."""
        style = "short" if short else self._long_compact
        text = format_compact_decimal(
            value, format_type=style, locale=self.locale, fraction_digits=2, numbering_system="default"
        )
        return self._written(text)

    def quantity(self, value: Fraction | int | None, unit: str, short: bool = False) -> str:
        """3.5 kilometers, or 3.5 km; a value of None is the one that is asked for: "? kilometers"."""
        plural = "other" if value is None else self.locale.plural_form(_decimal(value))
        return self._unit(unit, plural, short).format("?" if value is None else self.number(value))

    def _unit(self, unit: str, plural: str, short: bool) -> str:
        forms = self.locale._data["unit_patterns"][unit]
        for length in ("short", "long", "narrow") if short else ("long", "short", "narrow"):
            patterns = forms.get(length, {})
            pattern = patterns.get(plural) or patterns.get("other")
            if pattern:
                return pattern
        raise KeyError(f"CLDR has no {unit} in {self.locale}")

    def amount(self, value: Fraction | int, currency: str, style: str) -> str:
        """12.50 euros (style name), €12.50 (symbol) or EUR 12.50 (code)."""
        pattern = "¤¤\xa0#,##0.00" if style == "code" else None
        kind = "name" if style == "name" else "standard"
        text = format_currency(
            _decimal(value), currency, pattern, locale=self.locale, format_type=kind, numbering_system="default"
        )
        return self._written(text)

    def territory(self, code: str) -> str:
        """Japan."""
        return self.locale.territories[code]

    def currency(self, code: str) -> str:
        """Japanese Yen (¥)."""
        symbol = get_currency_symbol(code, self.locale)
        return self.bracketed(self.locale.currencies[code], symbol if symbol != code else code)

    def language(self, code: str) -> str:
        """Japanese."""
        return self.locale.languages[code]

    def city(self, zone: str) -> str:
        """Tokyo, of Asia/Tokyo; where a language has no name for it, the identifier's, as CLDR says."""
        named = self.locale._data["time_zones"].get(zone, {}).get("city")
        return named or zone.rpartition("/")[2].replace("_", " ")

    def bracketed(self, outer: str, inner: str) -> str:
        """Outer (inner)."""
        return self.locale.zone_formats["fallback"] % {"0": inner, "1": outer}

    def all_of(self, texts: Sequence[str]) -> str:
        """A, B, and C."""
        return format_list(list(texts), locale=self.locale)

    def either(self, texts: Sequence[str]) -> str:
        """A, B, or C."""
        return format_list(list(texts), style="or", locale=self.locale)


@cache
def words(code: str) -> Words:
    """The texts of a language, loaded once."""
    return Words(code)


def _decimal(value: Fraction | int) -> Decimal:
    """The value as it is written; plural rules go by the digits."""
    return Decimal(value.numerator) / Decimal(value.denominator)


def _own_locale(identifier: str) -> Locale:
    """A locale whose data no other locale shares (see the module's docstring)."""
    locale = Locale.parse(identifier)
    kept = dict(localedata._cache)
    localedata._cache.clear()
    try:
        data = localedata.load(str(locale))
    finally:
        localedata._cache.clear()
        localedata._cache.update(kept)
    locale._Locale__data = localedata.LocaleDataDict(data)
    return locale
