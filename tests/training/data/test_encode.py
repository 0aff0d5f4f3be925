"""Examples are exactly what the processor makes of the conversation, and token counts need no pixels."""

import pytest
import torch
from PIL import Image

from metis_home import Branch
from metis_home.errors import DataError, ProcessorError
from metis_home.training.data.encode import Encoder, fitting_records
from metis_home.training.data.records import load_records
from tests.training.data.tiny_rows import (
    DIRECT_ROW,
    THINKING_ROW,
    merging_tokenizer,
    tiny_processor,
    write_image,
)

IGNORE = -100


def picture(width, height):
    return Image.effect_noise((width, height), 50).convert("RGB")


ROWS = [
    {**THINKING_ROW, "images": [picture(100, 37)]},
    {**DIRECT_ROW, "prompt": "<image> and <image> or <image>?", "images": [picture(w, 60) for w in (28, 300, 999)]},
    DIRECT_ROW,
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}], "answer": "1"},
]


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny_processor())


@pytest.fixture(scope="module")
def records():
    return load_records(ROWS)


class TestExamples:
    def test_the_prompt_is_what_the_processor_makes_of_the_conversation(self, encoder, records):
        for record in records:
            expected = encoder.processor.apply_chat_template(
                encoder.messages(record),
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )

            found = encoder.prompt(record)

            assert found.input_ids == expected["input_ids"][0].tolist()
            assert found.mm_token_type_ids == expected["mm_token_type_ids"][0].tolist()
            assert set(found.labels) == {IGNORE}
            assert len(found) == len(found.labels) == len(found.input_ids)
            if found.pixel_values is None:
                assert "pixel_values" not in expected
                assert found.image_grid_thw is None
            else:
                assert torch.equal(found.pixel_values, expected["pixel_values"])
                assert torch.equal(found.image_grid_thw, expected["image_grid_thw"])

    def test_everything_after_the_generation_prompt_is_supervised(self, encoder, records):
        for record in records[:3]:
            prompt, found = encoder.prompt(record), encoder.example(record)

            start = len(prompt)
            assert found.input_ids[:start] == prompt.input_ids
            assert set(found.labels[:start]) == {IGNORE}
            assert found.labels[start:] == found.input_ids[start:]
            assert encoder.tokenizer.decode(found.input_ids[start:]) == record.response + "<|im_end|>"
            assert found.mm_token_type_ids[start:] == [0] * (len(found) - start)

    def test_what_an_example_knows_of_its_row(self, encoder, records):
        examples = [encoder.example(record) for record in records[:3]]

        assert [example.router_label for example in examples] == [1, 0, 0]
        assert encoder.prompt(records[3]).router_label == IGNORE
        assert [example.record_index for example in examples] == [0, 1, 2]
        assert {example.source for example in examples} == {"rows"}

    @pytest.mark.parametrize(
        "row", [{**THINKING_ROW, "reasoning": "<1> and 1"}, DIRECT_ROW], ids=["thinking", "non_thinking"]
    )
    def test_generation_after_a_forced_prefix_continues_the_trained_tokens(self, row):
        encoder = Encoder(tiny_processor(merging_tokenizer()))
        [record] = load_records([row])

        forced = encoder.prompt(record, enable_thinking=record.mode is Branch.THINKING)
        trained = encoder.example(record)
        rendered = encoder.processor.apply_chat_template(
            encoder.messages(record),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            enable_thinking=record.mode is Branch.THINKING,
        )

        assert trained.input_ids[: len(forced)] == forced.input_ids == rendered["input_ids"][0]
        # in one piece the tokens would be others: the tags that touch are one token of this vocabulary
        assert encoder.tokens(record.response) != encoder.response_ids(record)[:-1]

    def test_the_system_prompt_comes_first_unless_the_row_has_one(self, records):
        with_ours = Encoder(tiny_processor(), system_prompt="Think.")
        with_none = Encoder(tiny_processor(), system_prompt=None)

        assert with_ours.prompt_text(records[2]).startswith("<|im_start|>system\nThink.<|im_end|>")
        assert with_ours.prompt_text(records[3]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
        assert with_none.prompt_text(records[2]).startswith("<|im_start|>system\nYou are a helpful")

    def test_a_row_without_response_cannot_be_trained(self, encoder, records):
        with pytest.raises(DataError, match=r"row 3 \(rows:3\) has no response"):
            encoder.example(records[3])

    def test_remote_images_are_not_fetched(self, encoder):
        [record] = load_records([{**DIRECT_ROW, "image": "https://example.com/a.png"}])
        with pytest.raises(ProcessorError, match="not fetched from the network"):
            encoder.example(record)
        with pytest.raises(ProcessorError, match="not fetched from the network"):
            encoder.count(record)


class TestCounts:
    def test_counts_equal_the_processors_without_decoding_a_pixel(self, encoder, monkeypatch):
        sizes = [(28, 28), (1, 200), (200, 1), (41, 43), (57, 500), (1234, 567), (2000, 11), (56, 84), (69, 70)]
        records = load_records([{**THINKING_ROW, "images": [picture(*size), picture(56, 56)]} for size in sizes])
        expected = [encoder.example(record) for record in records]

        def refuse(self):
            raise AssertionError("a pixel was decoded")

        monkeypatch.setattr(Image.Image, "load", refuse)
        counts = [encoder.count(record) for record in records]

        assert [count.total for count in counts] == [len(example) for example in expected]
        assert [count.images for count in counts] == [sum(example.mm_token_type_ids) for example in expected]
        assert [count.response for count in counts] == [
            sum(label != IGNORE for label in example.labels) for example in expected
        ]
        assert len({count.images for count in counts}) > 3

    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
    def test_files_are_measured_by_their_header_also_when_they_lie_on_their_side(self, encoder, tmp_path, suffix):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        options = {} if suffix == "gif" else {"exif": exif}
        path = write_image(tmp_path / f"a.{suffix}", 130, 45, **options)
        for source in (str(path), path.read_bytes()):
            [record] = load_records([{**DIRECT_ROW, "image": source}])

            example = encoder.example(record)

            assert encoder.count(record).total == len(example)
            grid = example.image_grid_thw[0].tolist()
            assert (grid[1] > grid[2]) == (suffix != "gif")  # it was turned, and the count did not care

    def test_lengths_of_all_rows(self, encoder, records):
        examples = [encoder.example(record) for record in records[:3]] + [encoder.prompt(records[3])]

        assert encoder.lengths(records) == [len(example) for example in examples]


class TestMaxLength:
    def test_a_row_that_does_not_fit_is_an_error_with_tokens_and_limit(self, records):
        length = Encoder(tiny_processor()).lengths(records[:1])[0]

        assert len(Encoder(tiny_processor(), max_length=length).example(records[0])) == length
        with pytest.raises(DataError, match=rf"row 0 \(rows:0\) has {length} tokens .* max_length is {length - 1}"):
            Encoder(tiny_processor(), max_length=length - 1).example(records[0])

    def test_rows_are_left_out_only_when_asked_and_then_counted(self, records, caplog):
        lengths = Encoder(tiny_processor()).lengths(records)
        encoder = Encoder(tiny_processor(), max_length=sorted(lengths)[1])

        kept = fitting_records(records, encoder)

        assert [record.index for record in kept] == [i for i, n in enumerate(lengths) if n <= encoder.max_length]
        assert "left out 2 of 4 rows" in caplog.text
