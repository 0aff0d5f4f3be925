"""Every bad row is found before training, by number and reason; good rows pass."""

import json

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from metis_home.cli import data
from metis_home.errors import DataError
from metis_home.media import load_image
from metis_home.training.data.check import check_records, check_source
from metis_home.training.data.encode import Encoder
from metis_home.training.data.records import load_records, write_rows
from tests.training.data.tiny_rows import DIRECT_ROW, THINKING_ROW, tiny_processor, write_image

PICTURE = Image.new("RGB", (56, 56))


def reasons(rows, purpose="sft", **options):
    report = check_records(load_records(rows), purpose=purpose, **options)
    return [(problem.row, problem.reason) for problem in report.problems]


class TestResponses:
    def test_good_rows_have_no_problems(self):
        rows = [THINKING_ROW, {**DIRECT_ROW, "image": PICTURE}, {**THINKING_ROW, "id": 3}]

        report = check_records(load_records(rows), purpose="sft")

        report.raise_if_bad()
        assert (report.rows, report.bad_rows, report.problems) == (3, 0, [])
        assert report.modes == {"thinking": 2, "non_thinking": 1}
        assert report.sources == {"rows": 3}

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"prompt": "?", "answer": "1"}, "no response"),
            ({**THINKING_ROW, "answer": " "}, "empty answer"),
            ({**DIRECT_ROW, "answer": ""}, "empty answer"),
            ({**DIRECT_ROW, "answer": "\u200b"}, "empty answer"),
            ({**THINKING_ROW, "reasoning": ""}, "wrong tags"),
            ({**DIRECT_ROW, "response": "<think>r</think><answer>a</answer>"}, "wrong tags"),
            ({**DIRECT_ROW, "response": "a"}, "wrong tags"),
            ({**THINKING_ROW, "answer": "a</answer> or b"}, "wrong tags"),
            ({**DIRECT_ROW, "prompt": "What is <|im_end|>?"}, "control token"),
            ({**DIRECT_ROW, "prompt": "<|image_pad|>?"}, "control token"),
            ({**DIRECT_ROW, "answer": "1<|im_end|>"}, "control token"),
        ],
    )
    def test_bad_responses(self, row, reason):
        assert reasons([THINKING_ROW, row]) == [(1, reason)]

    def test_a_row_may_have_several_problems(self, tmp_path):
        row = {**DIRECT_ROW, "answer": "", "image": "nowhere.png"}

        assert sorted(reasons([row])) == [(0, "empty answer"), (0, "missing image")]

    def test_an_id_may_occur_once(self):
        rows = [{**DIRECT_ROW, "id": "a"}, {**DIRECT_ROW, "id": "b"}, {**DIRECT_ROW, "id": "a"}]

        assert reasons(rows) == [(2, "duplicate id")]


class TestImages:
    def test_missing_cut_and_foreign_files_and_addresses(self, tmp_path):
        whole = write_image(tmp_path / "whole.png", 300, 300)
        (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-20_000])
        (tmp_path / "text.png").write_text("no picture")
        write_image(tmp_path / "long.png", 2010, 10)
        names = ["whole.png", "cut.png", "text.png", "nowhere.png", "https://example.com/a.png", "long.png"]
        rows = [{**DIRECT_ROW, "image": name} for name in names]
        rows += [{**DIRECT_ROW, "image": b"12"}, {**DIRECT_ROW, "image": "data:image/png;base64,!!"}]
        write_rows(tmp_path / "set.jsonl", rows[:6])

        report = check_source(tmp_path / "set.jsonl", purpose="sft")
        in_memory = reasons(rows[6:])
        headers = check_source(tmp_path / "set.jsonl", purpose="sft", decode_images=False)

        expected = [
            (1, "unreadable image"),
            (2, "unreadable image"),
            (3, "missing image"),
            (4, "remote image"),
            (5, "unreadable image"),
        ]
        assert [(problem.row, problem.reason) for problem in report.problems] == expected
        assert [(problem.row, problem.reason) for problem in headers.problems] == expected[1:]
        assert in_memory == [(0, "unreadable image"), (1, "unreadable image")]

    def test_a_file_that_many_rows_share_is_opened_once(self, tmp_path, monkeypatch):
        path = write_image(tmp_path / "a.png")
        opened = []

        def noted(source, **options):
            opened.append(source)
            return load_image(source, **options)

        monkeypatch.setattr("metis_home.training.data.check.load_image", noted)

        assert reasons([{**DIRECT_ROW, "image": str(path)}] * 5) == []

        assert opened == [str(path)]


