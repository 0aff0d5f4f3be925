"""`verify_answer`: what counts as right, row by row. The first table is math-verify's failures, with the verdict we want."""

import time

import pytest

from metis_home.errors import RewardError
from metis_home.training.verifier import KINDS, gold_problem, verify_answer
from metis_home.training.verifier.kinds import infer_kind

# (gold, prediction, right?)
PROBES = [
    ("4", "<answer>4</answer>", True),
    ("A", r"\boxed{A}", True),
    (r"$\text{A}$", r"\boxed{A. 12}", True),
    ("Yes", r"\boxed{Yes}", True),
    ("blue", r"\boxed{blue}", True),
    ("1/3", "0.333", False),
    ("1/3", "0.3333333", True),
    ("3.14", r"\pi", False),
    ("10%", r"\boxed{10}", False),
    ("10%", r"\boxed{0.1}", True),
    ("$5$", r"\boxed{6} then \boxed{5}", True),
    ("$5$", r"\boxed{5} then \boxed{6}", False),
    ("(1,2)", "(1, 2)", True),
    ("12:30", "12:30", True),
    ("60", r"60^\circ", True),
    (r"60^\circ", "60", True),
    ("4", r"4\text{ cm}", True),
    ("1000", "1,000", True),
    ("3/2", "1½", True),
    ("3", "x=3", True),
    (r"2\sqrt3", r"\sqrt{12}", True),
    ("5", "9^{9^{9^9}}", False),
    ("5", "10^{10^{10}}", False),
    ("5", "1000000!", False),
    ("5", "(" * 300 + "5" + ")" * 300, False),
]

