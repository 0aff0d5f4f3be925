"""Rows become records, wherever they are stored, and bad ones are told by number."""

import base64
import io
import json

import pytest
from PIL import Image

from metis_home import Branch
from metis_home.errors import DataError
from metis_home.training.data.records import load_records, scan_records, write_rows
from tests.training.data.tiny_rows import DIRECT_ROW, THINKING_ROW, write_image

RED = Image.new("RGB", (8, 8), "red")


def png(image=RED) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def blocks(record):
    return record.messages[-1]["content"]


def text(words):
    return {"type": "text", "text": words}


class TestResponses:
    def test_reasoning_and_answer_become_the_thinking_format(self):
        [record] = load_records([THINKING_ROW])

        assert record.response == "<think>one and one</think><answer>2</answer>"
        assert (record.answer, record.mode) == ("2", Branch.THINKING)

    def test_an_answer_becomes_the_non_thinking_format_where_the_row_is_non_thinking(self):
        [direct, gold_only] = load_records([DIRECT_ROW, {"prompt": "1 + 1?", "answer": 2}])

        assert direct.response == "<think></think><answer>2</answer>"
        assert (gold_only.response, gold_only.answer, gold_only.mode) == (None, "2", None)

    def test_a_response_is_taken_as_it_is(self):
        rows = [
            {"prompt": "?", "response": "<think>a</think> <answer>b</answer>", "answer": "b"},
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "<think>a</think>"}, "<answer>b</answer>"],
                    },
                ]
            },
        ]

        first, second = load_records(rows)

        assert first.response == "<think>a</think> <answer>b</answer>"
        assert second.response == "<think>a</think><answer>b</answer>"
        assert second.messages == [{"role": "user", "content": "?"}]

    def test_the_solution_is_the_gold_and_other_columns_are_kept_untouched(self):
        row = {**THINKING_ROW, "solution": "$2$", "pass8": 0.25, "tags": ["a"], "kind": "integer", "source": "sums"}

        [record] = load_records([row])

        assert (record.answer, record.kind, record.source) == ("$2$", "integer", "sums")
        assert record.columns == {"pass8": 0.25, "tags": ["a"]}
        assert record.response == "<think>one and one</think><answer>2</answer>"


class TestImages:
    def test_they_stand_before_the_text_or_where_the_text_says(self):
        rows = [
            {"prompt": "How many?", "image": "a.png"},
            {"prompt": "Is <image> or <image> red?", "images": ["a.png", "b.png"]},
            {
                "messages": [
                    {"role": "user", "content": "Look: <image>"},
                    {"role": "assistant", "content": "A cat."},
                    {"role": "user", "content": [text("And"), {"type": "image"}, text("?")]},
                ],
                "images": ["a.png", "b.png"],
            },
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text("?")]}]},
        ]

        first, second, third, fourth = load_records(rows, image_root="/data")

        a, b = {"type": "image", "image": "/data/a.png"}, {"type": "image", "image": "/data/b.png"}
        assert blocks(first) == [a, text("How many?")]
        assert blocks(second) == [text("Is "), a, text(" or "), b, text(" red?")]
        assert third.messages[0]["content"] == [text("Look: "), a]
        assert blocks(third) == [text("And"), b, text("?")]
        assert blocks(fourth) == [a, text("?")]

    def test_a_tag_in_a_text_block_is_text(self):
        content = [text("What does <image> mean in SVG?")]

        [record] = load_records([{"messages": [{"role": "user", "content": content}]}])

        assert blocks(record) == content

    @pytest.mark.parametrize(
        ("source", "found"),
        [
            (RED, RED),
            (b"12", b"12"),
            ({"bytes": b"12", "path": "x.png"}, b"12"),
            ({"bytes": None, "path": "x.png"}, "/data/x.png"),
            ("/abs/x.png", "/abs/x.png"),
            ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA"),
            ("https://example.com/x.png", "https://example.com/x.png"),
        ],
        ids=["PIL", "bytes", "bytes of a struct", "path of a struct", "absolute", "data:", "remote stays an address"],
    )
    def test_every_way_to_give_an_image(self, source, found):
        [record] = load_records([{"prompt": "?", "image": source}], image_root="/data")

        assert blocks(record)[0] == {"type": "image", "image": found}

    def test_blocks_of_other_libraries(self):
        encoded = base64.b64encode(b"12").decode()
        content = [
            {"type": "image_url", "image_url": {"url": "x.png"}},
            {"type": "image", "base64": encoded},
            {"type": "image", "path": "y.png", "text": None},
            text("?"),
        ]

        [record] = load_records([{"messages": [{"role": "user", "content": content}]}])

        assert [block["image"] for block in blocks(record)[:3]] == [
            "x.png",
            f"data:image/png;base64,{encoded}",
            "y.png",
        ]


