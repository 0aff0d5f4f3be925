"""The two response formats, strictly."""

import pytest

from metis_home import Branch
from metis_home.training.data.formats import build_response, format_problem, split_prefix, split_response

THINK, DIRECT = Branch.THINKING, Branch.NON_THINKING


@pytest.mark.parametrize(
    ("response", "mode"),
    [
        ("<think>r</think><answer>a</answer>", THINK),
        ("<think> r\n</think>\n<answer> $\\boxed{2}$ </answer>\n", THINK),
        ("<think></think><answer>a</answer>", DIRECT),
        ("<think>r</think><answer>a</answer>", None),
        ("<think></think><answer>a</answer>", None),
        (build_response("r", "a", THINK), THINK),
        (build_response("r", "a", DIRECT), DIRECT),
    ],
)
def test_right_formats(response, mode):
    assert format_problem(response, mode) is None


@pytest.mark.parametrize(
    ("response", "mode", "problem"),
    [
        ("2", THINK, "0 times <think>"),
        ("<think>r<answer>a</answer>", THINK, "0 times </think>"),
        ("<think>r</think>a", THINK, "0 times <answer>"),
        ("<think>r</think><answer>a", THINK, "0 times </answer>"),
        ("<think>r</think><answer>a</answer><answer>b</answer>", THINK, "2 times <answer>"),
        ("<think><think>r</think><answer>a</answer>", THINK, "2 times <think>"),
        ("Well, <think>r</think><answer>a</answer>", THINK, "nothing around it"),
        ("<think>r</think><answer>a</answer> Done.", THINK, "nothing around it"),
        ("<think>r</think> so <answer>a</answer>", THINK, "nothing around it"),
        ("<answer>a</answer><think>r</think>", THINK, "nothing around it"),
        ("<think>r</think><answer> \n</answer>", THINK, "nothing between <answer>"),
        ("<think></think><answer>a</answer>", THINK, "mode is thinking"),
        ("<think> </think><answer>a</answer>", THINK, "mode is thinking"),
        ("<think>r</think><answer>a</answer>", DIRECT, "mode is non_thinking"),
        ("<think> </think><answer>a</answer>", DIRECT, "mode is non_thinking"),
    ],
)
def test_wrong_formats(response, mode, problem):
    assert problem in str(format_problem(response, mode))


def test_a_response_is_taken_apart_only_where_it_has_the_format():
    assert split_response("<think>r</think><answer>a</answer>") == ("r", "a")
    assert split_response("<think>r</think>a") is None


@pytest.mark.parametrize(
    ("response", "mode", "pieces"),
    [
        ("<think>r</think><answer>a</answer>", THINK, ("<think>", "r</think><answer>a</answer>")),
        ("<think></think><answer>a</answer>", DIRECT, ("<think></think>", "<answer>a</answer>")),
        ("<think></think><answer>a</answer>", None, ("<think></think>", "<answer>a</answer>")),
        ("<think>r</think><answer>a</answer>", None, ("<think>", "r</think><answer>a</answer>")),
        ("a", None, ("", "a")),
    ],
)
def test_the_prefix_that_forces_a_branch_is_cut_off(response, mode, pieces):
    assert split_prefix(response, mode) == pieces
