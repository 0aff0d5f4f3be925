"""Answers to multiple-choice questions as models write them: the letter, the option, both, a sentence; and two at once."""

import pytest

from metis_home.training.verifier import verify_answer

PETS = ("dog", "cat", "a cow", "dark red")
LENGTHS = ("12 cm", "15 cm", "18 cm")
FORMULAS = (r"$\frac{1}{2}$", r"$\frac{1}{3}$", r"$-\frac{1}{2}$", r"$2\sqrt{3}$")
LABELLED = ("A. 3", "B. 4", "C. 5")
WEATHER = ("It is not raining", "It rains", "Cannot be determined", "None of the above")
AGES = ("10-19", "20-29", "30-39")
PRICES = ("$5", "$10", "$15")
YES_OR_NO = ("Yes", "No")
POLYNOMIALS = ("x^2+1", "x^2-1", "(x+1)^2")
TRUTHS = ("True", "False", "Unsure")
LETTERS = ("A", "B", "C")
CHANGES = ("increase", "decrease", "no change", "not enough information")
STATEMENTS = ("I only", "II only", "I and II", "neither I nor II")
RATIOS = ("3:4", "4:3", "1:2")
POINTS = ("(0, 1)", "(1, 0)", "(-1, 0)")
DATES = ("May 5", "May 6")
TIMES = ("3:30 pm", "4:30 pm")