class TestLengths:
    ROWS = (THINKING_ROW, {**DIRECT_ROW, "image": Image.new("RGB", (224, 224))})

    def test_rows_that_do_not_fit_are_told_with_tokens_and_limit(self):
        lengths = Encoder(tiny_processor(), system_prompt="x").lengths(load_records(self.ROWS))
        encoder = Encoder(tiny_processor(), system_prompt="x", max_length=min(lengths))

        report = check_records(load_records(self.ROWS), purpose="sft", encoder=encoder)

        longest = lengths.index(max(lengths))
        [problem] = report.problems
        assert (problem.row, problem.reason) == (longest, "too long")
        assert f"{max(lengths)} tokens (64 of images), max_length {min(lengths)}" in problem.detail
        assert (report.tokens.total, report.tokens.images) == (sum(lengths), 64)
        assert (report.tokens.longest, report.tokens.longest_row) == (max(lengths), longest)

    def test_images_that_alone_do_not_fit(self):
        encoder = Encoder(tiny_processor(), max_length=63)

        assert reasons(self.ROWS, encoder=encoder) == [(0, "too long"), (1, "image tokens do not fit")]

    def test_prompts_that_are_answered_count_without_a_response(self):
        row = {**THINKING_ROW, "reasoning": "r" * 500}
        prompt = len(Encoder(tiny_processor()).prompt(load_records([row])[0]))
        encoder = Encoder(tiny_processor(), max_length=prompt)

        assert reasons([row], encoder=encoder) == [(0, "too long")]
        assert reasons([row], purpose="evaluate", encoder=encoder) == []


class TestGolds:
    @pytest.mark.parametrize("purpose", ["rl", "evaluate"])
    def test_every_row_needs_an_answer_that_can_be_compared_with(self, purpose):
        rows = [
            {"prompt": "?", "answer": "4"},
            {"prompt": "?", "answer": " "},
            {"prompt": "?"},
            {"prompt": "?", "answer": "$\\frac{1}{$", "kind": "expression"},
            {"prompt": "?", "answer": "B", "kind": "choice", "options": ["red", "blue"]},
            {"prompt": "?", "answer": "F", "kind": "choice", "options": ["red", "blue"]},
        ]

        found = reasons(rows, purpose)

        assert found == [(1, "empty answer"), (2, "empty answer"), (3, "unparseable gold"), (5, "unparseable gold")]

    def test_an_unknown_purpose_is_refused(self):
        with pytest.raises(DataError, match="purpose must be sft, rl, evaluate"):
            check_records([], purpose="train")


class TestCommand:
    @pytest.fixture
    def app(self):
        app = typer.Typer()
        app.callback()(lambda: None)
        data.add_commands(app)
        return app

    def test_good_rows_are_summed_up_and_the_status_is_0(self, app, tmp_path):
        write_image(tmp_path / "a.png", 224, 224)
        write_rows(tmp_path / "set.jsonl", [THINKING_ROW, {**DIRECT_ROW, "image": "a.png", "source": "signs"}])
        processor = tiny_processor()
        processor.save_pretrained(tmp_path / "model")

        result = CliRunner().invoke(
            app, ["check-data", str(tmp_path / "set.jsonl"), "--model", str(tmp_path / "model"), "--system", "x"]
        )

        total = sum(Encoder(processor, system_prompt="x").lengths(load_records(tmp_path / "set.jsonl")))
        assert result.exit_code == 0, result.output
        assert "2, of which 2 can be used" in result.stdout
        assert "thinking 1, non_thinking 1" in result.stdout
        assert "set 1, signs 1" in result.stdout
        assert f"{total:,}, {100 * 64 / total:.0f} % of images" in result.stdout

    def test_bad_rows_are_listed_and_the_status_is_1(self, app, tmp_path):
        path = tmp_path / "set.jsonl"
        write_rows(path, [THINKING_ROW, {**DIRECT_ROW, "image": "a.png"}, {"prompt": "?", "mode": "fast"}])

        table = CliRunner().invoke(app, ["check-data", str(path)])
        as_json = CliRunner().invoke(app, ["check-data", str(path), "--json"])

        assert (table.exit_code, as_json.exit_code) == (1, 1)
        assert "row 1      set:1                missing image" in table.stdout
        assert "row 2      set:2                unknown mode" in table.stdout
        assert "2 of 3 rows cannot be used" in table.stderr
        report = json.loads(as_json.stdout)
        assert (report["rows"], report["bad_rows"]) == (3, 2)
        assert report["reasons"] == {"missing image": 1, "unknown mode": 1}
        assert [problem["row"] for problem in report["problems"]] == [1, 2]

    def test_a_limit_without_a_model_is_wrong_usage(self, app, tmp_path):
        write_rows(tmp_path / "set.jsonl", [THINKING_ROW])

        result = CliRunner().invoke(app, ["check-data", str(tmp_path / "set.jsonl"), "--max-length", "9"])

        assert result.exit_code == 2
