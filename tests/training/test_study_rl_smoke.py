"""The pico study of Stage-RL: judgement, control, the pipeline's data, two steps of GRPO. Learning is not tested here."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def measured(reasoning: int, direct: int, of: int = 100) -> dict:
    """So many right answers of `of` in each family."""
    return {
        "right": {
            "reasoning": {f"r{number}": int(number < reasoning) for number in range(of)},
            "direct": {f"d{number}": int(number < direct) for number in range(of)},
        }
    }


@pytest.mark.parametrize(
    ("reasoning", "direct", "met"),
    [(58, 80, [True, True]), (57, 80, [False, True]), (70, 77, [True, False]), (70, 78, [True, True])],
)
def test_goals_are_eight_points_up_and_at_most_two_down(reasoning: int, direct: int, met: list[bool]) -> None:
    from pico.rl import judge_rl

    goals = judge_rl(measured(50, 80), measured(reasoning, direct))

    assert [goal.met for goal in goals] == met
    assert [goal.found for goal in goals] == pytest.approx([(reasoning - 50) / 100, (direct - 80) / 100])


def test_a_control_that_rises_like_grpo_misses_its_goal() -> None:
    from pico.rl import judge_control

    assert judge_control(measured(50, 80), measured(57, 80))[0].met
    assert judge_control(measured(50, 80), measured(40, 80))[0].met
    assert not judge_control(measured(50, 80), measured(58, 80))[0].met


def test_controls_that_rise_together_miss_the_goal_and_one_that_strays_does_not() -> None:
    from pico.rl import judge_controls

    assert judge_controls([-0.01, 0.0, 0.03]).met
    assert judge_controls([-0.05, -0.04, -0.05]).met
    assert not judge_controls([0.03, 0.04, 0.035]).met
    # Student's interval by hand: t(0.975, 2) = 4.303, s = 0.01, so 0.02 +- 4.303 * 0.01 / sqrt(3) = 0.02 +- 0.0248
    assert judge_controls([0.01, 0.02, 0.03]).name.endswith("+- 0.025")
    assert judge_controls([0.01, 0.02, 0.03]).met
    assert not judge_controls([0.02, 0.03, 0.04]).met  # 0.03 - 0.0248


def test_gains_are_paired_by_query_not_by_position() -> None:
    from pico.rl import gain

    before = {"right": {"reasoning": {"a": 1, "b": 0}}}
    after = {"right": {"reasoning": {"b": 0, "a": 1}}}

    assert gain(before, after, "reasoning").value == 0
    assert gain(before, after, "reasoning").high == 0


def test_the_coin_does_not_look_at_the_answer() -> None:
    from pico.rl import coin_reward

    right = coin_reward(1)(completions=["<answer>4</answer>"] * 1000, solution=["4"] * 1000)
    wrong = coin_reward(1)(completions=["nonsense"] * 1000, solution=["4"] * 1000)

    assert right == wrong
    assert set(right) == {0.0, 1.0}
    assert 430 < sum(right) < 570
    assert coin_reward(2)(completions=["x"] * 1000) != right
    assert coin_reward(1, 1)(completions=["x"] * 1000) != right


def test_expert_rows_are_right_and_images_are_found_from_the_pipelines_folder(tmp_path: Path) -> None:
    from pico.families import Sizes, write_families, write_part
    from pico.rl_rise import RiseSettings, write_rise_data

    from metis_home.training.data.records import load_records
    from metis_home.training.pipeline.experts import answers_from_file
    from metis_home.training.verifier import verify_answer

    write_families(tmp_path / "data", Sizes(dense=2, sft=12, test=8, templates=2))
    write_part(tmp_path / "rl", "rl", 12)

    counts = write_rise_data(
        tmp_path / "rise", tmp_path / "rl", tmp_path / "data", RiseSettings(prompts=10, non_thinking=9, held_out=7)
    )

    assert counts == {"prompts": 10, "expert": 10, "direct": 9, "held_out": 14}
    records = load_records(tmp_path / "rise/prompts.jsonl")
    experts = answers_from_file(tmp_path / "rise/expert.jsonl")
    for record in records:
        assert verify_answer(experts[record.id][0], record.answer, record.kind).correct
    rows = [json.loads(line) for line in (tmp_path / "rise/held_out.jsonl").read_text().splitlines()]
    assert all((tmp_path / "rise" / row["image"]).is_file() for row in rows)
    assert {record.columns["family"] for record in load_records(tmp_path / "rise/direct.jsonl")} == {"direct"}


def test_hasty_rows_cut_derivations_of_the_reasoning_family_alone(tmp_path: Path) -> None:
    from pico.families import Sizes, write_families
    from pico.hasty import write_hasty_rows

    from metis_home.training.data.records import load_records

    write_families(tmp_path / "data", Sizes(dense=40, sft=2, test=2, templates=2))

    hasty = write_hasty_rows(tmp_path / "start/rows.jsonl", tmp_path / "data/dense.jsonl", 0.75)

    before, after = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "data/dense.jsonl", tmp_path / "start/rows.jsonl")
    )
    cut = [(old, new) for old, new in zip(before, after, strict=True) if old["reasoning"] != new["reasoning"]]
    assert len(cut) == hasty
    assert 20 < hasty < 39
    for old, new in cut:
        assert old["family"] == "reasoning"
        assert new["reasoning"] == f"so {old['answer']}."
        assert old["reasoning"].endswith(new["reasoning"])  # the answer stands, its derivation went
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert all((tmp_path / "start" / row["image"]).is_file() for row in after)
    assert len(load_records(tmp_path / "start/rows.jsonl")) == 80


def test_a_dense_model_is_taught_further_or_only_its_tower_is_taken(tmp_path: Path) -> None:
    from pico.dense import DenseSettings, TowerSettings, train_dense, write_encoded, write_tower
    from pico.families import Sizes, write_families

    from metis_home.training.loading import load_model

    write_families(tmp_path / "data", Sizes(dense=4, sft=2, test=2, templates=2))
    write_tower(tmp_path / "tower", tmp_path / "data/dense.jsonl", TowerSettings(pictures=20, steps=1))
    write_encoded(tmp_path / "rows.pt", tmp_path / "tower", tmp_path / "data/dense.jsonl")
    still = DenseSettings(steps=1, learning_rate=0.0)

    train_dense(tmp_path / "further", tmp_path / "tower", tmp_path / "rows.pt", still, seed=5, tower_only=False)
    train_dense(tmp_path / "anew", tmp_path / "tower", tmp_path / "rows.pt", still, seed=5)

    tower, further, anew = (load_model(str(tmp_path / name)).state_dict() for name in ("tower", "further", "anew"))
    assert {name for name in tower if not further[name].equal(tower[name])} == set()
    changed = {name for name in tower if not anew[name].equal(tower[name])}
    assert changed
    assert not any("visual" in name for name in changed)


def test_two_steps_of_grpo_and_of_the_control_leave_models_that_are_measured(tmp_path: Path) -> None:
    from pico.dense import DenseSettings, TowerSettings, train_dense, write_encoded, write_tower
    from pico.families import Sizes, write_families, write_part
    from pico.rl import RLSettings, measure, mixed, train_grpo
    from pico.sft import read

    write_families(tmp_path / "data", Sizes(dense=16, sft=2, test=4, templates=2))
    write_part(tmp_path / "rl", "rl", 6)
    dense_rows = tmp_path / "data/dense.jsonl"
    write_tower(tmp_path / "tower", dense_rows, TowerSettings(pictures=40, steps=1))
    write_encoded(tmp_path / "dense.pt", tmp_path / "tower", dense_rows)
    train_dense(tmp_path / "dense", tmp_path / "tower", tmp_path / "dense.pt", DenseSettings(steps=2), seed=0)
    settings = RLSettings(
        steps=2, prompts_per_step=2, generations=2, max_new_tokens=5, samples=2, sampled_prompts=2, direct_share=0.25
    )
    prompts = read(tmp_path / "rl", "rl")

    assert [record.columns["family"] for record in mixed(prompts, 0.25)] == ["reasoning"] * 6 + ["direct"] * 2
    for name, coin in (("grpo", None), ("control", 0)):
        curves = train_grpo(tmp_path / "dense", tmp_path / name, prompts, settings, seed=0, coin=coin)
        found = measure(
            tmp_path / name, tmp_path / f"{name}-answers", read(tmp_path / "data", "test"), settings, seed=0
        )
        assert curves["step"] == [1, 2]
        assert {family: found["families"][family]["total"] for family in found["families"]} == {
            "direct": 4,
            "reasoning": 4,
        }
        assert found["sampled"]["prompts"] == 2
    assert max(curves["reward"]) > 0  # the coin's; a random model earns nothing
    assert curves["rewards/accuracy_reward/mean"] == [0, 0]
