r"""Right answers as vision language models write them; beside each a wrong one that looks like it."""

import pytest

from metis_home.training.verifier import gold_problem, verify_answer
from metis_home.training.verifier.kinds import infer_kind

# (gold, prediction, right?)
EXPRESSIONS_WITH_UNITS = [
    (r"2\pi", r"2\pi \text{ cm}", True),
    (r"36\pi", r"36\pi \text{ cm}^2", True),
    (r"36\pi", "36π cm²", True),
    (r"36\pi", "36π square units", True),
    (r"36\pi", "35π square units", False),
    (r"2\sqrt{3}", r"2\sqrt{3} \text{ cm}", True),
    (r"2\sqrt{3}", "The length is $2\\sqrt{3}$ cm.", True),
    (r"2\sqrt{3}", "The length is not $2\\sqrt{3}$ cm.", False),
    (r"2\sqrt{3}", "The length is $3\\sqrt{2}$ cm.", False),
    (r"36\pi cm^2", r"36\pi", True),
    (r"36\pi cm^2", r"36\pi \text{ cm}^2", True),
    (r"36\pi \text{ cm}^2", r"36\pi \text{ m}^2", False),
    (r"36\pi \text{ cm}^2", r"36\pi \text{ cm}", False),
    (r"2\pi \text{ m}", r"200\pi \text{ cm}", True),
    (r"2\pi \text{ m}", r"x = 200\pi \text{ cm}", True),
    (r"2\pi \text{ m}", r"5 = 200\pi \text{ cm}", False),
    (r"\sqrt{2} cm", r"\sqrt{2}", True),
    (r"\sqrt{2} cm", r"\sqrt{2} mc", False),
    (r"\sqrt{2} cm", r"\sqrt{2} kg", False),
    ("4 cm", r"\sqrt{16} \text{ cm}", True),
    ("4 cm", r"\sqrt{16} \text{ kg}", False),
    ("4 cm", r"\sqrt{15} \text{ cm}", False),
    ("2x+1", "2x+1", True),
    ("3a", "3b", False),
    (r"\pi h", r"\pi", False),
]

LEFT_SIDES = [
    ("60", r"\angle A = 60^\circ", True),
    ("60", "∠A = 60°", True),
    ("60", r"m\angle A = 60^\circ", True),
    ("60", r"m\angle ABC = 60", True),
    ("60", "Area = 60", True),
    ("60", r"\text{Area} = 60", True),
    ("60", "Total = 60", True),
    ("60", "area: 60", True),
    ("60", "Total = 61", False),
    ("60", "not x = 60", False),
    ("60", "The wrong value = 60", False),
    ("60", "sqrt x = 60", False),
    ("4", "Thus, x = 4.", True),
    ("4", "So the answer is 4", True),
    ("4", "= 4", True),
    ("4", "= 5", False),
    ("4", "4 is the answer", True),
    ("4", "4 is the final answer.", True),
    ("4", "4 is not the answer", False),
    ("4", "4 is the wrong answer", False),
    ("4", "The length of AB = 4 units", True),
    ("4", "The length of AB = 4", True),
    ("4", "AB = 5", False),
    ("AB = 4", "AB = 4", True),
    ("AB = 4", "CD = 4", False),
    # markdown
    ("4", "**Answer:** 4", True),
    ("4", "**Final Answer:** 4", True),
    ("4", "**Answer: 4**", True),
    ("4", "### Answer:\n4", True),
    ("4", "**Answer:** 5", False),
    ("B", "**Answer:** B", True),
    ("-4", "**Answer:** -4", True),
    ("4", "**Answer:** -4", False),
    ("4", "The answer is **4**.", True),
    # about, and said twice
    ("12", "about 12", True),
    ("12", "approximately 12", True),
    ("12", "about 13", False),
    ("12", "more than 12", False),
    ("12", "12 (people)", True),
    ("4", "4 (four)", True),
    ("4", "4 (5)", False),
    ("4", "4 (wrong)", False),
    ("4", "4 (or 5)", False),
    ("12 cm", "12 (cm)", True),
]

UNITS = [
    ("12 hrs", "12 hours", True),
    ("12 lbs", "12 pounds", True),
    ("25°C", "25 degrees Celsius", True),
    ("25°C", "25 degrees Fahrenheit", False),
    ("25°C", "25 degrees", True),
    ("98.6 °F", "98.6 degrees Fahrenheit", True),
    ("60 mph", "60 miles per hour", True),
    ("60 mph", "60 km/h", False),
    ("60 km/h", "60 kph", True),
    (r"5 \Omega", "5 Ω", True),
    (r"5 \Omega", "5 ohms", True),
    (r"5 \Omega", "5", True),
    ("10 Nm", "10 N·m", True),
    ("10 N·m", "10 Nm", True),
    ("10 Nm", "10 nm", False),
    ("12 gal", "12 gallons", True),
    ("1 hour 30 minutes", "90 minutes", True),
    ("1 hour 30 minutes", "1.5 hours", True),
    ("1 hour 30 minutes", "1 h 30 min", True),
    ("1 hour 30 minutes", "1 hour and 20 minutes", False),
    ("5 ft 6 in", "66 inches", True),
    ("£12", "12 pounds", True),
    ("£12", "12 dollars", False),
    ("5 T", "5", True),
    ("5 T", "6", False),
    ("5 eV", "5", True),
    ("5 μC", "5", True),
    ("5 μC", "5 mC", False),
    ("5 μC", "5000 nC", True),
    ("1.6e-19 C", "1.6e-19", True),
    ("10.5 MB", "10.5", True),
    ("5 MW", "5 mW", False),
    ("5 GHz", "5000 MHz", True),
]

