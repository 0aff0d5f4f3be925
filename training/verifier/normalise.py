"""One spelling for what is written in many: unicode, LaTeX wrappers, spacing, markdown, final punctuation."""

import re
import unicodedata

from .hedges import denies, doubts
from .units import read_unit
from .verdict import Unreadable

MAX_SENTENCE = 1000  # characters of a sentence in which a formula is looked for

# Vulgar fractions and superscripts first: NFKC would turn 1½ into 11⁄2 and cm² into cm2.
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"
_SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑", "-"),
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’", "'"),
        "⁄": "/", "÷": "/", "⋅": "·", "∙": "·", "º": "°", "％": "%", "，": ",", "：": ":", "（": "(", "）": ")",
        "。": ".", "、": ",", "；": ";", "！": "!", "？": "?",
        "\0": "", "\u200b": "", "\ufeff": "", "\u2061": "", "\u2062": "",
    }
)  # fmt: skip

# (pattern, replacement), in order; every pattern is linear.
_LATEX: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle)(?![a-zA-Z])\s?"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    (re.compile(r"\^\s?\{?\s?\\(?:circ|degree)(?![a-zA-Z])\s?\}?|\\(?:degree|textdegree)(?![a-zA-Z])"), "°"),
    (re.compile(r"(?<=\d)\s?\^\s?(?:\{\s?o\s?\}|o(?![a-zA-Z]))"), "°"),
    (re.compile(r"\\(?:bf|it|rm|sf|tt|em)(?![a-zA-Z])\s?"), ""),
    (re.compile(r"∠"), r"\\angle "),
    (re.compile(r"△"), r"\\triangle "),
    (re.compile(r"∥"), r"\\parallel "),
    (re.compile(r"⊥"), r"\\perp "),
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\(?:leq|leqslant|le)(?![a-zA-Z])|≤|⩽"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|ge)(?![a-zA-Z])|≥|⩾"), r"\\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"∞"), r"\\infty "),
    (re.compile(r"∪"), r"\\cup "),
    (re.compile(r"∈"), r"\\in "),
    (re.compile(r"≈|\\approx(?![a-zA-Z])"), r"\\approx "),
    (re.compile(r"\\(?:lbrace|rbrace)(?![a-zA-Z])"), lambda m: r"\{" if m.group()[1] == "l" else r"\}"),  # type: ignore[list-item]
]
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|mathrm|mathbf|mathit|mathsf|mathtt|operatorname|mbox|hbox|boldsymbol|bm"
    r"|emph|underline|ensuremath)\*?\s?\{([^{}]*)\}"
)
_DELIMITERS = re.compile(r"\\[()\[\]]")
_SPACE = re.compile(r"\s+")
_NEGATIVE = re.compile(r"\b(?:minus|negative) (?=[\d.\\$])", re.IGNORECASE)