OTHERS = [
    # numbers
    ("4", "four", True),
    ("4", "04", True),
    ("-0", "0", True),
    ("4", "-4", False),
    ("4", "−4", False),  # a unicode minus
    ("-4", "−4", True),
    ("4", "４", True),
    ("4", "4.0", True),
    ("4", "4.0000001", True),  # float noise
    ("4", "4.00001", False),
    ("1000000", "1000001", False),
    ("1000000", "1000000.5", False),
    ("0.5", r"\frac{1}{2}", True),
    ("0.5", r"\frac12", True),
    ("0.5", "0.54", False),
    ("1.5", r"1\frac{1}{2}", True),
    ("1.5", "1 1/2", True),
    ("120000", r"1.2\times10^{5}", True),
    ("4000000", "4 million", True),
    ("4", "4 million", False),
    ("4", "3 or 4", False),
    ("4", "4 or 5", False),
    ("4", "not 4", False),
    ("4", "4 is wrong", False),
    ("4", "1/0", False),
    ("0", "1e999999999", False),
    ("1,000", "1, 000", False),
    ("1,000", "1{,}000", True),
    ("1000", "1 000", True),
    ("12", "The area is 12.", True),
    ("12", "It is not 12, it is 13.", False),
    ("12", "5 is wrong and it is 12", False),
    ("12", "The area is $12$ square metres.", True),
    ("12", "$11$ or $12$", False),
    ("12", "$12$ or 13", False),
    ("12", "It is not $12$.", False),
    ("12", r"The area is \(12\) m", True),
    ("9", "3^2", True),
    ("120", "5!", True),
    ("5", "5!", False),
    # percent
    ("10%", "10\\%", True),
    ("10%", "10 percent", True),
    ("10%", "1/10", True),
    ("10", "10%", False),
    # units
    ("2 cm", "20 mm", True),
    ("2 cm", "2 m", False),
    ("2 cm", "2 kg", False),
    ("2 cm", "2", True),
    ("3 L", "3000 cm^3", True),
    ("90 km/h", "25 m/s", True),
    ("$5", "5 dollars", True),
    ("$5", "5 euros", False),
    ("4 apples", "4 apple", True),
    ("4 apples", "4 pears", False),
    ("x=3", "y=3", False),
    # choices
    ("B", "(B)", True),
    ("B", "b", True),
    ("B", "B. 12", True),
    ("B", "The answer is B or C", False),
    ("B", "A, B", False),
    ("B", "B and C", False),
    ("B", "The correct option is (B).", True),
    ("B", "**B**", True),
    ("A", "A cat is in the box", False),
    ("A", "12", False),
    ("B", "B or 123457", False),
    ("B", "either 12 or B", False),
    ("yes", "yes or 12", False),
    ("yes", "Yes, it is red or blue", True),
    ("A. 12", "12", True),
    ("A. 12", "A", True),
    ("A, C", "C and A", True),
    ("A, C", "A", False),
    # yes and no, words
    ("yes", "Yes, because it is red.", True),
    ("yes", "No", False),
    ("yes", "Yes and no", False),
    ("yes", "It is not true", False),
    ("no", "False", True),
    ("blue", "The Blue.", True),
    ("blue", "light blue", False),
    ("blue", "blue or red", False),
    ("T-shirt", "t-shirt", True),
    ("H2O", "$H2O$", True),
    # times and ratios
    ("12:30", "12:03", False),
    ("3:30 pm", "15:30", True),
    ("3:30 pm", "3:30", False),
    ("3:30", "3:30 PM", True),
    ("3:30", "4:30 PM", False),
    ("15:30", "4:30 pm", False),
    ("3:30 am", "3:30 pm", False),
    ("12:30", "12:30:00", True),
    ("12:30", "12.5", False),
    ("3:4", "6:8", True),
    ("3:4", "4:3", False),
    # points, intervals, lists, sets
    ("(1,2)", "[1,2]", False),
    ("(1,2)", "(2,1)", False),
    (r"(1,\sqrt{4})", "(1,2)", True),
    ("(1,2)", r"\left(1, 2\right)", True),
    ("[1,2)", r"1\le x<2", True),
    ("[1,2)", "(1,2]", False),
    ("[1,2)", r"x\in[1,2)", True),
    ("x>3", r"(3,\infty)", True),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)", True),
    (r"\{1,2\}", "2, 1", True),
    (r"\{1,2\}", r"\{1,2,3\}", False),
    (r"\{1,2\}", r"\{1\}", False),
    (r"\emptyset", r"\{\}", True),
    ("1, 2", "2, 1", False),
    ("1, 2", "1, 2", True),
    ("1, 2", "1,2,3", False),
    ("1,000, 2,000", "1000, 2000", True),
    ("x=1 or x=2", "2 or 1", True),
    (r"\pm 2", "2, -2", True),
    ("x=1, y=2", "y=2, x=1", True),
    ("x=1, y=2", "x=2, y=1", False),
    # expressions
    ("x^2+1", "1+x^2", True),
    ("(x+1)(x-1)", "x^2-1", True),
    ("x^2+1", "x^2-1", False),
    (r"\frac{\sqrt{3}}{2}", "sqrt(3)/2", True),
    ("2x", "2*x", True),
    (r"\sin x", "blue", False),
    ("x^2", "((2^{99})^{99})^{99}", False),
    # finding the answer
    ("4", "<think>4</think>", False),
    ("4", "<think>4", False),
    ("5", "<think>4 maybe</think>5", True),
    ("5", "4 maybe</think>5", True),  # the template wrote <think>
    ("4", "<think><answer>4</answer></think>So 5", False),
    ("4", "", False),
    ("4", "<answer></answer>", False),
    ("4", "<answer> 4 </answer> and good bye", True),
    ("4", "<answer>5</answer><answer>4</answer>", True),
    ("4", "<answer>4</answer><answer>5</answer>", False),
    ("4", "<answer>5 <answer>4</answer></answer>", True),
    ("4", "<answer>4", True),  # a stop string ate the end
    ("4", r"\boxed{5}<answer>4</answer>", True),
    ("4", r"<answer>\boxed{4} \boxed{</answer>", True),
    ("4", r"<answer>\boxed{\boxed{4}}</answer>", True),
    ("4", r"<answer>\boxed{5 \boxed{4}}</answer>", False),
    ("4", "<think>x <answer>5</answer></think><answer>4</answer><|im_end|>", True),
    ("4", "a" * 100_000, False),
    ("4", r"\boxed{" * 10_000, False),
    ("4", "\\frac{" * 300, False),
    ("4", "$" * 5000, False),
    ("4", "\x00\ud800 4", False),
]


@pytest.mark.parametrize(("gold", "prediction", "right"), PROBES + OTHERS)
def test_the_verdict_is_the_one_we_want(gold, prediction, right) -> None:
    verify_answer("$x+1$", "x+2")  # the pool runs

    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict
    assert verdict.outcome != "timed_out"  # no bomb reaches sympy


@pytest.mark.parametrize(
    "gold",
    ["", "   ", r"\frac{", "}{^", r"\boxed{}", "9^{9^{9^9}}", "1000000!", "x" * 3000, "(" * 40 + "x+1" + ")" * 40,
     "The light of the sun falls on the wall, which gets warm and slowly warms the room."],
)  # fmt: skip
def test_a_gold_that_cannot_be_read_is_none_whatever_is_answered(gold) -> None:
    assert gold_problem(gold)
    for prediction in (gold, "5", "", "<think>", r"\boxed{A}"):
        verdict = verify_answer(prediction, gold)
        assert verdict.correct is None
        assert verdict.outcome == "unparsed_gold"


@pytest.mark.parametrize(
    ("kind", "gold", "prediction", "right"),
    [
        ("percent", "10", "10%", True),
        ("percent", "10", "ten", True),
        ("percent", "10", "ten percent", True),
        ("percent", "10%", "10", True),
        ("percent", "10%", "0.1", False),
        ("interval", "(1,2)", "1<x<2", True),
        ("interval", "(1,2)", "[1,2]", False),
        ("list", "[1,2]", "(1, 2)", True),
        ("list", "100,200", "100, 200", True),
        ("set", "1, 2", "2, 1", True),
        ("choices", "AC", "C, A", True),
        ("choices", "AC", "A", False),
        ("choice", "K", r"\boxed{K}", True),
        ("text", "4", "four", False),
        ("text", "4", "4", True),
        ("integer", "4", "4.0", True),
        ("expression", "4", r"\sqrt{16}", True),
        ("multiple-choice", "A", "(A)", True),
    ],
)
def test_a_kind_decides_how_the_gold_is_read(kind, gold, prediction, right) -> None:
    assert verify_answer(prediction, gold, kind).correct is right