class TestFiles:
    ROWS = [{**THINKING_ROW, "image": "pictures/a.png"}, {**DIRECT_ROW, "id": "direct"}]

    def test_jsonl_and_json(self, tmp_path):
        write_rows(tmp_path / "set.jsonl", self.ROWS)
        (tmp_path / "set.json").write_text(json.dumps(self.ROWS))

        for name in ("set.jsonl", "set.json"):
            first, second = load_records(tmp_path / name)
            assert (first.id, second.id, first.source, first.index, second.index) == ("set:0", "direct", "set", 0, 1)
            assert blocks(first)[0]["image"] == str(tmp_path / "pictures/a.png")

    def test_parquet_with_images_inside(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        rows = [{**THINKING_ROW, "image": {"bytes": png(), "path": None}}, {**DIRECT_ROW, "image": None}]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")

        first, second = load_records(tmp_path / "set.parquet")

        assert blocks(first) == [{"type": "image", "image": png()}, text("1 + 1?")]
        assert second.messages == [{"role": "user", "content": "Say 2."}]

    def test_datasets_in_memory_and_saved_without_decoding_images(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        path = write_image(tmp_path / "a.png")
        features = datasets.Features(
            {"prompt": datasets.Value("string"), "answer": datasets.Value("string"), "images": [datasets.Image()]}
        )
        rows = [
            {"prompt": "?", "answer": "1", "images": [str(path), RED]},
            {"prompt": "?", "answer": "2", "images": []},
        ]
        dataset = datasets.Dataset.from_list(rows, features=features)
        dataset.save_to_disk(tmp_path / "saved")
        datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")

        for source, count in [
            (dataset, 2),
            (tmp_path / "saved", 2),
            (tmp_path / "splits", 2),
            (f"{tmp_path}/splits:test", 1),
        ]:
            records = load_records(source)
            assert len(records) == count
            assert records[-1].messages == [{"role": "user", "content": "?"}]
        images = [block["image"] for block in blocks(load_records(dataset)[0])[:2]]
        assert images[0] in (str(path), path.read_bytes())
        assert Image.open(io.BytesIO(images[1])).size == (8, 8)
        with pytest.raises(DataError, match="has the splits train, test"):
            load_records(f"{tmp_path}/splits:dev")

    def test_blank_lines_are_skipped_and_counted(self, tmp_path):
        (tmp_path / "set.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')

        assert [record.index for record in load_records(tmp_path / "set.jsonl")] == [0, 2]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("set.jsonl", None, "no such file"),
            ("set.txt", "x", "ends in .jsonl, .json, .parquet"),
            ("set.json", '{"prompt": "?"}', "expected a list of rows, found a dict"),
            ("set.json", "{", "not JSON"),
            ("set.parquet", "x", "not a readable Parquet file"),
            ("folder/a.txt", "x", "directory without state.json"),
        ],
    )
    def test_a_source_that_cannot_be_read(self, tmp_path, name, content, message):
        path = tmp_path / name
        if content is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)

        with pytest.raises(DataError, match=message):
            load_records(path.parent if "/" in name else path)

    def test_what_json_cannot_hold_is_refused_and_nothing_is_left_behind(self, tmp_path):
        with pytest.raises(DataError, match="row 1 cannot be written"):
            write_rows(tmp_path / "set.jsonl", [DIRECT_ROW, {"image": b"1"}])

        assert list(tmp_path.iterdir()) == []


BAD_ROWS = [
    ("not JSON", "{"),
    ("not a row", [1]),
    ("no prompt", {"answer": "1"}),
    ("no prompt", {"prompt": "?", "messages": [{"role": "user", "content": "?"}]}),
    ("empty prompt", {"prompt": " "}),
    ("empty prompt", {"prompt": "<image>", "image": "a.png"}),
    ("empty prompt", {"messages": [{"role": "assistant", "content": "hm"}]}),
    ("empty prompt", {"messages": [{"role": "system", "content": "Be brief."}]}),
    ("images and placeholders differ", {"prompt": "<image> <image>?", "images": ["a.png"]}),
    ("images and placeholders differ", {"prompt": "<image>?", "images": ["a.png", "b.png"]}),
    ("images and placeholders differ", {"prompt": "<image>?"}),
    (
        "images and placeholders differ",
        {"messages": [{"role": "user", "content": [{"type": "image"}, text("?")]}], "images": []},
    ),
    ("unknown mode", {"prompt": "?", "mode": "fast"}),
    ("unknown mode", {"prompt": "?", "mode": 1}),
    ("wrong type", {"prompt": 3}),
    ("wrong type", {"prompt": "?", "answer": [["1"]]}),
    ("wrong type", {"prompt": "?", "solution": {"target": "1"}}),
    ("not Unicode", {"prompt": "?", "solution": ["1", "a\ud800"]}),
    ("wrong type", {"prompt": "?", "answer": True}),
    ("wrong type", {"prompt": "?", "response": 1}),
    ("wrong type", {"prompt": "?", "image": 4}),
    ("wrong type", {"prompt": "?", "image": "a.png", "images": ["a.png"]}),
    ("wrong type", {"messages": "hello"}),
    ("wrong message", {"messages": [{"role": "bot", "content": "?"}]}),
    ("wrong message", {"messages": [{"role": "user", "content": 3}]}),
    ("wrong message", {"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "max_pixels": 9}]}]}),
    ("wrong message", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    ("video", {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, text("?")]}]}),
    (
        "two responses",
        {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}],
            "response": "b",
        },
    ),
]


def test_every_bad_row_is_told_by_number_and_reason(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for _, row in BAD_ROWS]
    path.write_text("\n".join([json.dumps(DIRECT_ROW), *lines, json.dumps({**DIRECT_ROW, "id": "last"})]))

    scan = scan_records(path)
    with pytest.raises(DataError) as caught:
        load_records(path)

    assert [record.index for record in scan.records] == [0, len(BAD_ROWS) + 1]
    assert [(problem.row, problem.reason) for problem in scan.problems] == [
        (number, reason) for number, (reason, _) in enumerate(BAD_ROWS, start=1)
    ]
    assert f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 2} rows cannot be used" in str(caught.value)
    for problem in scan.problems:
        assert f"row {problem.row} (bad:{problem.row}): {problem.reason}" in str(caught.value)
