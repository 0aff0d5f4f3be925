"""`metis-home generate` and `route`: results on stdout, talk on stderr, exit status 0, 1 or 2."""

import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from metis_home.cli import main
from tests.processing.tiny import HUB_IMAGE_SETTINGS, write_directory, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (56, 56), "red").save(path)
    return str(path)


@pytest.fixture
def run(capsys):
    """Call the command line in this process; returns (status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main(list(arguments))
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        out, err = capsys.readouterr()
        return status, out, err

    return call


SHORT = ("--max-new-tokens", "8", "--temperature", "0", "--device", "cpu")


# ---- generate -------------------------------------------------------------------------------------------------------


def test_the_answer_is_on_stdout_and_the_talk_on_stderr(run, model, picture) -> None:
    status, out, err = run("generate", model, "Red?", "--image", picture, "--thinking", "off", *SHORT)
    _, as_json, _ = run("generate", model, "Red?", "--image", picture, "--thinking", "off", *SHORT, "--json")

    assert status == 0
    assert out == json.loads(as_json)["content"] + "\n"
    assert "[non-thinking, forced; " in err


def test_json_holds_every_part(run, model) -> None:
    status, out, _ = run("generate", model, "Red?", *SHORT, "--json")

    given = json.loads(out)
    assert status == 0
    assert set(given) == {
        "branch", "thinking_probability", "reasoning_content", "content", "text",
        "prompt_tokens", "completion_tokens", "finished",
    }  # fmt: skip
    assert given["branch"] in ("thinking", "non-thinking")
    assert 0 <= given["thinking_probability"] <= 1
    assert given["completion_tokens"] <= 8


def test_a_forced_thought_is_shown_beside_the_result_not_in_it(run, model) -> None:
    status, out, err = run("generate", model, "Red?", "--thinking", "on", *SHORT)

    assert (status, out) == (0, "")
    assert "[thinking, forced; " in err
    assert "the answer was cut after 8 tokens; --max-new-tokens allows more" in err


@pytest.mark.parametrize(("threshold", "branch"), [("0", "thinking"), ("1", "non-thinking")])
def test_the_threshold_steers_the_router(run, model, threshold, branch) -> None:
    _, out, _ = run("generate", model, "Red?", "--threshold", threshold, *SHORT, "--json")

    assert json.loads(out)["branch"] == branch


def test_the_system_prompt_is_the_published_one_unless_another_is_given(run, model) -> None:
    sizes = {}
    for name, options in {"default": (), "none": ("--system", ""), "own": ("--system", "Hi.")}.items():
        _, out, _ = run("generate", model, "Red?", *options, *SHORT, "--json")
        sizes[name] = json.loads(out)["prompt_tokens"]

    assert sizes["own"] < sizes["none"] < sizes["default"]


def test_a_seed_makes_sampling_repeatable(run, model) -> None:
    sample = ("--max-new-tokens", "12", "--temperature", "3", "--top-p", "1", "--json")
    texts = [run("generate", model, "Red?", *sample, "--seed", seed)[1] for seed in ("1", "1", "2")]

    assert texts[0] == texts[1] != texts[2]


def test_streaming_prints_the_raw_answer_once(run, model) -> None:
    _, out, _ = run("generate", model, "Red?", "--thinking", "off", *SHORT, "--stream")
    _, as_json, _ = run("generate", model, "Red?", "--thinking", "off", *SHORT, "--json")

    assert out.rstrip("\n") == json.loads(as_json)["text"].rstrip("\n")


def test_a_prompt_can_come_from_stdin(run, model, monkeypatch) -> None:
    _, expected, _ = run("generate", model, "Red?", *SHORT, "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Red?"))

    _, out, _ = run("generate", model, "-", *SHORT, "--json")

    assert out == expected


# ---- route ----------------------------------------------------------------------------------------------------------


def test_route_and_generate_agree(run, model, picture) -> None:
    _, generated, _ = run("generate", model, "Red?", "--image", picture, *SHORT, "--json")

    status, out, _ = run("route", model, "Red?", "--image", picture, "--json")

    routed, given = json.loads(out), json.loads(generated)
    assert status == 0
    assert routed["branch"] == given["branch"]
    assert routed["thinking_probability"] == pytest.approx(given["thinking_probability"], abs=1e-6)


def test_every_line_of_a_file_is_routed_with_images_beside_it(run, model, picture, tmp_path) -> None:
    blocks = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "Red?"}]
    lines = [
        {"prompt": "Red?", "images": ["red.png"]},
        {"prompt": "Why?"},
        {"messages": [{"role": "user", "content": blocks}]},
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")

    status, out, err = run("route", model, "--data", str(data), "--json")
    _, table, _ = run("route", model, "--data", str(data))

    decisions = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert len(decisions) == 3
    assert decisions[0] == decisions[2] != decisions[1]
    assert f"{sum(d['branch'] == 'thinking' for d in decisions)} of 3 think" in err
    assert table.splitlines()[1].split() == [
        decisions[1]["branch"],
        f"{decisions[1]['thinking_probability']:.4f}",
        "Why?",
    ]


def test_an_untrained_router_is_admitted(run, tmp_path) -> None:
    fresh = str(write_model(tmp_path, router_trained=False))

    _, _, err = run("route", fresh, "Red?")

    assert "router has not been trained" in err


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [("{", "not JSON"), ("[]", "expected"), ('{"prompt": 1}', "expected"), ('{"messages": []}', "expected")],
)
def test_a_bad_line_is_named(run, model, tmp_path, line, reason) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "fine"}\n' + line + "\n")

    status, out, err = run("route", model, "--data", str(data))

    assert status == 1
    assert f"bad.jsonl:2: {reason}" in err
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "route"])
def test_a_model_that_cannot_answer_is_one_clear_message(run, tmp_path, command) -> None:
    dense = write_directory(tmp_path / "d", image_settings=HUB_IMAGE_SETTINGS, config={"model_type": "qwen2_5_vl"})
    odd = write_directory(tmp_path / "odd", config={"model_type": "never_heard_of"})

    advice = f"A dense Qwen2.5-VL is made into one with `metis-home convert {dense}"
    for path, reason in (
        (dense, "is a qwen2_5_vl model, expected metis_home. " + advice),
        (odd, "not a model that can be loaded"),
        (tmp_path / "nowhere", "no such directory"),
    ):
        status, out, err = run(command, str(path), "Red?")
        assert (status, out) == (1, "")
        assert reason in err
        assert "Traceback" not in err


def test_a_missing_or_broken_image_is_one_clear_message(run, model, tmp_path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")

    for name, reason in (("missing.png", "no such image file"), ("broken.png", "not a readable")):
        status, out, err = run("generate", model, "Red?", "--image", str(tmp_path / name), *SHORT)
        assert (status, out) == (1, "")
        assert reason in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m"),
        ("generate", "m", "p", "--thinking", "maybe"),
        ("generate", "m", "p", "--threshold", "1.5"),
        ("generate", "m", "p", "--max-new-tokens", "0"),
        ("generate", "m", "p", "--stream", "--json"),
        ("generate", "m", "p", "--dtype", "int4"),
        ("route", "m"),
        ("route", "m", "p", "--data", __file__),
        ("route", "m", "--data", "missing.jsonl"),
        ("route", "m", "--data", __file__, "--image", "a.png"),
        ("route", "m", "p", "--temperature", "0"),
        ("no-such-command",),
    ],
)
def test_wrong_usage_is_status_2_before_anything_is_loaded(run, arguments) -> None:
    status, out, err = run(*arguments)

    assert (status, out) == (2, "")
    assert "Usage" in err


# ---- the frame ------------------------------------------------------------------------------------------------------


def test_help_and_version_import_neither_torch_nor_transformers() -> None:
    for arguments in (["--help"], ["--version"], [], ["generate", "--help"], ["route", "--help"], ["doctor", "--help"]):
        code = (
            "import sys\nfrom metis_home.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
            "loaded = {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)\n"
            "sys.exit(f'imported {loaded}' if loaded else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout.strip()


def test_each_command_shows_one_example(run) -> None:
    for command in ("generate", "route", "doctor"):
        status, out, _ = run(command, "--help")
        assert status == 0
        assert out.count("Example: metis-home " + command) == 1


def test_version_and_bare_command_succeed(run) -> None:
    assert run("--version")[1].startswith("metis_home ")
    status, out, _ = run()
    assert status == 0
    assert "generate" in out


def test_debug_shows_where_an_error_came_from(model) -> None:
    command = [sys.executable, "-c", "from metis_home.cli import main; main()", "generate", "./nowhere", "p"]

    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    debug = subprocess.run([*command[:3], "--debug", *command[3:]], capture_output=True, text=True, check=False)

    assert plain.returncode == 1
    assert plain.stderr.startswith("error: ./nowhere: no such directory")
    assert "Traceback" in debug.stderr
