"""Units of measure: read `cm`, `km/h`, `m/s^2`, `square metres`, and convert between those of one dimension."""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from .verdict import Unreadable

F = Fraction
# name -> (factor to the base unit, dimension). Names of one letter keep their case; longer ones also match in lower case.
_NAMES: dict[str, tuple[Fraction, str]] = {
    **dict.fromkeys(("m", "meter", "metre"), (F(1), "length")),
    **dict.fromkeys(("km", "kilometer", "kilometre"), (F(1000), "length")),
    **dict.fromkeys(("dm", "decimeter", "decimetre"), (F(1, 10), "length")),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), (F(1, 100), "length")),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), (F(1, 1000), "length")),
    **dict.fromkeys(("μm", "um", "micrometer", "micron"), (F(1, 10**6), "length")),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), (F(1, 10**9), "length")),
    **dict.fromkeys(("in", "inch", "inches"), (F(254, 10000), "length")),
    **dict.fromkeys(("ft", "foot", "feet"), (F(3048, 10000), "length")),
    **dict.fromkeys(("yd", "yard"), (F(9144, 10000), "length")),
    **dict.fromkeys(("mi", "mile"), (F(1609344, 1000), "length")),
    **dict.fromkeys(("g", "gram"), (F(1), "mass")),
    **dict.fromkeys(("kg", "kilogram", "kilo"), (F(1000), "mass")),
    **dict.fromkeys(("mg", "milligram"), (F(1, 1000), "mass")),
    **dict.fromkeys(("tonne",), (F(10**6), "mass")),
    **dict.fromkeys(("lb", "pound"), (F(45359237, 100000), "mass")),
    **dict.fromkeys(("oz", "ounce"), (F(28349523125, 10**9), "mass")),
    **dict.fromkeys(("s", "sec", "second"), (F(1), "time")),
    **dict.fromkeys(("ms", "millisecond"), (F(1, 1000), "time")),
    **dict.fromkeys(("min", "minute"), (F(60), "time")),
    **dict.fromkeys(("h", "hr", "hour"), (F(3600), "time")),
    **dict.fromkeys(("day",), (F(86400), "time")),
    **dict.fromkeys(("week",), (F(604800), "time")),
    **dict.fromkeys(("month",), (F(1), "months")),
    **dict.fromkeys(("yr", "year"), (F(12), "months")),
    **dict.fromkeys(("l", "L", "liter", "litre"), (F(1, 1000), "volume")),
    **dict.fromkeys(("ml", "mL", "milliliter", "millilitre"), (F(1, 10**6), "volume")),
    **dict.fromkeys(("gal", "gallon"), (F(3785411784, 10**12), "volume")),
    **dict.fromkeys(("°", "degree", "deg", "度"), (F(1), "angle")),
    **dict.fromkeys(("rad", "radian"), (F(1), "radians")),
    **dict.fromkeys(("°C", "celsius"), (F(1), "celsius")),
    **dict.fromkeys(("°F", "fahrenheit"), (F(1), "fahrenheit")),
    **dict.fromkeys(("K", "kelvin"), (F(1), "kelvin")),
    **dict.fromkeys(("N", "newton"), (F(1), "force")),
    **dict.fromkeys(("J", "joule"), (F(1), "energy")),
    **dict.fromkeys(("eV", "electronvolt"), (F(1602176634, 10**28), "energy")),
    **dict.fromkeys(("cal", "calorie"), (F(4184, 1000), "energy")),
    **dict.fromkeys(("W", "watt"), (F(1), "power")),
    **dict.fromkeys(("V", "volt"), (F(1), "voltage")),
    **dict.fromkeys(("A", "amp", "ampere"), (F(1), "current")),
    **dict.fromkeys(("C", "coulomb"), (F(1), "charge")),
    **dict.fromkeys(("F", "farad"), (F(1), "capacitance")),
    **dict.fromkeys(("T", "tesla"), (F(1), "flux density")),
    **dict.fromkeys(("Ω", "ohm"), (F(1), "resistance")),
    **dict.fromkeys(("Hz", "hertz"), (F(1), "frequency")),
    **dict.fromkeys(("Pa", "pascal"), (F(1), "pressure")),
    **dict.fromkeys(("mol", "mole"), (F(1), "amount")),
    **dict.fromkeys(("B", "byte"), (F(1), "data")),
    **dict.fromkeys(("$", "dollar", "usd"), (F(1), "dollar")),
    **dict.fromkeys(("cent", "cents", "¢"), (F(1, 100), "dollar")),
    **dict.fromkeys(("€", "euro", "eur"), (F(1), "euro")),
    **dict.fromkeys(("£", "gbp"), (F(1), "sterling")),
    **dict.fromkeys(("¥", "yen", "yuan", "rmb", "元"), (F(1), "yen")),
    **dict.fromkeys(("₹", "rupee", "rs", "inr"), (F(1), "rupee")),
    **dict.fromkeys(("米",), (F(1), "length")),
    **dict.fromkeys(("分米",), (F(1, 10), "length")),
    **dict.fromkeys(("厘米",), (F(1, 100), "length")),
    **dict.fromkeys(("毫米",), (F(1, 1000), "length")),
    **dict.fromkeys(("千米", "公里"), (F(1000), "length")),
    **dict.fromkeys(("克",), (F(1), "mass")),
    **dict.fromkeys(("千克", "公斤"), (F(1000), "mass")),
    **dict.fromkeys(("秒",), (F(1), "time")),
    **dict.fromkeys(("分钟",), (F(60), "time")),
    **dict.fromkeys(("小时",), (F(3600), "time")),
    **dict.fromkeys(("升",), (F(1, 1000), "volume")),
    **dict.fromkeys(("毫升",), (F(1, 10**6), "volume")),
    **dict.fromkeys(("unit", "units", "个"), (F(1), "")),
}
# A volume is a length to the third power: litres and cubic metres compare.
_DERIVED = {"volume": ("length", 3)}
CURRENCIES = "$€£¥₹"
# Symbols that take a metric prefix; no p before m, for "3 pm" is a time.
_PREFIXABLE = frozenset("m g s L J eV cal W V A C F T Ω Hz Pa N mol B".split())
_PREFIXES = {"k": F(10**3), "M": F(10**6), "G": F(10**9), "m": F(1, 10**3), "μ": F(1, 10**6), "n": F(1, 10**9)}
_PREFIX_WORDS = {"kilo": "k", "mega": "M", "giga": "G", "milli": "m", "micro": "μ", "nano": "n"}
_RARE_PREFIXES = {"pF": F(1, 10**12), "pA": F(1, 10**12), "ps": F(1, 10**12), "TB": F(10**12), "TW": F(10**12)}
_ALIASES = {"mph": "mi/h", "kph": "km/h", "kmph": "km/h", "kmh": "km/h", "Nm": "N·m", "\\Omega": "Ω", "\\cdot": "·"}
_ALIAS = re.compile("|".join(rf"(?<![A-Za-z]){re.escape(alias)}(?![A-Za-z])" for alias in _ALIASES))
_DEGREES = re.compile(r"(?:°|\bdeg(?:rees?)?\b)\s?(c|f)(?:elsius|ahrenheit)?\b", re.IGNORECASE)
# What a name can mean besides: £12 is 12 pounds, and 25 degrees may be 25 °C.
_ALSO = {
    "pound": ("£",), "°": ("°C", "°F"), "degree": ("°C", "°F"), "度": ("°C", "°F"), "C": ("°C",), "F": ("°F",),
}  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(?P<name>°[CF]?|[$€£¥¢₹]|[A-Za-zμΩ]+|[\u4e00-\u9fff]+)(?:\s?\^?\s?\{?(?P<power>-?[1-4])\}?)?|(?P<sign>[/·*]))"
)
_WORDY_POWERS = (
    (re.compile(r"\b(?:square|sq\.?)\s+|平方"), 2),
    (re.compile(r"\b(?:cubic|cu\.?)\s+|立方"), 3),
)


