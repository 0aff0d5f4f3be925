"""Pass rates with a real tiny model: counted right, the same after an interruption, the same on any number of ranks."""

import json
from pathlib import Path

import pytest
from PIL import Image

from metis_home.errors import DataError, OutputError
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import Record, load_records
from metis_home.training.loading import load_model, load_processor
from metis_home.training.pipeline.pass_rates import cost_of, pass_rates, rows_digest
from metis_home.training.rollouts.hf import HFEngine
from metis_home.training.rollouts.types import Sampling
from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids
from metis_home.training.verifier import Verdict
from tests.processing.tiny import write_dense_model

RECORDS = load_records([{"id": f"q{n}", "prompt": f"What is {n}?", "solution": str(n)} for n in range(5)])


class Setting:
    """A tiny dense model with its engine."""

    def __init__(self, path: Path) -> None:
        write_dense_model(path)
        processor = load_processor(str(path))
        self.model = load_model(str(path)).eval()
        self.encoder = Encoder(processor, system_prompt=None)
        self.engine = HFEngine(self.model, processor.tokenizer)
        self.sampling = Sampling(
            max_new_tokens=6,
            eos_token_ids=end_token_ids(processor.tokenizer),
            suppress_token_ids=unsampled_token_ids(self.model.config, processor.tokenizer),
        )

    def run(self, out: Path, **changes) -> bool:
        options = {"samples": 3, "settings": {"model": "tiny"}, "prompts_per_unit": 2, "seed": 1, **changes}
        records = options.pop("records", RECORDS)
        return pass_rates(self.engine, self.encoder, records, sampling=self.sampling, out=out, **options)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("dense") / "model")


def even(text: str, record: Record) -> Verdict:
    """A random model solves nothing, so here an even number of characters is right."""
    return Verdict(correct=len(text) % 2 == 0, method="test", extracted=text, reason="")


def test_every_prompt_gets_its_samples_and_its_rate(setting: Setting, tmp_path: Path) -> None:
    assert setting.run(tmp_path / "rates.jsonl", verify=even)

    lines = [json.loads(line) for line in (tmp_path / "rates.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [record.id for record in RECORDS]
    for line in lines:
        expected = [item["finished"] and len(item["text"]) % 2 == 0 for item in line["completions"]]
        assert [item["correct"] for item in line["completions"]] == expected
        assert line["pass_rate"] == pytest.approx(sum(expected) / 3)
        assert line["correct"] == sum(expected)


def test_an_answer_that_was_cut_is_not_correct(setting: Setting, tmp_path: Path) -> None:
    setting.run(tmp_path / "rates.jsonl", verify=lambda *_: Verdict(correct=True, method="", extracted="", reason=""))

    completions = [
        item for line in (tmp_path / "rates.jsonl").read_text().splitlines() for item in json.loads(line)["completions"]
    ]
    assert any(not item["finished"] for item in completions)
    assert all(item["correct"] == item["finished"] for item in completions)


def test_an_interrupted_run_ends_with_the_same_file(setting: Setting, tmp_path: Path, monkeypatch) -> None:
    setting.run(tmp_path / "whole.jsonl")
    generate, calls = setting.engine.generate, []

    def failing(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(setting.engine, "generate", failing)
    with pytest.raises(KeyboardInterrupt):
        setting.run(tmp_path / "resumed.jsonl")
    said: list[str] = []

    assert setting.run(tmp_path / "resumed.jsonl", say=said.append)

    assert said[0] == "2 of 3 units are there already"
    assert len(calls) == 4  # one unit was left
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_ranks_share_the_work_and_the_file_is_the_same(setting: Setting, tmp_path: Path) -> None:
    setting.run(tmp_path / "one.jsonl")

    done = [setting.run(tmp_path / "two.jsonl", rank=rank, world_size=2) for rank in (1, 0)]

    assert done == [False, True]
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_other_settings_do_not_mix(setting: Setting, tmp_path: Path) -> None:
    setting.run(tmp_path / "two.jsonl", rank=1, world_size=2)

    with pytest.raises(OutputError, match="seed: 1 then, 2 now"):
        setting.run(tmp_path / "two.jsonl", rank=1, world_size=2, seed=2)
    setting.run(tmp_path / "one.jsonl")
    with pytest.raises(OutputError, match=r"one\.jsonl was made with other settings .*seed: 1 then, 2 now"):
        setting.run(tmp_path / "one.jsonl", seed=2)
    (tmp_path / "one.jsonl.settings.json").unlink()
    with pytest.raises(OutputError, match="already exists"):
        setting.run(tmp_path / "one.jsonl")


def test_what_is_complete_is_left_as_it_is(setting: Setting, tmp_path: Path, monkeypatch) -> None:
    setting.run(tmp_path / "rates.jsonl")
    written = (tmp_path / "rates.jsonl").read_bytes()
    monkeypatch.setattr(setting.engine, "generate", None)  # nothing is sampled again
    said: list[str] = []

    assert setting.run(tmp_path / "rates.jsonl", say=said.append)
    assert setting.run(tmp_path / "rates.jsonl", say=said.append, rank=1, world_size=2)

    assert (tmp_path / "rates.jsonl").read_bytes() == written
    assert said == [f"{tmp_path / 'rates.jsonl'} is complete already, with the same settings"] * 2


def test_a_run_that_was_killed_after_the_last_rename_is_complete(setting: Setting, tmp_path: Path) -> None:
    setting.run(tmp_path / "rates.jsonl")
    part = tmp_path / "rates.jsonl.0-of-1.part"
    part.write_text("{}\n")

    assert setting.run(tmp_path / "rates.jsonl")
    assert not part.exists()


def test_golds_that_cannot_be_judged_are_said_before_anything_is_sampled(setting: Setting, tmp_path: Path) -> None:
    records = load_records([{"id": "a", "prompt": "What?"}, {"id": "b", "prompt": "What?", "solution": "4"}])

    with pytest.raises(DataError, match=r"1 of 2 rows .*\n  row 0 \(a\): empty answer"):
        setting.run(tmp_path / "rates.jsonl", records=records)
    assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_sampled_or_told_apart_are_refused(setting: Setting, tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "What?", "solution": "4"}
    gone = {**row, "image": str(tmp_path / "gone.png")}
    for rows, words in (
        ([], "there are no rows"),
        ([row, row], r"row 1 \(a\): duplicate id"),
        ([gone], r"row 0 \(a\): missing image"),
    ):
        with pytest.raises(DataError, match=words):
            setting.run(tmp_path / "rates.jsonl", records=load_records(rows))
    assert not list(tmp_path.iterdir())


def test_rows_of_the_same_ids_and_golds_are_other_rows(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    row = {"id": "a", "prompt": "What?", "solution": "4", "options": ["4", "5"], "image": str(tmp_path / "a.png")}

    before = rows_digest(load_records([row]))
    others = [{**row, "prompt": "Which?"}, {**row, "options": ["5", "4"]}, {**row, "tolerance": 0.1}]
    assert rows_digest(load_records([row])) == before
    assert len({before, *(rows_digest(load_records([other])) for other in others)}) == 4
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "a.png")
    assert rows_digest(load_records([row])) != before


def test_the_cost_is_known_ahead(setting: Setting) -> None:
    cost = cost_of(RECORDS, setting.encoder, samples=3, max_new_tokens=6)

    assert (cost.prompts, cost.rollouts, cost.max_new_tokens) == (5, 15, 90)
    assert cost.prompt_tokens == sum(len(setting.encoder.prompt(record)) for record in RECORDS)
    assert str(cost).startswith("5 prompts x 3 samples = 15 rollouts")
