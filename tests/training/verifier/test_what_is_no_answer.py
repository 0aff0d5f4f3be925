r"""A hedge, a denial, or a different value is no answer; the usual wordings beside each stay right."""

import pytest

from metis_home.training.verifier import gold_problem, verify_answer
from metis_home.training.verifier.kinds import infer_kind

PETS = ("dog", "cat", "cow")
COUNTS = ("12", "2", "3")
LINES = ("x=1", "x=3", "x < 2", "x=0")

# (gold, options, prediction, right?)
OPTIONS = [
    ("A", ("-3", "2", "4"), "3", False),
    ("A", ("-3", "2", "4"), "-3", True),
    ("A", ("-3", "2", "4"), "The answer is -3.", True),
    ("A", ("-3", "2", "4"), "It is minus 3", True),
    ("B", ("-3", "2", "4"), "It is 2", True),
    ("A", ("-1/2", "2", "3", "4"), "1/2", False),
    ("A", ("-1/2", "2", "3", "4"), "-0.5", True),
    ("B", (r"$-\frac13$", r"$\frac{1}{2}$"), r"-\frac{1}{2}", False),
    ("B", (r"$-\frac13$", r"$\frac{1}{2}$"), r"\frac12", True),
    ("A", (r"$-\sqrt{3}$", "2"), r"\sqrt{3}", False),
    ("A", (r"$-\sqrt{3}$", "2"), r"$-\sqrt3$", True),
    ("C", LINES, "x > 2", False),
    ("C", LINES, "x<2", True),
    ("C", LINES, "2 > x", True),
    ("A", ("(3, 1)", "(2,2)"), "(3, -1)", False),
    ("A", ("(3, 1)", "(2,2)"), "(3,1)", True),
    ("A", ("3x + 2", "4x + 2"), "-3x + 2", False),
    ("A", ("3x + 2", "4x + 2"), "2 + 3x", True),
    ("A", ("y=-x+2", "y=x+2"), "A. y=x+2", False),
    ("B", ("y=-x+2", "y=x+2"), "A. y=x+2", False),
    ("A", ("y=-x+2", "y=x+2"), "A. y = -x + 2", True),
    ("A", ("y = -2x", "y = 2x"), "y = -2x", True),
    ("A", ("y = -2x", "y = 2x"), "y = 2x", False),
    ("A", ("x>3", "x<3"), "x>3", True),
    ("A", ("x>3", "x<3"), "x<3", False),
    ("A", ("blue-green", "blue"), "blue", False),
    ("A", ("T-shirt", "hat"), "a t-shirt", True),
    ("A", ("$5", "$6"), "5 dollars", True),
    ("A", ("one dog", "two dogs"), "One dog.", True),
    # letters and option texts that are denied
    ("A", PETS, "not A", False),
    ("A", PETS, "dog is wrong", False),
    ("A", PETS, "It is anything but dog", False),
    ("A", PETS, "It is the dog", True),
    ("A", PETS, "A dog", True),
    ("A", PETS, "Because it barks, it is the dog.", True),
    # several
    ("B", PETS, "B. a dog, cow, or cat", False),
    ("B", PETS, "B. not cat", False),
    ("B", PETS, "B. cat", True),
    ("B", PETS, "B. The cat", True),
    ("B", PETS, "B. It is the cat", True),
    ("A", PETS, "A. It is the cat", False),
    ("B", PETS, "A. It is the cat", False),
    ("B", COUNTS, "B. 2 or 3", False),
    ("B", COUNTS, "B. 3 or 2", False),
    ("B", COUNTS, "B. 2", True),
    ("B", COUNTS, "B. 2 apples", True),
    ("A", COUNTS, "12", True),
    ("D", ("dog", "cat", "dog and cat", "None of A and B"), "D. None of A and B", True),
    ("C", ("dog", "cat", "dog and cat", "None of A and B"), "dog and cat", True),
    ("A", ("20 °C", "25 °C", "30 °C"), "20 °C", True),
    ("C", ("20 °C", "25 °C", "30 °C"), "20 °C", False),
    # more than 26
    ("A", tuple(f"w{i}" for i in range(40)), "It is w38", False),
    ("w38", tuple(f"w{i}" for i in range(40)), "It is w38", True),
    ("w3", tuple(f"w{i}" for i in range(40)), "It is w38", False),
]


@pytest.mark.parametrize(("gold", "options", "prediction", "right"), OPTIONS)
def test_an_option_is_its_letter_or_its_value(gold, options, prediction, right) -> None:
    verdict = verify_answer(prediction, gold, options=options)

    assert verdict.correct is right, verdict


