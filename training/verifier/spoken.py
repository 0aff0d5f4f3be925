"""Numbers in words: `three`, `twenty-one`, `one hundred and twenty`, `two thousand five hundred`, `a dozen`, `half`."""

from collections.abc import Sequence
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_UNITS = {word: value for value, word in enumerate(_SMALL)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
NUMBER_WORDS = frozenset(_UNITS) | frozenset(SCALES) | {"half"}


def spoken_number(words: Sequence[str]) -> tuple[Fraction | None, int]:
    """The number that these lower-case words begin with, and how many of them say it; None where they begin with none."""
    if words[:1] == ["half"]:
        scale = SCALES.get(words[1], 1) if len(words) > 1 else 1
        return Fraction(scale, 2), 1 if scale == 1 else 2
    total, last_scale, said = 0, 10**15, 0
    group: int | None = None
    if words[:1] in (["a"], ["an"]) and len(words) > 1 and words[1] in SCALES:
        group, said = 1, 1
    for position, word in enumerate(words[said:], start=said):
        after_and = word == "and" and said == position and (total or (group or 1) % 100 == 0)
        if after_and and position + 1 < len(words) and words[position + 1] in _UNITS:
            said += 1
            continue
        value, scale = _UNITS.get(word), SCALES.get(word, 0)
        if value is not None and (group is None or _may_follow(group, value)):
            group = (group or 0) + value
        elif scale in (12, 100) and group is not None and 0 < group < 100:
            group *= scale
        elif scale > 100 and group is not None and scale < last_scale:
            total, group, last_scale = total + group * scale, None, scale
        else:
            break
        said = position + 1
    return (Fraction(total + (group or 0)), said) if total or group is not None else (None, 0)


def _may_follow(group: int, value: int) -> bool:
    """`twenty` + `one`, `two hundred` + `five`; not `one` + `two`."""
    if group and group % 100 == 0:
        return 0 < value < 100
    return group % 10 == 0 and group % 100 >= 20 and 0 < value < 10