@dataclass(frozen=True, slots=True)
class Unit:
    """A product of powers of base dimensions, or a plain word such as `apples`."""

    factor: Fraction
    dimensions: tuple[tuple[str, int], ...]  # sorted; empty: a bare number
    also: "tuple[Unit, ...]" = ()  # other meanings of the same word

    @property
    def is_bare(self) -> bool:
        """Says nothing: no unit, or "units"."""
        return not self.dimensions and self.factor == 1


BARE = Unit(Fraction(1), ())


def conversion(gold: Unit, prediction: Unit) -> Fraction | None:
    """How many of the gold's unit one of the prediction's is; None where they measure different things."""
    for wanted in (gold, *gold.also):
        for found in (prediction, *prediction.also):
            if wanted.dimensions == found.dimensions:
                return found.factor / wanted.factor
    return None


def read_unit(text: str) -> Unit:
    """Read a unit of measure, already cleaned.

    Raises:
        Unreadable: a part of it is no unit that this table knows.
    """
    text, power_of_next = _ALIAS.sub(lambda match: _ALIASES[match.group()], text.strip()), 1
    text = _DEGREES.sub(lambda match: "°" + match[1].upper(), text)
    for pattern, power in _WORDY_POWERS:
        text, found = pattern.subn("", text)
        power_of_next = power if found else power_of_next
    text = re.sub(r"\bper\b|\ba(?=\s)|\bpro\b", "/", text)
    factor, dimensions = Fraction(1), Counter[str]()
    position, direction = 0, 1
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise Unreadable(f"{text[position : position + 20]!r} is no unit")
        position = token.end()
        if token["sign"]:
            direction = -1 if token["sign"] == "/" else direction
            continue
        base, dimension = _look_up(token["name"])
        power = int(token["power"] or 1) * power_of_next * direction
        power_of_next = 1
        factor *= base**power
        name, multiple = _DERIVED.get(dimension, (dimension, 1))
        if name:
            dimensions[name] += power * multiple
    also = tuple(read_unit(other) for other in _ALSO.get(_singular(text), ()))
    return Unit(factor, tuple(sorted((name, power) for name, power in dimensions.items() if power)), also)


def _look_up(name: str) -> tuple[Fraction, str]:
    if name in _NAMES:
        return _NAMES[name]
    if name in _RARE_PREFIXES or (name[1:] in _PREFIXABLE and name[0] in _PREFIXES):
        factor, dimension = _NAMES[name[1:]]
        return factor * (_RARE_PREFIXES.get(name) or _PREFIXES[name[0]]), dimension
    singular = _singular(name)
    for word, prefix in _PREFIX_WORDS.items():
        if (base := singular.lower().removeprefix(word)) in _NAMES and base not in (singular.lower(), ""):
            return _NAMES[base][0] * _PREFIXES[prefix], _NAMES[base][1]
    for spelling in (singular, *((name.lower(), singular.lower()) if len(name) > 1 else ())):
        if spelling in _NAMES:
            return _NAMES[spelling]
    raise Unreadable(f"{name!r} is no unit")


def _singular(name: str) -> str:
    return name[:-1] if len(name) > 2 and name.endswith("s") else name