def clean(text: str) -> str:
    """The answer without what only dresses it: `$\\text{A}$` -> `A`, `**4.**` -> `4`, `\\dfrac12` -> `\\frac12`.

    What has a meaning stays: signs, brackets, units, percent, `^`, `_`, LaTeX operators.
    """
    text = _plain_symbols(text)
    text = _DELIMITERS.sub(" ", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for _ in range(4):  # \textbf{\text{A}}
        unwrapped = _WRAPPERS.sub(r"\1", text)
        if unwrapped == text:
            break
        text = unwrapped
    text = _without_math_dollars(text)
    text = _SPACE.sub(" ", text).strip()
    text = _NEGATIVE.sub("-", text)
    return _without_dressing(text)


def fold(text: str) -> str:
    """Words for comparison: lower case, without articles, punctuation and accents of width.

    Signs stay where they have a meaning: `-5`, `x<3`, `C#`, `B+`, `B-`.
    """
    text = re.sub(r"\s?([<>=])\s?", r"\1", text.casefold()).replace("n't", " not")
    text = re.sub(r"(?<![\w)\]])-\s(?=\.?\d)", "-", text)
    text = re.sub(r"-\s?(?=[\\({|√])", " minus ", text)  # what follows is about to lose its brackets
    words = re.sub(r"[^\w%°$€£+.\-/:#<>=]+", " ", text).split()
    words = [bare for word in words if (bare := _without_punctuation(word))]
    # The last word is no article: "vitamin A".
    return " ".join([word for word in words[:-1] if word not in {"a", "an", "the"}] + words[-1:])


def _without_punctuation(word: str) -> str:
    return _TRAILING.sub("", word[_LEADING.match(word).end() :])  # type: ignore[union-attr]


# Punctuation around a word, but not a sign before a number and not the minus of a grade or an ion.
_LEADING = re.compile(r"[-./:#]*?(?=-?\.?\d|-[a-z](?![a-z])|[^-./:#]|$)")
_TRAILING = re.compile(r"[./:]+$|(?<=\w{4})-+$")
_SPAN = re.compile(r"(?<!\\)(?P<fence>\$\$?)(?P<dollars>[^$]+)(?<!\\)(?P=fence)|\\\((?P<round>.{1,400}?)\\\)")
_HEDGES = re.compile(r"\d|\$|\b(?:or|if)\b", re.IGNORECASE)


def only_math_span(text: str) -> str | None:
    r"""The content of the one `$...$` or `\(...\)` in a sentence, such as `The area is $12$ square metres`.

    None where there is none or several, or where the words around it hold a number or a hedge: `$12$ or 13`.
    """
    found = _SPAN.search(text[:MAX_SENTENCE])
    if found is None or len(text) > MAX_SENTENCE:
        return None
    around = text[: found.start()] + " " + text[found.end() :]
    if _HEDGES.search(around) or denies(around) or doubts(around):
        return None
    span = (found["dollars"] or found["round"]).strip()
    return f"{span} {_unit_at_the_start(text[found.end() :])}".strip() if span else None


def _unit_at_the_start(text: str) -> str:
    r"""`$2\sqrt{3}$ cm long` is so many cm: the unit belongs to the formula."""
    words = text.strip(" .,;").split()
    for count in (len(words), 2, 1):
        try:
            unit = " ".join(words[:count])
            if unit and count <= len(words) and (unit != "in" or count == len(words)):  # `$12$ in the box`
                read_unit(unit)
                return rf"\text{{ {unit}}}"
        except Unreadable:
            continue
    return ""


def _plain_symbols(text: str) -> str:
    text = text.translate(_SYMBOLS)
    text = re.sub("[" + "".join(_FRACTIONS) + "]", lambda m: " " + _FRACTIONS[m.group()] + " ", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    # After a digit a subscript is no digit: 4₂ is not 42. H₂O is H2O.
    text = re.sub(rf"(?<=[\d)])[{_SUBSCRIPTS}]+", lambda m: "_{" + m.group() + "}", text)
    return unicodedata.normalize("NFKC", text).translate(_SYMBOLS)


def _without_math_dollars(text: str) -> str:
    r"""Remove the dollar signs that delimit mathematics; one alone, or escaped as `\$`, is money."""
    marked = text.replace("\\$", "\0")
    if marked.count("$") % 2 == 0:
        marked = marked.replace("$", "")
    return marked.replace("\0", "$")


def _without_dressing(text: str) -> str:
    """Remove quotes, markdown emphasis and final punctuation around the whole."""
    previous = None
    while text != previous and text:
        previous = text
        for mark in ("**", "__", "`", '"', "'", "*"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)].strip()
        text = text.rstrip(" .;,")
        if text.endswith("!") and not re.search(r"[\d()\\{}]", text):  # not a factorial
            text = text.rstrip(" !")
        if text.startswith("{") and text.endswith("}") and text.count("{") == 1 and "," not in text:
            text = text[1:-1].strip()
    return text
