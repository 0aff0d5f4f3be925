"""Properties: a gold scores itself, nothing a model writes raises, and equality does not depend on the side."""

from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from metis_home.training.verifier import extract_answer, gold_problem, verify_answer
from metis_home.training.verifier.normalise import clean
from metis_home.training.verifier.quantity import read_quantity

integers = st.integers(-(10**12), 10**12)
decimals = st.decimals(-(10**6), 10**6, places=3, allow_nan=False)
numbers = st.one_of(
    integers.map(str),
    integers.map(lambda n: f"{n:,}"),
    decimals.map(str),
    st.tuples(integers, st.integers(1, 999)).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.tuples(st.integers(0, 999), st.integers(1, 999)).map(lambda pair: f"{pair[0]}/{pair[1]}"),
    st.tuples(decimals, st.sampled_from(["cm", "m/s", "kg", "°", "apples", r"\text{ cm}^2", "%", "km per hour"])).map(
        lambda pair: f"{pair[0]} {pair[1]}"
    ),
)
words = st.lists(
    st.sampled_from("blue red traffic light left T-shirt seven Paris".split()), min_size=1, max_size=4
).map(" ".join)
choices = st.sampled_from(["A", "(B)", "C.", "D. 12 cm", "(E) the red one"])
times = st.tuples(st.integers(0, 23), st.integers(0, 59)).map(lambda t: f"{t[0]}:{t[1]:02d}")
parts = st.lists(st.one_of(integers.map(str), decimals.map(str)), min_size=2, max_size=6)
several = st.tuples(st.sampled_from([("", ""), ("(", ")"), ("[", "]"), (r"\{", r"\}")]), parts).map(
    lambda pair: pair[0][0] + ", ".join(pair[1]) + pair[0][1]
)
intervals = st.tuples(st.sampled_from("(["), integers, st.integers(1, 100), st.sampled_from(")]")).map(
    lambda t: f"{t[0]}{t[1]}, {t[1] + t[2]}{t[3]}"
)
ranges = st.tuples(st.integers(0, 999), st.sampled_from(["-", " to ", "–"]), st.integers(0, 999)).map(
    lambda t: f"{t[0]}{t[1]}{t[2]}"
)
golds = st.one_of(
    numbers,
    words,
    choices,
    times,
    several,
    intervals,
    ranges,
    st.sampled_from(
        ["yes", "No", "True", "1:2", "3:4:5", "ABD", "A+", ">", "20K", "1 hour 30 minutes", r"AB \perp CD"]
    ),
)
wrappings = st.sampled_from(
    [
        *("{}", "<answer>{}</answer>", "<think>r</think><answer>{}</answer>", "<answer> The answer is {} </answer>"),
        *("<answer>\\boxed{{{}}}</answer>", "<answer>$\\boxed{{{}}}$.</answer>", "**{}**", "\\boxed{{{}}}"),
    ]
)


@given(golds, wrappings)
@settings(max_examples=120, deadline=None)
def test_every_readable_gold_scores_itself_however_it_is_wrapped(gold, wrapping) -> None:
    assert gold_problem(gold) is None
    assert verify_answer(wrapping.format(gold), gold).correct is True


junk = st.text(
    st.one_of(st.characters(), st.sampled_from(list("{}()[]$\\^_!%,.:;=<>/0123456789 ABx")), st.sampled_from(
        ["\\boxed{", "<answer>", "</answer>", "<think>", "</think>", "\\frac{", "\\sqrt", "or", "and", "\\{", "\\pm"]
    ).map(lambda s: s[:1])),
    max_size=60,
)  # fmt: skip
tags = "<answer> </answer> <think> </think>"
marks = (
    r"答案是 not because 20K ≈ √ ₂ 1-2 \boxed{ } { \frac \{ \} 4 A $ , ( ) x = or \pm % cm : 30 - ^ ! \cup [ ] is 1,000"
)
pieces = st.lists(st.sampled_from([*tags.split(), *marks.split(), " ", " or ", " is "]), max_size=14).map("".join)


@given(
    st.one_of(junk, pieces),
    st.sampled_from(["4", "A", "yes", "blue", "12:30", "30-39", "5 cm", "(1, 2)", "[1, 2)", r"\{1, 2\}", "1:2", "10%"]),
)
@settings(max_examples=250, deadline=None)
@example("\ud800", "4")
@example("\x00" * 10, "blue")
def test_nothing_that_is_written_raises(text, gold) -> None:
    verdict = verify_answer(text, gold)

    assert verdict.correct in (True, False)
    assert verdict.reason


@given(st.one_of(junk, pieces))
@settings(max_examples=150, deadline=None)
def test_no_gold_raises_and_cleaning_twice_is_cleaning_once(text) -> None:
    extract_answer(text)
    clean(text)
    read = verify_answer("7", text, "number")
    assert read.correct in (True, False, None)


@given(numbers, numbers)
@settings(max_examples=150, deadline=None)
def test_equality_of_numbers_is_symmetric(one, other) -> None:
    assert verify_answer(one, other).correct == verify_answer(other, one).correct


@given(integers, integers)
@settings(max_examples=150, deadline=None)
def test_whole_numbers_are_equal_only_to_themselves(one, other) -> None:
    assert verify_answer(f"{one:,}", str(other)).correct is (one == other)


@given(st.fractions(-1000, 1000, max_denominator=500))
@settings(max_examples=120, deadline=None)
def test_fractions_are_exact(value: Fraction) -> None:
    text = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"

    assert read_quantity(text).value == value
    assert verify_answer(text, str(value)).correct is True
    assert verify_answer(str(value + Fraction(1, 1000)), str(value)).correct is False


@given(parts, st.randoms())
@settings(max_examples=120, deadline=None)
def test_a_set_is_the_same_in_any_order(elements, random) -> None:
    shuffled = random.sample(elements, len(elements))

    assert verify_answer(r"\{" + ", ".join(shuffled) + r"\}", r"\{" + ", ".join(elements) + r"\}").correct is True