def test_a_label_does_not_make_another_gold_of_an_option() -> None:
    assert verify_answer("x<3", "B. x>3").correct is False
    assert verify_answer("x>3", "B. x>3").correct is True
    assert verify_answer("3 < x", "B. x>3").correct is True


def test_a_vocabulary_may_have_more_words_than_there_are_letters() -> None:
    words = [*(f"w{i}" for i in range(27)), "ant"]

    assert gold_problem("ant", options=words) is None
    assert infer_kind("ant", words) == "text"
    assert verify_answer("It is an ant", "ant", "choice", options=words).correct is True
    assert verify_answer("w26", "ant", "choice", options=words).correct is False


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [("-5", "5", False), ("-5", "-5", True), ("-5", "−5", True), ("x>3", "x<3", False), ("x>3", "x > 3", True),
     ("C#", "C", False), ("C#", "c#", True), ("red", "- red", True), ("B", "B-", False), ("B-", "B-", True),
     ("well-known", "well-known.", True), ("Na+", "Na", False), ("St. Louis", "St Louis", True), ("x=3", "x = 3", True),
     ("light blue", "light-blue", False)],
)  # fmt: skip
def test_signs_belong_to_a_text(gold, prediction, right) -> None:
    assert verify_answer(prediction, gold, "text").correct is right


# (gold, prediction, right?)
RANGES = [
    ("30-39", "40-49", False),
    ("30-39", "30-39", True),
    ("30-39", "30 to 39", True),
    ("30-39", "30–39", True),
    ("30-39", "from 30 to 39", True),
    ("30-39", "$30$--$39$", True),
    ("30-39", "30-39 years", True),
    ("30-39", "-9", False),
    ("30-39", "30", False),
    ("30 to 39", "30-39", True),
    ("18-24", "25-31", False),
    ("2018-19", "2019-20", False),
    ("2018-19", "2018–19", True),
    ("1998-99", "1899", False),
    ("$30-$39", "$40-$49", False),
    ("$30-$39", "$30 - $39", True),
    ("$30-$39", "30-39", True),
    ("€30-€39", "£30-£39", False),
    ("5-10 cm", "50-100 mm", True),
    ("5-10 cm", "5-10 kg", False),
    ("10%-15%", "10-15%", True),
    ("555-1234", "556-1235", False),
    ("555-1234", "555-1234", True),
    ("555-0123", "555-123", False),
    ("123-45-6789", "123-45-6789", True),
    ("2-1", "3-2", False),
    ("2-1", "2 - 1", True),
    ("2-1", "1", False),
    ("24-7", "17", False),
    ("10:30-11:30", "11:30-12:30", False),
    ("10:30-11:30", "10:30 to 11:30", True),
    ("2024-01-05", "2024-01-05", True),
    ("2024-01-05", "2024-02-04", False),
    ("17", "24-7", False),
    ("-4", "-4", True),
    ("17", "24 - 7 = 17", True),
    ("24 - x", "24 - x", True),
]