# (options, gold, prediction, right?)
ROWS = [
    (PETS, "A", "A. dog", True),
    (PETS, "A", "The answer is A", True),
    (PETS, "A", "(A) The dog", True),
    (PETS, "A", "A: dog", True),
    (PETS, "A", "dog, because it barks and a cat does not", True),
    (PETS, "A", "A. dog because the cat sleeps", True),
    (PETS, "A", "A. dog or cat", False),
    (PETS, "A", "dog or cat", False),
    (PETS, "A", "dog and cat", False),
    (PETS, "A", "The cat chases the dog", False),
    (PETS, "C", "cow", True),
    (PETS, "C", "C. cow", True),
    (PETS, "A", "A. a small dog", True),
    (PETS, "A", "A dog?", False),
    (PETS, "A", "A or B", False),
    (PETS, "B", "A cat", True),
    (PETS, "B", "It is a cat, not a dog", False),
    (PETS, "A", "B", False),
    (PETS, "A", "E", False),
    (PETS, "D", "red", False),
    (LENGTHS, "A", "12", True),
    (LENGTHS, "A", "12 cm", True),
    (LENGTHS, "A", "A. 12 cm", True),
    (LENGTHS, "A", "A. 12", True),
    (LENGTHS, "A", "A. 120 mm", True),
    (LENGTHS, "A", "15", False),
    (LENGTHS, "A", "A. 15", False),
    (LENGTHS, "A", "12 or 15", False),
    (LENGTHS, "A", "The length is 12 cm", True),
    (LENGTHS, "A", "A. 12 cm. 3 + 9 = 12", True),
    (LENGTHS, "A", "x = 12", True),
    (LENGTHS, "A", "A. x = 12", True),
    (LENGTHS, "A", "$12$ cm", True),
    (LENGTHS, "A", r"12\text{ cm}", True),
    (LENGTHS, "A", "A) $12 \\text{ cm}$", True),
    (LENGTHS, "A", "A. The length is 12 cm", True),
    (LENGTHS, "A", "13", False),
    (FORMULAS, "A", r"\frac12", True),
    (FORMULAS, "A", "0.5", True),
    (FORMULAS, "A", "1/2", True),
    (FORMULAS, "A", "-1/2", False),
    (FORMULAS, "C", "-1/2", True),
    (FORMULAS, "C", r"C. $-\frac{1}{2}$", True),
    (FORMULAS, "A", r"A. $\frac{1}{2}$", True),
    (FORMULAS, "A", r"A. $-\frac{1}{2}$", False),
    (FORMULAS, "D", r"\sqrt{12}", True),
    (FORMULAS, "D", "D. 2√3", True),
    (FORMULAS, "D", r"The answer is $2\sqrt{3}$", True),
    (FORMULAS, "A", r"A. $\frac{1}{2}$ or $\frac13$", False),
    (FORMULAS, "A", r"It is $\frac{1}{2}$", True),
    (FORMULAS, "A", r"It is $-\frac{1}{2}$", False),
    (FORMULAS, "C", r"The value is $-\frac{1}{2}$.", True),
    (LABELLED, "A", "A. 3", True),
    (LABELLED, "A", "3", True),
    (LABELLED, "A", "4", False),
    (LABELLED, "B", "B", True),
    (WEATHER, "A", "A. It is not raining", True),
    (WEATHER, "A", "It is not raining", True),
    (WEATHER, "B", "It is not raining", False),
    (WEATHER, "C", "Cannot be determined", True),
    (WEATHER, "C", "C. Cannot be determined", True),
    (WEATHER, "C", "It cannot be determined.", True),
    (WEATHER, "D", "none of the above", True),
    (WEATHER, "D", "D. None of the above", True),
    (WEATHER, "B", "B. It rains", True),
    (WEATHER, "B", "It rains", True),
    (AGES, "A", "10-19", True),
    (AGES, "A", "10 to 19", True),
    (AGES, "A", "20-29", False),
    (AGES, "A", "A. 10–19", True),
    (AGES, "A", "A. 20-29", False),
    (PRICES, "A", "$5", True),
    (PRICES, "A", "5", True),
    (PRICES, "A", "A. $5", True),
    (PRICES, "A", "5 dollars", True),
    (PRICES, "A", "$10", False),
    (PRICES, "A", "A. $10", False),
    (YES_OR_NO, "A", "Yes", True),
    (YES_OR_NO, "A", "yes, it is", True),
    (YES_OR_NO, "A", "No", False),
    (YES_OR_NO, "B", "No", True),
    (YES_OR_NO, "B", "B. No", True),
    (YES_OR_NO, "A", "Yes and no", False),
    (YES_OR_NO, "A", "No, yes", False),
    (POLYNOMIALS, "A", "1+x^2", True),
    (POLYNOMIALS, "A", "x^2+1", True),
    (POLYNOMIALS, "A", "x^2-1", False),
    (POLYNOMIALS, "C", "x^2+2x+1", True),
    (POLYNOMIALS, "A", "A. x^2+1", True),
    (POLYNOMIALS, "A", "A. x^2-1", False),
    (POLYNOMIALS, "B", r"B. $x^2-1$", True),
    (TRUTHS, "A", "True", True),
    (TRUTHS, "B", "False", True),
    (TRUTHS, "B", "B. False", True),
    (TRUTHS, "B", "true", False),
    (TRUTHS, "C", "Unsure", True),
    (TRUTHS, "A", "It is true", True),
    (TRUTHS, "A", "not true", False),
    (TRUTHS, "B", "It is false", True),
    (LETTERS, "B", "B", True),
    (LETTERS, "B", "B. B", True),
    (LETTERS, "B", "A", False),
    (LETTERS, "B", "B. C", False),
    (CHANGES, "A", "increase", True),
    (CHANGES, "A", "It will increase", True),
    (CHANGES, "C", "no change", True),
    (CHANGES, "C", "There is no change", True),
    (CHANGES, "D", "not enough information", True),
    (CHANGES, "D", "There is not enough information", True),
    (CHANGES, "A", "It does not increase", False),
    (CHANGES, "C", "C. no change", True),
    (STATEMENTS, "C", "I and II", True),
    (STATEMENTS, "C", "C. I and II", True),
    (STATEMENTS, "D", "neither I nor II", True),
    (STATEMENTS, "D", "D. neither I nor II", True),
    (STATEMENTS, "A", "I only", True),
    (STATEMENTS, "A", "A", True),
    (STATEMENTS, "B", "II only", True),
    (RATIOS, "A", "3:4", True),
    (RATIOS, "A", "6:8", True),
    (RATIOS, "A", "4:3", False),
    (RATIOS, "A", "A. 3:4", True),
    (RATIOS, "A", "A. 4:3", False),
    (RATIOS, "A", "3 to 4", True),
    (POINTS, "A", "(0,1)", True),
    (POINTS, "B", "(1,0)", True),
    (POINTS, "B", "(-1,0)", False),
    (POINTS, "C", "(-1,0)", True),
    (POINTS, "C", "C. (-1, 0)", True),
    (POINTS, "B", "B. (-1, 0)", False),
    (POINTS, "B", "The point is (-1, 0)", False),
    (POINTS, "C", "The point is (-1, 0)", True),
    (DATES, "A", "May 5", True),
    (DATES, "A", "A. May 5", True),
    (TIMES, "A", "15:30", True),
    (TIMES, "B", "4:30 PM", True),
    (DATES, "A", "5 May", False),
]


@pytest.mark.parametrize(("options", "gold", "prediction", "right"), ROWS)
def test_an_option_is_chosen_alone(options, gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold, options=options)

    assert verdict.correct is right, verdict
