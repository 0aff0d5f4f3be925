"""MetisHomeProcessor: found by AutoProcessor, images to inputs, the thinking switch, save and load."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

from metis_home import MetisHomeProcessor
from metis_home.errors import ProcessorError
from metis_home.prompts import MAX_PIXELS, MIN_PIXELS, handles_thinking
from tests.processing.tiny import CHAT_TEMPLATE, HUB_IMAGE_SETTINGS, tiny_tokenizer, write_directory

RED = Image.new("RGB", (56, 56), "red")
TEXT = [{"role": "user", "content": "Is it red?"}]
IMAGE = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "Is it red?"}]}]
INPUTS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
# Qwen2.5-VL limits, so that a 56 x 56 image stays 4 tokens.
SMALL = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
CONFIG = {"model_type": "metis_home"}


@pytest.fixture
def processor() -> MetisHomeProcessor:
    return MetisHomeProcessor(Qwen2VLImageProcessorPil(), tiny_tokenizer())


# ---- AutoProcessor and directories ----------------------------------------------------------------------------------


def test_a_converted_directory_gives_our_processor(tmp_path) -> None:
    write_directory(tmp_path, processor_class="MetisHomeProcessor", image_settings=HUB_IMAGE_SETTINGS, config=CONFIG)

    processor = AutoProcessor.from_pretrained(tmp_path)

    assert type(processor) is MetisHomeProcessor


def test_a_directory_that_names_no_processor_gives_ours_by_its_config(tmp_path) -> None:
    write_directory(tmp_path, image_settings=HUB_IMAGE_SETTINGS, config=CONFIG)

    processor = AutoProcessor.from_pretrained(tmp_path)

    assert type(processor) is MetisHomeProcessor


def test_a_dense_directory_can_be_read_by_name(tmp_path) -> None:
    write_directory(tmp_path, processor_class="Qwen2_5_VLProcessor", image_settings=HUB_IMAGE_SETTINGS)

    processor = MetisHomeProcessor.from_pretrained(tmp_path)

    assert processor.apply_chat_template(IMAGE, **INPUTS)["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_saving_and_loading_gives_the_same_inputs_and_settings(tmp_path) -> None:
    write_directory(tmp_path / "a", image_settings=SMALL, config=CONFIG)
    first = AutoProcessor.from_pretrained(tmp_path / "a")

    first.save_pretrained(tmp_path / "b")
    second = AutoProcessor.from_pretrained(tmp_path / "b")

    assert type(second) is MetisHomeProcessor  # found by name: there is no config.json
    assert second.to_dict() == first.to_dict()
    assert second.chat_template == first.chat_template
    for enable in (None, True, False):
        expected = first.apply_chat_template(IMAGE, enable_thinking=enable, **INPUTS)
        found = second.apply_chat_template(IMAGE, enable_thinking=enable, **INPUTS)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_what_is_saved_teaches_the_tokenizer_alone_the_switch_and_the_answer_format(tmp_path, processor) -> None:
    processor.save_pretrained(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer.apply_chat_template(TEXT, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    message = tokenizer.parse_response("<answer>yes</answer><|im_end|>", prefix=prompt)

    assert prompt.endswith("<|im_start|>assistant\n<think></think>")
    assert message == {"role": "assistant", "reasoning_content": "", "content": "yes"}


@pytest.mark.skipif(is_torchvision_available(), reason="a machine with torchvision has a video processor")
@pytest.mark.parametrize("place", ["processor_config.json", "video_preprocessor_config.json"])
def test_video_settings_survive_a_machine_without_torchvision(tmp_path, place) -> None:
    write_directory(tmp_path / "a", image_settings=SMALL, config=CONFIG)
    settings = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}
    content = {"video_processor": settings} if place == "processor_config.json" else settings
    (tmp_path / "a" / place).write_text(json.dumps(content))

    AutoProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")

    assert json.loads((tmp_path / "b" / "processor_config.json").read_text())["video_processor"] == settings


# ---- pixel limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "asked", "limits"),
    [
        ({}, {}, (MIN_PIXELS, MAX_PIXELS)),
        ({"min_pixels": 3136}, {}, (3136, MAX_PIXELS)),
        ({"min_pixels": 3136, "max_pixels": 50176}, {}, (3136, 50176)),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, {}, (3136, 50176)),
        ({"min_pixels": 3136, "max_pixels": 50176}, {"max_pixels": 100352}, (3136, 100352)),
        ({}, {"min_pixels": 784}, (784, MAX_PIXELS)),
    ],
)
def test_pixel_limits_are_the_callers_then_the_directorys_then_the_papers(tmp_path, stated, asked, limits) -> None:
    write_directory(tmp_path, image_settings={"image_processor_type": "Qwen2VLImageProcessor", **stated}, config=CONFIG)

    processor = AutoProcessor.from_pretrained(tmp_path, **asked)

    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == limits


def test_the_default_limits_act_on_images_and_survive_saving(tmp_path) -> None:
    write_directory(tmp_path / "a", image_settings={"image_processor_type": "Qwen2VLImageProcessor"}, config=CONFIG)
    AutoProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")

    for directory in ("a", "b"):
        grid = AutoProcessor.from_pretrained(tmp_path / directory).apply_chat_template(IMAGE, **INPUTS)[
            "image_grid_thw"
        ]
        assert grid.prod().item() * 14 * 14 >= MIN_PIXELS


# ---- inputs ---------------------------------------------------------------------------------------------------------


def test_an_image_becomes_patches_and_as_many_tokens(processor) -> None:
    inputs = processor.apply_chat_template(IMAGE, **INPUTS)

    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert inputs["pixel_values"].shape == (16, 1176)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4  # 2 x 2 patches are one token
    assert inputs["mm_token_type_ids"].sum() == 4


def test_inputs_equal_those_of_qwens_own_image_processor(processor, tmp_path) -> None:
    noise = Image.effect_noise((120, 90), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    messages = [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "noise.png")}]}]

    inputs = processor.apply_chat_template(messages, **INPUTS)

    expected = Qwen2VLImageProcessorPil()([noise], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(inputs["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("nothing", [None, []])
def test_a_text_without_images_stands_beside_one_with(processor, nothing) -> None:
    image = Image.new("RGB", (56, 56), "red")
    texts = ["<|vision_start|><|image_pad|><|vision_end|>one", "none", "<|vision_start|><|image_pad|><|vision_end|>two"]

    flat = processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    per_text = processor(images=[[image], nothing, [image]], text=texts, padding=True, return_tensors="pt")
    none = processor(images=[nothing, nothing], text=["a", "b"], return_tensors="pt")

    assert all(torch.equal(flat[name], per_text[name]) for name in flat)
    assert "pixel_values" not in none


def test_a_batch_of_text_and_images_is_padded(processor) -> None:
    batch = processor.apply_chat_template([IMAGE, TEXT], processor_kwargs={"padding": True}, **INPUTS)
    alone = processor.apply_chat_template(TEXT, **INPUTS)["input_ids"][0]

    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["input_ids"][1, -len(alone) :], alone)
    assert batch["image_grid_thw"].shape == (1, 3)


def test_several_images_in_one_message(processor) -> None:
    content = [{"type": "image", "image": RED}, {"type": "image", "image": RED.resize((84, 56))}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **INPUTS)

    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4], [1, 4, 6]]


def test_arrays_are_accepted_as_images(processor) -> None:
    array = torch.randint(0, 255, (3, 56, 56), dtype=torch.uint8)

    inputs = processor(images=[array], text="<|image_pad|>", return_tensors="pt")

    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_images_of_a_direct_call_are_opened_and_checked_as_well(processor, tmp_path) -> None:
    RED.save(tmp_path / "red.png")
    clear = Image.new("RGBA", (56, 56), (0, 0, 0, 0))
    white = processor(images=[Image.new("RGB", (56, 56), "white")], text="<|image_pad|>", return_tensors="pt")

    from_path = processor(images=str(tmp_path / "red.png"), text="<|image_pad|>", return_tensors="pt")
    nested = processor(images=[[clear]], text=["<|image_pad|>"], return_tensors="pt")

    assert from_path["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert torch.equal(nested["pixel_values"], white["pixel_values"])
    with pytest.raises(ProcessorError, match="not fetched from the network by default"):
        processor(images=["http://localhost/red.png"], text="<|image_pad|>")


@pytest.mark.parametrize(("enable", "prefix"), [(None, ""), (True, "<think>"), (False, "<think></think>")])
def test_enable_thinking_reaches_text_and_tokens(processor, enable, prefix) -> None:
    text = processor.apply_chat_template(IMAGE, enable_thinking=enable, add_generation_prompt=True)
    ids = processor.apply_chat_template(IMAGE, enable_thinking=enable, **INPUTS)["input_ids"][0]

    assert text.endswith("<|im_start|>assistant\n" + prefix)
    assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\n" + prefix)


def test_the_tokenizer_alone_obeys_the_switch_too(processor) -> None:
    text = processor.tokenizer.apply_chat_template(
        TEXT, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )

    assert text.endswith("<|im_start|>assistant\n<think></think>")


def test_a_template_passed_by_the_caller_gets_the_switch_too(processor, caplog) -> None:
    text = processor.apply_chat_template(
        TEXT,
        chat_template="{% if add_generation_prompt %}A:{% endif %}\n",
        add_generation_prompt=True,
        enable_thinking=True,
    )

    assert text == "A:<think>"


def test_named_templates_all_get_the_switch() -> None:
    tokenizer = tiny_tokenizer()
    templates = {"default": CHAT_TEMPLATE, "short": "{% if add_generation_prompt %}A:{% endif %}"}

    processor = MetisHomeProcessor(Qwen2VLImageProcessorPil(), tokenizer, chat_template=templates)

    assert all(handles_thinking(template) for template in processor.chat_template.values())
    options = {"add_generation_prompt": True, "enable_thinking": False}
    assert processor.apply_chat_template(TEXT, chat_template="short", **options) == "A:<think></think>"
    assert processor.apply_chat_template(TEXT, **options).endswith("assistant\n<think></think>")


def test_the_callers_messages_are_not_changed(processor, tmp_path) -> None:
    RED.save(tmp_path / "red.png")
    block = {"type": "image", "image": str(tmp_path / "red.png")}
    messages = [{"role": "user", "content": [block]}]

    processor.apply_chat_template(messages, **INPUTS)

    assert messages == [{"role": "user", "content": [{"type": "image", "image": str(tmp_path / "red.png")}]}]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_answers_are_parsed_from_text_and_from_token_ids_alone_or_in_a_batch(processor) -> None:
    text = "<think>r</think><answer>c</answer><|im_end|>"
    ids = processor.tokenizer.encode(text)
    parsed = {"reasoning_content": "r", "content": "c"}

    assert processor.parse_response(text) == parsed
    assert processor.parse_response(ids) == parsed
    assert processor.parse_response(torch.tensor(ids)) == parsed
    assert processor.parse_response([text, text]) == [parsed, parsed]
    assert processor.parse_response(torch.tensor([ids, ids])) == [parsed, parsed]
    assert processor.parse_response([ids, ids[:-1]]) == [parsed, parsed]
    assert processor.parse_response([]) == []


def test_a_batch_of_answers_takes_one_prefix_or_one_each(processor) -> None:
    answers = ["r", "<answer>c</answer>"]

    each = processor.parse_response(answers, prefix=["assistant\n<think>", "assistant\n<think></think>"])

    assert each == [{"reasoning_content": "r", "content": ""}, {"reasoning_content": "", "content": "c"}]
    assert processor.parse_response(["r", "s"], prefix="<think>")[1]["reasoning_content"] == "s"
    with pytest.raises(ProcessorError, match="2 answers came with 3 prefixes"):
        processor.parse_response(answers, prefix=["", "", ""])


def test_the_end_tokens_of_the_tokenizer_are_removed() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    processor = MetisHomeProcessor(Qwen2VLImageProcessorPil(), tokenizer)

    assert processor.parse_response("yes</s><|endoftext|>")["content"] == "yes"


def test_a_schema_selects_transformers_own_parser(processor) -> None:
    schema = {"start_anchor": "A", "fields": {"all": {"content": "text"}}}

    assert processor.parse_response("<think>r", schema) == {"all": "<think>r"}


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["yes", 2, "auto", []])
def test_an_unknown_enable_thinking_is_refused(processor, wrong) -> None:
    with pytest.raises(ProcessorError, match="enable_thinking is"):
        processor.apply_chat_template(TEXT, enable_thinking=wrong)


def test_a_prefix_for_a_continued_message_is_refused(processor) -> None:
    messages = [*TEXT, {"role": "assistant", "content": "It"}]

    with pytest.raises(ProcessorError, match="continue_final_message"):
        processor.apply_chat_template(messages, continue_final_message=True, enable_thinking=True)
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("It")


def test_an_empty_conversation_is_refused(processor) -> None:
    with pytest.raises(ProcessorError, match="empty"):
        processor.apply_chat_template([], **INPUTS)


@pytest.mark.skipif(is_torchvision_available(), reason="videos work with torchvision")
def test_a_video_without_torchvision_is_refused_clearly(processor) -> None:
    messages = [{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}]
    refusal = r"torchvision, which is not installed.*metis_home\[vision\]"

    with pytest.raises(ProcessorError, match=refusal):
        processor.apply_chat_template(messages, **INPUTS)
    with pytest.raises(ProcessorError, match=refusal):
        processor(text="<|video_pad|>", videos=["film.mp4"])


@pytest.mark.skipif(not is_torchvision_available(), reason="videos need torchvision")
def test_a_video_with_torchvision_becomes_patches_and_as_many_tokens(processor, tmp_path) -> None:
    frames = torch.randint(0, 255, (8, 3, 56, 56), dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": frames}]}]
    options = {**INPUTS, "processor_kwargs": {"do_sample_frames": False}}

    inputs = processor.apply_chat_template(messages, **options)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(messages, **options)

    assert inputs["video_grid_thw"][0, 0] == 4  # two frames are one step in time
    assert (inputs["input_ids"] == processor.video_token_id).sum() == inputs["video_grid_thw"].prod() // 4
    assert torch.equal(inputs["pixel_values_videos"], again["pixel_values_videos"])


def test_a_tokenizer_that_is_not_qwens_is_refused() -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))

    with pytest.raises(ProcessorError, match=r"no token '<\|image_pad\|>'"):
        MetisHomeProcessor(
            Qwen2VLImageProcessorPil(), PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?", eos_token="a")
        )
    with pytest.raises(ProcessorError, match="needs a tokenizer"):
        MetisHomeProcessor(Qwen2VLImageProcessorPil())