MONEY = [
    ("20", "US$20", True),
    ("20", "USD 20", True),
    ("20", "₹20", True),
    ("20", "Rs. 20", True),
    ("$20", "€20", False),
    ("$20", "USD 20", True),
    ("1.5M", "1.5 million", True),
    ("1.5M", "1.5", False),
    ("1.5B", "1.5 billion", True),
    ("1.5B", "1.5 million", False),
    ("20K", "20000", True),
    ("20K", "20", False),
    ("2.5 million", "2.5M", True),
    ("$2.5 million", "$2.5M", True),
    ("300 K", "300", True),
    ("300 K", "300000", False),
    ("fifty percent", "50%", True),
    ("50%", "fifty percent", True),
    ("120", "one hundred twenty", True),
    ("120", "one hundred and twenty", True),
    ("2500", "two thousand five hundred", True),
    ("120", "one hundred twenty one", False),
    ("21", "twenty-one", True),
    ("12", "a dozen", True),
]

CHINESE = [
    ("12", "12。", True),
    ("4", "答案是4", True),
    ("4", "答案：4", True),
    ("4", "答案为4。", True),
    ("4", "答案是5", False),
    ("4", "答案不是4", False),
    ("B", "答案是B", True),
    ("B", "选B", True),
    ("B", "故选B", True),
    ("B", "故选：B", True),
    ("B", "选C", False),
    ("B", "不选B", False),
    ("20", "20元", True),
    ("20", "20度", True),
    ("20", "20平方厘米", True),
    ("20 cm^2", "20平方厘米", True),
    ("20 cm^2", "20厘米", False),
]

LISTS_OF_WORDS = [
    ("Washington, D.C.", "Washington D.C.", True),
    ("Washington, D.C.", "Washington", False),
    ("October 5, 2020", "October 5 2020", True),
    ("October 5, 2020", "October 6 2020", False),
    ("1, 2", "1 2", False),
    ("1, 2", "12", False),
    ("red, blue", "red, blue", True),
    ("red, blue", "blue, red", False),
]

OTHERS = [
    ("2010", "In 2010", True),
    ("2010", "the year 2010", True),
    ("2010", "In the year 2010.", True),
    ("2010", "In 2011", False),
    ("2010", "before 2010", False),
    ("-4", "minus 4", True),
    ("-4", "negative 4", True),
    ("4", "negative 4", False),
    ("1/3", r"0.\overline{3}", True),
    ("1/3", r"0.\overline{4}", False),
    (r"\sqrt{2}", "2^{0.5}", True),
    (r"\sqrt{2}", "2^{0.4}", False),
    ("60", "60^o", True),
    ("4", r"{\bf 4}", True),
    ("2sqrt3", r"2\sqrt{3}", True),
    ("2sqrt(3)", r"2\sqrt{3}", True),
    ("2sqrt(3)", r"3\sqrt{2}", False),
    (r"2\sqrt{3}", "2√{3}", True),
    (r"2\sqrt{3}", "2√3", True),
    (r"\triangle ABC", "△ABC", True),
    (r"\triangle ABC", "△ABD", False),
    ("A+", "A+", True),
    ("A+", "A", False),
    ("O+", "O+", True),
    ("O+", "O-", False),
    ("C++", "C++", True),
    ("C++", "C", False),
    (">", ">", True),
    (">", "<", False),
    (">", r"$>$", True),
    ("=", "=", True),
    ("=", ">", False),
    (r"AB \parallel CD", r"AB \parallel CD", True),
    (r"AB \parallel CD", "AB ∥ CD", True),
    (r"AB \parallel CD", r"AB \perp CD", False),
]


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [*EXPRESSIONS_WITH_UNITS, *LEFT_SIDES, *UNITS, *MONEY, *CHINESE, *LISTS_OF_WORDS, *OTHERS],
)
def test_a_usual_wording_has_the_verdict_it_should(gold, prediction, right) -> None:
    verdict = verify_answer(prediction, gold)

    assert verdict.correct is right, verdict


@pytest.mark.parametrize(
    ("gold", "kind"),
    [("A+", "text"), ("O-", "text"), ("C++", "text"), (">", "text"), ("=", "text"), (r"AB \parallel CD", "text"),
     ("5 T", "number"), ("10.5 MB", "number"), ("1 hour 30 minutes", "number"), ("2sqrt3", "expression")],
)  # fmt: skip
def test_golds_that_were_unreadable_have_a_kind(gold, kind) -> None:
    assert infer_kind(gold) == kind
    assert gold_problem(gold) is None


@pytest.mark.parametrize(
    ("gold", "prediction", "right"),
    [("ABD", "A, B, D", True), ("ABD", "A, B and D", True), ("ABD", "A, B", False), ("A, B, D", "ABD", True)],
)
def test_letters_may_be_joined(gold, prediction, right) -> None:
    assert verify_answer(prediction, gold, "choices").correct is right
    assert verify_answer(prediction, gold).correct is right


@pytest.mark.parametrize(
    ("prediction", "right"), [(r"\dfrac{\sqrt3}{2}", True), (r"\dfrac{\sqrt2}{2}", False), ("B", True)]
)
def test_an_option_may_be_spelled_differently(prediction, right) -> None:
    options = ["1", r"$\frac{\sqrt{3}}{2}$", r"$\frac{\sqrt{2}}{2}$"]

    assert verify_answer(prediction, "B", options=options).correct is right