@pytest.mark.parametrize(("gold", "prediction", "right"), RANGES)
def test_a_range_is_no_subtraction(gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict


LETTERS = [
    ("B", "Not B", False),
    ("B", "It is not B", False),
    ("B", "It isn't B", False),
    ("B", "B is wrong", False),
    ("B", "B is not the answer", False),
    ("B", "All except B", False),
    ("B", "Anything but B", False),
    ("B", "neither B", False),
    ("B", "Option B is eliminated", False),
    ("B", "Maybe B", False),
    ("B", "B?", False),
    ("B", "B is right", True),
    ("B", "Option B is correct.", True),
    ("B", "I choose B", True),
    ("B", "It must be B", True),
    ("B", "There is no circle, so the answer is B", True),
    ("B", "The figure does not move. Therefore, B.", True),
    ("B", "B because A and C are wrong", True),
    ("B", "B, since it is not red", True),
    ("B", "B - the red one", True),
    ("A", "B because A and C are wrong", False),
    ("B", "b) and c)", False),
    ("B", "(b) or (c)", False),
    ("B", "(B) (c)", False),
    ("B", "B. (c) (d) (a)", False),
    ("B", "(B) A C D", False),
    ("B", "B.\nC.", False),
    ("B", "B: A C D", False),
    ("A", "A. B", False),
    ("A", "A: B", False),
    ("B", "A: B", False),
    ("B", "(B) is wrong", False),
    ("A", "A. Vitamin C", True),
    ("B", "B. (c) 12", False),
    ("B", "(B) 12", True),
    ("B", "B. B", True),
    ("D", "D. Both B and C", True),
    ("B", "D. Both B and C", False),
    ("D", "D. None of the above", True),
    ("C", "20 °C", False),
    ("C", "°C", False),
    ("C", "20 C", False),
    ("A", "5 A", False),
    ("C", "C++", False),
    ("C", "C#", False),
    ("C", "5 (C)", True),
    ("C", "The answer to question 2 is C", True),
]


@pytest.mark.parametrize(("gold", "prediction", "right"), LETTERS)
def test_a_letter_must_be_chosen_and_alone(gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict


EQUATIONS = [
    ("4", "3x=4", False),
    ("4", "x^2=4", False),
    ("4", "x+1=4", False),
    ("4", "2x=4", False),
    ("4", "xy=4", False),
    ("4", "5=4", False),
    ("4", "1=2=3=4", False),
    ("4", "x=5=4", False),
    ("4", r"x \not= 4", False),
    ("4", r"x \neq 4", False),
    ("4", "x ≠ 4", False),
    ("4", "x=4", True),
    ("4", "4=x", True),
    ("4", "x = 2 + 2 = 4", True),
    ("4", "2+2=4", True),
    ("60", "20+40=60", True),
    ("4", r"AB = 4", True),
    ("4", r"A = \frac{1}{2}bh = 4", True),
    ("4", "x > 4", False),
    (r"\sqrt{2}", r"5=\sqrt{2}", False),
    (r"\sqrt{2}", r"x=\sqrt{2}", True),
    (r"\sqrt{2}", r"\sqrt{2} \approx 7", False),
    (r"\sqrt{2}", r"\sqrt{2} \approx 1.41", True),
    ("1.41", r"\sqrt{2} \approx 1.41", True),
    ("1.41", r"\sqrt{3} \approx 1.41", False),
    (r"4\pi", r"A = \pi r^2 = 4\pi", True),
    (r"4\pi", r"A = \pi r^2 = 5 = 4\pi", False),
    ("2x+1", "y = 2x+1", True),
    ("2x+1", "y = 2x+2", False),
    ("y = 2x+1", "y = 2x+1", True),
    ("y = 2x+1", "y = 2x+2", False),
    (r"\frac{4}{5}", r"\sin A = \frac{4}{5}", True),
    ("5", "f(2) = 5", True),
]


@pytest.mark.parametrize(("gold", "prediction", "right"), EQUATIONS)
def test_an_equation_counts_where_it_states_the_answer(gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict


NUMBERS = [
    *[("4", f"4 {words}", False) for words in (
        "wait", "never mind", "cannot determine", "false", "unsure", "mistake", "ignore that", "perhaps", "maybe",
    )],
    ("4", "The wrong answer is 4", False),
    ("4", "What is wrong is 4", False),
    ("4", "The answer is not 4", False),
    ("4", "It is not 5, so the answer is 4", True),
    ("4", "4 apples", True),
    ("4", "4 red apples", True),
    ("4", "4 people", True),
    ("4", "4 apples left", True),
    ("1", "1 person", True),
    ("4 apples", "4 apple", True),
    ("4 sheep", "4 sheep", True),
    ("5 cm", "500%", False),
    ("500%", "5 cm", False),
    ("500%", "5", True),
    ("42", "4₂", False),
    ("H2O", "H₂O", True),
    (r"\{1,2\}", "(1,2)", False),
    (r"\{1,2\}", "[1,2]", False),
    (r"\{1,2\}", "1, 2", True),
    ("x>3", "y>3", False),
    ("x>3", "x>3", True),
    (r"x\in[1,2)", r"y\in[1,2)", False),
    ("[1,2)", r"y\in[1,2)", True),
    ("€5", "\x005", True),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "prediction", "right"), NUMBERS)
def test_words_and_marks_around_a_value_count(gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [
        *[("no", words, False) for words in (
            "No idea", "I have no idea", "no answer", "There is no way to tell, could be affirmative", "No. Yes.",
            "maybe no", "yes or no", "Not sure, maybe no", "It is not no", "No, yes",
        )],
        *[("yes", words, False) for words in (
            "yes but actually nope", "Yes. Nope.", "maybe yes", "I can't say yes", "Yes. No.", "Yes and no", "Yes, no",
            "Yes, or maybe not", "Yes, wait, no", "Yes, that is false",
        )],
        *[("yes", words, True) for words in (
            "Yes. There is no doubt.", "Yes, it is red or blue", "Yes, there are no cars.", "Yes: no car is red",
            "yes it is", "The answer is yes.", "It is true.", "Yes, because it is not red.",
        )],
        *[("no", words, True) for words in (
            "No, it is not true that", "No, it is not.", "no it is not", "The answer is no.", "so no.", "No, it isn't",
            "No, there are 3", "No because it is red", "It is false",
        )],
    ],
)  # fmt: skip
def test_yes_or_no_must_be_said(gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict
