r"""Expressions with a unit of measure: `36\pi \text{ cm}^2`, `2\sqrt{3} cm`. math-verify would read `c \cdot m`."""

import re
from fractions import Fraction

from .equations import is_relation, is_symbolic, leading_name
from .expression import same_expression
from .normalise import clean
from .units import BARE, Unit, conversion, read_unit
from .verdict import Unreadable

MAX_LENGTH = 512  # characters; longer ones are never compared
_POWER = r"(?:\s?\^\s?\{?\s?[1-4]\s?\}?)?"
_WRAPPED = re.compile(rf"\\(?:text|textrm|mathrm|rm|operatorname)\s?\{{([^{{}}]{{1,40}})\}}({_POWER})[\s.$]*$")
# Without a wrapper one letter is a variable.
_PLAIN = re.compile(
    r"(?<=[\d)}\]πi])\s?((?:(?:square|cubic|sq\.?|cu\.?)\s)?[A-Za-zμΩ]{2,20}(?:[A-Za-zμΩ\d\s/·^{}]{0,20}))$"
)


def split_unit(text: str) -> tuple[str, Unit]:
    """The expression and its unit; an expression with letters of its own has none: `2 mh` may be a product."""
    if len(text) > MAX_LENGTH:
        return text, BARE
    for where, found in ((text, _WRAPPED.search(text)), (cleaned := clean(text), _PLAIN.search(cleaned))):
        if found is None:
            continue
        expression = where[: found.start()].strip()
        try:
            unit = read_unit(clean("".join(found.groups())))
        except Unreadable:
            continue
        if clean(expression) and not is_symbolic(clean(expression).rsplit("=", 1)[-1]):
            return expression, unit
    return text, BARE


def same_measured(gold: str, gold_unit: Unit, prediction: str, tolerance: Fraction | None = None) -> tuple[bool, str]:
    """Are the expressions equal, in the gold's unit? A unit counts where both sides have one.

    Raises: what `same_expression` raises.
    """
    expression, unit = split_unit(prediction)
    if not gold_unit.is_bare and not unit.is_bare:
        factor = conversion(gold_unit, unit)
        if factor is None:
            return False, "measured in another unit"
        if factor != 1:
            value = leading_name(clean(expression))[1]
            if is_relation(value):
                raise Unreadable("is an equation in another unit")
            expression = rf"({value}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}"
    return same_expression(gold, expression, tolerance)
