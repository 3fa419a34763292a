"""The facts of the embedded demo (`hbt_fast.data.cldr`): questions and answers, in any language's words."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from fractions import Fraction
from functools import partial

from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_currency_precision, get_territory_currencies

from hbt_fast.data.cldr import LANGUAGES
from hbt_fast.data.cldr_words import Words, words

# larger unit, smaller unit, how many of these it is, and what it is in its dimension's base unit
CONVERSIONS = (
    ("length-kilometer", "length-meter", 1000, "1000"),
    ("length-meter", "length-centimeter", 100, "1"),
    ("length-centimeter", "length-millimeter", 10, "0.01"),
    ("length-mile", "length-yard", 1760, "1609.344"),
    ("length-yard", "length-foot", 3, "0.9144"),
    ("length-foot", "length-inch", 12, "0.3048"),
    ("mass-kilogram", "mass-gram", 1000, "1"),
    ("mass-gram", "mass-milligram", 1000, "0.001"),
    ("mass-pound", "mass-ounce", 16, "0.45359237"),
    ("volume-liter", "volume-milliliter", 1000, "1"),
    ("area-square-kilometer", "area-hectare", 100, "1000000"),
    ("digital-gigabyte", "digital-megabyte", 1000, "1000000000"),
    ("digital-megabyte", "digital-kilobyte", 1000, "1000000"),
    ("power-kilowatt", "power-watt", 1000, "1000"),
    ("frequency-megahertz", "frequency-kilohertz", 1000, "1000000"),
    ("energy-kilojoule", "energy-joule", 1000, "1000"),
    ("duration-week", "duration-day", 7, "604800"),
    ("duration-day", "duration-hour", 24, "86400"),
    ("duration-hour", "duration-minute", 60, "3600"),
    ("duration-minute", "duration-second", 60, "60"),
)
CURRENCIES = (
    *("EUR", "USD", "GBP", "JPY", "CNY", "INR", "RUB", "BRL", "CAD", "AUD", "CHF", "SEK", "NOK", "DKK", "PLN", "CZK"),
    *("HUF", "TRY", "ILS", "EGP", "SAR", "THB", "VND", "KRW", "IDR", "MXN", "ZAR", "BDT", "UAH", "NZD", "PHP", "SGD"),
)
TODAY = date(2025, 1, 1)  # currencies in use on this day: the data must not change with the calendar
COUNTS = {"weekday": 600, "moment": 450, "days": 450, "conversion": 800, "sum": 500, "amount": 600, "compact": 450}

Text = Callable[[Words], str]
HeldOut = Callable[[str], bool]


@dataclass(frozen=True)
class Fact:
    """One content: the concepts it is about, its questions and its passage."""

    relation: str
    concepts: tuple[str, ...]
    questions: tuple[Text, ...]
    passage: Text

    @property
    def content(self) -> str:
        """The content id: relation|concept, or relation|concept|concept."""
        return "|".join((self.relation, *self.concepts))


def facts(held_out: HeldOut) -> Iterator[Fact]:
    """Every fact, in a fixed order; `held_out` keeps the two dates of an interval on one side."""
    days: set[date] = set()
    for relation, make in (
        ("weekday", partial(_weekday, days=days)),
        ("moment", partial(_moment, days=days)),
        ("days", partial(_day_count, days=days, held_out=held_out)),
        ("conversion", _conversion),
        ("sum", _sum),
        ("amount", partial(_amount, currencies=_currencies(held_out))),
        ("compact", _compact),
    ):
        draw, seen = random.Random(f"cldr {relation}"), set()
        for number in range(COUNTS[relation]):
            fact = make(draw, number)
            if fact.content not in seen:
                seen.add(fact.content)
                yield fact
    names = _held_out_names(held_out)
    for code in _territories():
        for fact in _territory(code):
            if held_out(f"territory:{code}") or not _gives_away(fact.passage, names):
                yield fact


def _new_day(draw: random.Random, days: set[date]) -> date:
    """A date from 1950 to 2049 that no fact has yet."""
    while True:
        day = date(1950, 1, 1) + timedelta(draw.randrange(36524))
        if day not in days:
            days.add(day)
            return day


def _weekday(draw: random.Random, number: int, days: set[date]) -> Fact:
    day = _new_day(draw, days)
    choice = [day, day + timedelta(draw.randrange(1, 7))]
    draw.shuffle(choice)

    def question(w: Words, skeleton: str) -> str:
        return f"{w.either([w.weekday(d) for d in choice])}? {w.shaped(day, skeleton)}"

    questions = (partial(question, skeleton="yMd"), partial(question, skeleton="yMMMd"))
    return Fact("weekday", (f"date:{day}",), questions, lambda w: w.full_date(day))


def _moment(draw: random.Random, number: int, days: set[date]) -> Fact:
    day = _new_day(draw, days)
    moment = datetime(day.year, day.month, day.day, draw.randrange(24), draw.randrange(0, 60, 5))

    def question(w: Words, skeleton: str) -> str:
        return f"{w.date_and_time(w.shaped(moment, skeleton), w.shaped(moment, 'Hm'))} = ?"

    questions = (partial(question, skeleton="yMd"), partial(question, skeleton="yMMMd"))
    return Fact(
        "moment",
        (f"date:{day}",),
        questions,
        lambda w: w.date_and_time(w.full_date(moment), w.shaped(moment, "Bhm")),
    )


def _day_count(draw: random.Random, number: int, days: set[date], held_out: HeldOut) -> Fact:
    start = end = _new_day(draw, days)
    while end in days or held_out(f"date:{end}") != held_out(f"date:{start}"):
        end = start + timedelta(draw.randrange(2, 300))
    days.add(end)
    count = (end - start).days

    def question(w: Words, skeleton: str) -> str:
        return f"{w.interval(start, end, skeleton)} = {w.quantity(None, 'duration-day')}"

    questions = (partial(question, skeleton="yMd"), partial(question, skeleton="yMMMd"))
    return Fact(
        "days",
        (f"date:{start}", f"date:{end}"),
        questions,
        lambda w: f"{w.both_dates(start, end)} = {w.quantity(count, 'duration-day')}",
    )


def _measure(unit: str, value: Fraction, base: str) -> str:
    """The concept of a quantity, the same in whatever unit it is written."""
    return f"{unit.partition('-')[0]}:{value * Fraction(base)}"


def _conversion(draw: random.Random, number: int) -> Fact:
    large, small, factor, base = CONVERSIONS[number % len(CONVERSIONS)]
    tenths = draw.choice((10 * draw.randrange(3, 100), 100 * draw.randrange(11, 100), draw.randrange(15, 500)))
    value, result = Fraction(tenths, 10), Fraction(tenths * factor, 10)

    def question(w: Words, short: bool) -> str:
        return f"{w.quantity(None, small, short)} = {w.quantity(value, large, short)}"

    return Fact(
        "conversion",
        (_measure(large, value, base),),
        (partial(question, short=False), partial(question, short=True)),
        lambda w: f"{w.quantity(value, large)} = {w.quantity(result, small)}",
    )


def _sum(draw: random.Random, number: int) -> Fact:
    large, small, factor, base = CONVERSIONS[number % len(CONVERSIONS)]
    whole, part = draw.randrange(2, 30), draw.randrange(1, factor)
    total = whole * factor + part

    def parts(w: Words, short: bool) -> str:
        return w.all_of([w.quantity(whole, large, short), w.quantity(part, small, short)])

    def question(w: Words, short: bool) -> str:
        return f"{w.quantity(None, small, short)} = {parts(w, short)}"

    return Fact(
        "sum",
        (_measure(large, Fraction(total, factor), base),),
        (partial(question, short=False), partial(question, short=True)),
        lambda w: f"{parts(w, False)} = {w.quantity(total, small)}",
    )


def _held_out_names(held_out: HeldOut) -> dict[str, list[str]]:
    """Language -> what it calls the held-out territories."""
    codes = [code for code in _territories() if held_out(f"territory:{code}")]
    return {language: [words(language).territory(code) for code in codes] for language in LANGUAGES}


def _gives_away(text: Text, names: dict[str, list[str]]) -> bool:
    """Whether a text has the name of a held-out territory in some language, as Swiss Italian has Italy in German."""
    for language in LANGUAGES:
        written = text(words(language))
        if any(name in written for name in names[language]):
            return True
    return False


def _currencies(held_out: HeldOut) -> list[str]:
    """Currencies that are not called after a held-out territory."""
    names = _held_out_names(held_out)
    return [c for c in CURRENCIES if not _gives_away(lambda w, c=c: f"{w.currency(c)} {w.amount(2, c, 'name')}", names)]


def _amount(draw: random.Random, number: int, currencies: list[str]) -> Fact:
    currency = currencies[number % len(currencies)]
    value = Fraction(draw.choice((draw.randrange(2, 1000), draw.randrange(1000, 100_000))))
    if get_currency_precision(currency) == 2:
        value += Fraction(draw.choice((0, 25, 50, 75, 99)), 100)
    return Fact(
        "amount",
        (f"amount:{currency}:{value}",),
        (
            lambda w: f"{w.unknown_currency}: {w.amount(value, currency, 'symbol')}",
            lambda w: f"{w.unknown_currency}: {w.amount(value, currency, 'code')}",
        ),
        lambda w: w.amount(value, currency, "name"),
    )


def _compact(draw: random.Random, number: int) -> Fact:
    value = draw.randrange(101, 1000) * 10 ** draw.randrange(2, 10)  # three digits: no language rounds them
    return Fact(
        "compact",
        (f"number:{value}",),
        (lambda w: f"{w.number(value)} = ?", lambda w: f"{w.compact(value, short=True)} = ?"),
        lambda w: f"{w.compact(value)} = {w.number(value)}",
    )


def _territories() -> list[str]:
    """Countries and dependencies that have a name in every language of the demo."""
    codes = sorted(c for c in words("en").locale.territories if len(c) == 2 and c in get_global("territory_currencies"))
    return [c for c in codes if all(c in words(code).locale.territories for code in LANGUAGES)]


def _territory(code: str) -> Iterator[Fact]:
    concepts = (f"territory:{code}",)

    def fact(relation: str, ask: Text, answer: Text) -> Fact:
        return Fact(
            relation,
            concepts,
            (lambda w: f"{ask(w)}: {w.territory(code)}", lambda w: w.bracketed(w.territory(code), ask(w))),
            lambda w: f"{w.territory(code)}: {answer(w)}",
        )

    currencies = [c for c in get_territory_currencies(code, TODAY, TODAY) if _named(c, "currencies")]
    languages = [c for c in get_official_languages(code, de_facto=True) if _named(c, "languages")]
    zones = [z for z in get_global("territory_zones").get(code, []) if "/" in z and not z.startswith("Etc/")][:4]
    if currencies:
        yield fact("currency", lambda w: w.unknown_currency, lambda w: w.all_of([w.currency(c) for c in currencies]))
    if languages:
        yield fact("language", lambda w: w.unknown_language, lambda w: w.all_of([w.language(c) for c in languages]))
    if zones:
        yield fact("city", lambda w: w.unknown_city, lambda w: w.all_of([w.city(z) for z in zones]))


def _named(code: str, kind: str) -> bool:
    """Whether each language of the demo has a name for a currency or a language."""
    return all(code in getattr(words(language).locale, kind) for language in LANGUAGES)
