"""What the kits' adapters share; the adapters themselves meet the real kits in tests/adapters."""

import json
from types import SimpleNamespace

import pytest

from metis_home.chat import answer
from metis_home.errors import CheckpointError, ConfigError, UnsupportedError
from metis_home.prompts import SYSTEM_PROMPT
from metis_home.training.evaluation.kit import KitModel, answer_digest, split_thinking, without_answer_tags
from metis_home.training.evaluation.lmms_eval import convert_messages
from metis_home.training.evaluation.vlmeval import convert_message
from tests.training.evaluation.material import pictures

KIT_OPTIONS = {"max_new_tokens": 6, "device": "cpu", "system_prompt": "none"}


def conversations(folder) -> list:
    image = str(pictures(folder)[0])
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What colour?"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "A longer question without a picture?"}]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    ]


@pytest.mark.parametrize(("route", "thinking"), [("auto", "auto"), ("think", True), ("direct", False)])
def test_a_kit_gets_the_answers_of_the_model_in_order(model_directory, loaded, tmp_path, route, thinking) -> None:
    kit = KitModel(str(model_directory), route=route, batch_size=2, **KIT_OPTIONS)
    asked = conversations(tmp_path)

    found = kit.answer(asked)

    prefix = {"auto": "", True: "<think>", False: "<think></think>"}[thinking]
    for messages, made in zip(asked, found, strict=True):
        alone = answer(*loaded, messages, thinking=thinking, max_new_tokens=6, do_sample=False)
        assert made.text == prefix + alone.text
        assert made.branch == alone.branch.label


def test_what_a_sidecar_gets(model_directory, tmp_path) -> None:
    log = tmp_path / "new" / "router.jsonl"
    kit = KitModel(str(model_directory), router_log=log, **KIT_OPTIONS)
    found = kit.answer(conversations(tmp_path)[1:2])

    kit.log(found, [{"task": "t", "doc_id": 5}])
    kit.log(found, [{"task": "t", "doc_id": 6}])

    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert (first["task"], first["doc_id"], second["doc_id"]) == ("t", 5, 6)
    assert 0 < first["thinking_probability"] < 1
    assert first["digest"] == answer_digest(found[0].text)


def test_the_system_prompt_is_the_published_one_a_file_a_text_or_none(model_directory, tmp_path) -> None:
    (tmp_path / "system.txt").write_text("From a file.\n")
    given = {
        None: SYSTEM_PROMPT,
        "none": None,
        "Own words.": "Own words.",
        str(tmp_path / "system.txt"): "From a file.",
    }

    for value, want in given.items():
        kit = KitModel(str(model_directory), device="cpu", system_prompt=value)
        assert kit.answerer.system_prompt == want


def test_wrong_options_are_refused(model_directory, tmp_path) -> None:
    with pytest.raises(ConfigError, match="auto, think or direct"):
        KitModel(str(model_directory), route="sometimes")
    with pytest.raises(CheckpointError):
        KitModel(str(tmp_path / "gone"))


def test_answer_tags_are_removed_after_the_thought_only() -> None:
    assert without_answer_tags("<think>an <answer> is</think><answer>4</answer>") == "<think>an <answer> is</think>4"
    assert without_answer_tags("<answer>4</answer>") == "4"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<think>r</think><answer>4</answer>", ("4", "r")),
        ("<think></think><answer>4</answer>", ("4", "")),
        ("4", ("4", "")),
        ("<think>cut", ("", "cut")),
    ],
)
def test_an_answer_is_split_for_the_thinking_column(text, want) -> None:
    assert split_thinking(text) == want


def test_a_digest_survives_splitting_and_white_space() -> None:
    assert answer_digest("<think>a b</think>\n<answer> 4</answer>") == answer_digest("a  b 4")
    assert answer_digest("a b 4") != answer_digest("a b 5")


def test_messages_of_lmms_eval_are_converted_as_mappings_and_as_objects() -> None:
    as_mappings = [
        {"role": "system", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [{"type": "image", "url": "picture"}, {"type": "text", "text": "?"}]},
    ]
    as_objects = [
        SimpleNamespace(role=m["role"], content=[SimpleNamespace(**block) for block in m["content"]])
        for m in as_mappings
    ]

    assert convert_messages(as_mappings) == convert_messages(as_objects)
    assert convert_messages(as_mappings)[1]["content"][0] == {"type": "image", "image": "picture"}
    with pytest.raises(UnsupportedError, match="holds video"):
        convert_messages([{"role": "user", "content": [{"type": "video", "url": "v.mp4"}]}])


def test_messages_of_vlmevalkit_are_converted_in_order() -> None:
    message = [
        {"type": "text", "value": "s", "role": "system"},
        {"type": "text", "value": "look:"},
        {"type": "image", "value": "a.png"},
    ]

    assert convert_message(message) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "look:"}, {"type": "image", "image": "a.png"}]},
    ]
    with pytest.raises(UnsupportedError, match="holds video"):
        convert_message([{"type": "video", "value": "v.mp4"}])


def test_the_entry_point_names_the_adapter() -> None:
    import importlib.metadata

    if importlib.util.find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed: tests/adapters tests more")
    found = [entry for entry in importlib.metadata.entry_points(group="lmms_eval.models") if entry.name == "metis_home"]
    if not found:
        pytest.skip("the installed metadata are older than the entry point: reinstall the package")
    assert found[0].value == "metis_home.training.evaluation.lmms_eval:manifests"
    with pytest.raises(ImportError):
        found[0].load()()
