"""The same rewards for other trainers: verl, EasyR1 and ms-swift call reward functions in other ways.

They need a number where ours may say None (a gold that cannot be read): verl and EasyR1 get 0.0 and `unscored` 1.0
beside it, so that the rows can be found; run `metis-home check-rewards` before. Standard library and this package only.
"""

from collections.abc import Mapping, Sequence

from .rewards import Completion, Rewards, accuracy_reward, format_reward

ACCURACY_WEIGHT, FORMAT_WEIGHT = 0.9, 0.1  # HDPO's r_acc; Metis-RISE does not state its weights


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, object] | None = None,
    **options: object,
) -> dict[str, float]:
    """verl's custom reward function.

    Args:
        data_source: not used: the kind of the answer decides, not where it is from.
        extra_info: may hold `kind`, `options`, `tolerance`, and `mode` for the format.
    Returns:
        `score` = 0.9 accuracy + 0.1 format, with `acc`, `format` and `unscored` beside it, each in [0, 1].
    Source: verl's `compute_score` convention.
    """
    parts = _scores(solution_str, ground_truth, extra_info or {})
    return {
        "score": parts["overall"],
        "acc": parts["accuracy"],
        "format": parts["format"],
        "unscored": parts["unscored"],
    }


def compute_score_easyr1(
    reward_input: Mapping[str, object] | Sequence[Mapping[str, object]],
) -> dict[str, float] | list[dict[str, float]]:
    """EasyR1's reward function, for `reward_type: sequential` (one input) and `batch` (a list).

    An input holds `response` and `ground_truth`; `kind`, `options`, `tolerance` and `mode` are read where they stand.

    Returns:
        `overall` = 0.9 accuracy + 0.1 format, `format`, `accuracy`, `unscored`, per input.
    """
    if isinstance(reward_input, Mapping):
        return _scores(str(reward_input["response"]), reward_input["ground_truth"], reward_input)
    return [_scores(str(one["response"]), one["ground_truth"], one) for one in reward_input]


class MetisAccuracyORM:
    """ms-swift's outcome reward: `orms["metis_accuracy"] = MetisAccuracyORM` in a file given to `--external_plugins`.

    Data columns arrive as keywords, as in TRL; None stays None, which ms-swift leaves out.
    """

    def __init__(self, *args: object, **options: object) -> None:
        pass  # ms-swift passes its own arguments to some of its classes

    def __call__(self, completions: Sequence[Completion], solution: Sequence[object], **columns: object) -> Rewards:
        """Accuracy rewards, one per completion."""
        return accuracy_reward([""] * len(completions), completions, solution, **_without_prompts(columns))


class MetisFormatORM:
    """ms-swift's outcome reward for the format; see `format_reward`."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __call__(self, completions: Sequence[Completion], **columns: object) -> Rewards:
        """Format rewards, one per completion."""
        return format_reward([""] * len(completions), completions, **_without_prompts(columns))


def _scores(response: str, gold: object, columns: Mapping[str, object]) -> dict[str, float]:
    chosen = {name: [columns[name]] for name in ("kind", "options", "tolerance") if columns.get(name) is not None}
    mode = {"mode": [columns["mode"]]} if columns.get("mode") is not None else {}
    accuracy = accuracy_reward([""], [response], [gold], **chosen)[0]
    form = format_reward([""], [response], **mode)[0] or 0.0
    overall = 0.0 if accuracy is None else ACCURACY_WEIGHT * accuracy + FORMAT_WEIGHT * form
    return {
        "overall": overall,
        "format": form,
        "accuracy": accuracy or 0.0,
        "unscored": float(accuracy is None),
    }


def _without_prompts(columns: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in columns.items() if name != "prompts"}