@pytest.mark.parametrize(
    ("kind", "gold"),
    [("integer", "4.5"), ("choice", "12"), ("boolean", "maybe"), ("time", "4"), ("number", "blue"), ("ratio", "4")],
)
def test_a_gold_of_another_kind_is_none(kind, gold) -> None:
    assert f"is no {kind}" in gold_problem(gold, kind)
    assert verify_answer(gold, gold, kind).correct is None


OPTIONS = ["12", "15 cm", "red", "dark red", "None of A and B"]


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [
        ("A", "12", True),
        ("12", "A", True),
        ("A", "twelve", True),
        ("A", "B. 12", False),  # contradicts itself
        ("B", "B. 12", False),
        ("A", "A. 12", True),
        ("B", "15", True),
        ("B", "150 mm", True),
        ("C", "The colour is red", True),
        ("C", "The colour is dark red", False),
        ("D", "The colour is dark red", True),
        ("C", "red or dark red", False),
        ("C", "not red", False),
        ("E", "None of A and B", True),
        ("E", "E. None of A and B", True),
        ("C", "blue", False),
    ],
)
def test_options_are_chosen_by_letter_or_text_exactly_one(gold, prediction, right) -> None:
    assert verify_answer(prediction, gold, options=OPTIONS).correct is right


def test_a_letter_beyond_the_options_is_no_gold() -> None:
    assert "option F of only 5" in gold_problem("F", "choice", options=OPTIONS)


def test_a_closed_vocabulary_is_found_in_a_sentence() -> None:
    assert verify_answer("It looks blue to me", "blue", "text", options=["red", "blue"]).correct is True
    assert verify_answer("It is red, no, blue", "blue", "text", options=["red", "blue"]).correct is False


@pytest.mark.parametrize(
    ("tolerance", "prediction", "right"),
    [(0.01, r"\pi", True), (0.001, r"\pi", False), (0.01, "3.15", True), ("1%", "3.17", True), ("1%", "3.18", False),
     ("0%", "3.14", True)],
)  # fmt: skip
def test_a_tolerance_is_explicit(tolerance, prediction, right) -> None:
    assert verify_answer(prediction, "3.14", tolerance=tolerance).correct is right


@pytest.mark.parametrize("tolerance", ["wide", -1, "-5%", "nan", float("inf")])
def test_a_tolerance_that_is_none_is_an_error_of_the_data(tolerance) -> None:
    with pytest.raises(RewardError, match="tolerance"):
        verify_answer("3", "3", tolerance=tolerance)
    assert "tolerance" in gold_problem("3", tolerance=tolerance)


def test_an_unknown_kind_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(RewardError, match="Did you mean 'number'"):
        verify_answer("3", "3", "nubmer")
    assert "nubmer" in gold_problem("3", "nubmer")


@pytest.mark.parametrize(
    ("gold", "kind"),
    [("B", "choice"), ("(B) red", "choice"), ("A, B", "choices"), ("No", "boolean"), ("blue", "text"),
     ("2024-01-05", "text"), ("4 cm", "number"), ("10%", "number"), ("1,000", "number"),
     ("12:30", "time"), ("3:4", "ratio"), ("(1,2)", "point"),
     ("[1,2]", "interval"), ("x<3", "interval"), ("1,2", "list"), ("[1,2,3]", "list"), (r"\{1\}", "set"),
     ("1 or 2", "set"), ("black and white", "text"), ("2x+1", "expression"), (r"\sqrt{2}", "expression"), ("x", "text")],
)  # fmt: skip
def test_a_gold_without_a_kind_is_read_by_its_looks(gold, kind) -> None:
    assert infer_kind(gold) == kind
    assert kind in KINDS


def test_verdicts_tell_how_and_why() -> None:
    verdict = verify_answer(r"<answer>\boxed{15}</answer>", "4 cm")

    assert (verdict.correct, verdict.method, verdict.extracted) == (False, "number", "15")
    assert verdict.reason == "the numbers differ"
    assert verify_answer("", "4").outcome == "no_answer"
    assert verify_answer("blue", "4").outcome == "unparsed_prediction"


def test_three_hundred_comparisons_take_less_than_a_second() -> None:
    verify_answer("$x+1$", "x+2")
    start = time.monotonic()

    assert all(verify_answer(f"<answer>{n}.0</answer>", str(n)).correct for n in range(300))
    assert time.monotonic() - start < 10  # typed: no process is asked
