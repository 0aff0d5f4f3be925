"""The Python tool and the sandbox around it: what a model sees, what stays between calls, and when it refuses."""

import io
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from metis_home.errors import SandboxError
from metis_home.training.tools import probe, sandbox
from metis_home.training.tools.limits import SandboxLimits, ToolLimits
from metis_home.training.tools.protocol import ToolContext
from metis_home.training.tools.python_tool import PythonTool
from metis_home.training.tools.sandbox import Sandbox, sandbox_available

usable, reason = sandbox_available()
needs_sandbox = pytest.mark.skipif(not usable, reason=f"no usable sandbox on this machine: {reason}")
HOSTILE = Path(__file__).parent / "hostile"


@pytest.fixture
def no_sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which namespaces cannot be made."""
    probe.probe.cache_clear()

    def refuse(*_: object) -> None:
        raise SandboxError("the sandbox could not be made: clone into new namespaces: Operation not permitted.")

    monkeypatch.setattr(sandbox, "_run_enclosed", refuse)
    yield
    probe.probe.cache_clear()


@needs_sandbox
def test_output_and_the_last_expression_are_shown() -> None:
    result = PythonTool().run({"code": "print('sum:', end=' ')\n1 + 1"}, ToolContext())

    assert (result.text, result.ok, result.images) == ("sum: 2", True, ())
    assert 0 < result.seconds < 10


@needs_sandbox
def test_a_traceback_names_the_program_and_no_file_of_ours() -> None:
    result = PythonTool().run({"code": "def f():\n    return 1 / 0\nf()"}, ToolContext())

    assert (result.ok, result.error) == (False, "failed")
    assert 'File "program.py", line 2, in f\n    return 1 / 0' in result.text
    assert "runner.py" not in result.text


@needs_sandbox
def test_files_stay_between_calls_and_variables_do_not() -> None:
    tool, context, other = PythonTool(), ToolContext(), ToolContext()

    tool.run({"code": "import os; os.makedirs('a'); open('a/n.txt', 'w').write('5'); x = 1"}, context)
    kept = tool.run({"code": "print(open('a/n.txt').read(), 'x' in globals())"}, context)
    changed = tool.run({"code": "open('a/n.txt', 'a').write('6'); print(open('a/n.txt').read())"}, context)
    removed = tool.run({"code": "import os; os.remove('a/n.txt')"}, context)
    apart = tool.run({"code": "import os; print(os.listdir('.'))"}, other)

    assert (kept.text, changed.text, apart.text) == ("5 False", "56", "[]")
    assert removed.ok
    assert context.files == {}


@needs_sandbox
def test_the_questions_images_can_be_read_and_saved_images_come_back() -> None:
    context = ToolContext(images=(Image.new("RGB", (64, 48), "red"),))
    code = "from PIL import Image\nim = Image.open('image_1.png')\nprint(im.size)\nim.crop((0, 0, 20, 30)).save('crop.png')"

    result = PythonTool().run({"code": code}, context)

    assert result.text == "(64, 48)"
    assert [image.size for image in result.images] == [(20, 30)]
    assert result.images[0].getpixel((3, 3)) == (255, 0, 0)


@needs_sandbox
def test_numpy_and_open_figures_work() -> None:
    pytest.importorskip("matplotlib")
    tool = PythonTool(limits=SandboxLimits(wall_seconds=200, cpu_seconds=200))  # a busy machine imports for long

    result = tool.run(
        {"code": "import numpy as np, matplotlib.pyplot as plt\nplt.plot(np.arange(5))\nNone"}, ToolContext()
    )

    assert result.ok, result.text
    assert [image.size for image in result.images] == [(640, 480)]


@needs_sandbox
def test_images_that_cannot_or_must_not_be_opened_are_named() -> None:
    code = (HOSTILE / "decompression_bomb.py").read_text()

    result = PythonTool().run({"code": code}, ToolContext())

    assert [image.size for image in result.images] == [(64, 64)]
    assert "bomb.png: has far too many pixels; at most 16000000 are opened" in result.text
    assert "cut.png: not a readable image" in result.text
    assert "large.png: has 5000 x 5000 pixels; at most 16000000 are opened" in result.text
    assert "text.png: not a readable image" in result.text


@needs_sandbox
def test_no_more_images_than_allowed() -> None:
    code = "from PIL import Image\nfor i in range(5): Image.new('L', (9, 9)).save(f'{i}.png')"

    result = PythonTool().run({"code": code}, ToolContext(limits=ToolLimits(images=2)))

    assert len(result.images) == 2
    assert "4.png: not shown" in result.text


@needs_sandbox
@pytest.mark.parametrize(
    ("code", "seconds", "error", "said"),
    [
        ("while True: pass", 1, "time", "may run for 1 s"),
        ("print('x' * 10**6)", 60, "limit", "may print 1000 bytes"),
        ("import os; os.kill(os.getpid(), 9)", 60, "failed", "killed by signal 9"),
        ("raise SystemExit(3)", 60, "failed", "exit status 3"),
        ("import os\nif os.fork() == 0:\n    import time; time.sleep(60)", 60, None, "1 processes were still running"),
    ],
)
def test_how_a_program_was_stopped_is_told(code: str, seconds: float, error: str | None, said: str) -> None:
    tool = PythonTool(limits=SandboxLimits(wall_seconds=seconds, output_bytes=1000))

    result = tool.run({"code": code}, ToolContext())

    assert result.error == error
    assert said in result.text


@needs_sandbox
def test_threads_may_call_the_sandbox_at_once() -> None:
    tool = PythonTool()

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: tool.run({"code": f"print({n})"}, ToolContext()).text, range(8)))

    assert results == [str(n) for n in range(8)]


@needs_sandbox
def test_source_that_is_no_text_or_no_program_is_an_error_of_the_program() -> None:
    for code in ("def", "\ud800", "\0", "x = '''"):
        result = PythonTool().run({"code": code}, ToolContext())
        assert result.ok is False
        assert "Error" in result.text


FILLERS = {
    "bytes": "with open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 16))",
    "files": "for n in range(9999): open(str(n), 'w').close()",
    "folders": "import os\nfor n in range(9999): os.mkdir(f'd{n}'); open(f'd{n}/f', 'w').close()",
    "a sparse file": "open('a', 'w').write('x')\nwith open('big', 'wb') as file: file.truncate(SIZE - 1)",
    "small files": "for n in range(99): open(f'a{n}', 'w').write('x')\n"
    "with open('big', 'wb') as file: file.truncate(SIZE - 99)",
    "the temporary folder too": "import pathlib\nfor path in pathlib.Path('/tmp').glob('fontlist*'): path.unlink()\n"
    "with open('big', 'wb') as file:\n    while True: file.write(bytes(4096)); file.flush()",
}


@needs_sandbox
@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_a_full_folder_stops_no_later_program(filler: str) -> None:
    size = 1 << 20
    limits = SandboxLimits(scratch_bytes=size, scratch_files=128, file_bytes=2 * size, wall_seconds=200)
    tool, context = PythonTool(limits=limits), ToolContext()
    tool._fonts = {"../tmp/fontlist.json": bytes(5000), "../tmp/fontlist2.json": b"x"}

    tool.run({"code": f"SIZE = {size}\n{filler}"}, context)
    looks = "len([name for name in os.listdir('/tmp') if name.startswith('fontlist')]), len(os.listdir('.')) > 0"
    again = tool.run({"code": f"# matplotlib\nimport os\n{looks}"}, context)
    emptied = tool.run({"code": "import shutil\nshutil.rmtree('.', ignore_errors=True)"}, context)

    assert again.text == "(2, True)"
    assert emptied.ok
    assert context.files == {}


@needs_sandbox
def test_a_folder_that_cannot_be_made_is_a_limit_and_no_broken_tool() -> None:
    tool = PythonTool(limits=SandboxLimits(scratch_bytes=1 << 20))
    context = ToolContext(files={"big": bytes(2 << 20)})

    result = tool.run({"code": "1"}, context)

    assert (result.ok, result.error) == (False, "limit")
    assert "the folder /scratch is full: it holds 1 files of 2097152 bytes" in result.text


@needs_sandbox
def test_too_much_to_bring_in_is_refused() -> None:
    with pytest.raises(
        SandboxError, match=r"is full: it holds 1 files of 9000 bytes, 9000 bytes, more than 1000 in all"
    ):
        Sandbox(SandboxLimits(scratch_bytes=1000)).run("1", {"big": bytes(9000)})
    with pytest.raises(SandboxError, match="more than 7 files and folders"):
        Sandbox(SandboxLimits(scratch_files=10)).run("1", {f"{n}/a": b"" for n in range(4)})
    with pytest.raises(SandboxError, match="the program has"):
        Sandbox().run("#" * (2 << 20))


@needs_sandbox
def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")

    result = Sandbox().run("import os; print(sorted(os.environ))", environment={"MINE": "1"})

    assert "API_KEY" not in result.stdout
    assert "MINE" in result.stdout


@needs_sandbox
def test_more_can_be_made_readable(tmp_path: Path) -> None:
    (tmp_path / "facts.txt").write_text("fact")
    tmp_path.chmod(0o755)  # what only its owner may read stays unreadable where the owner is root

    shown = Sandbox(readable=[tmp_path]).run(f"print(open({str(tmp_path / 'facts.txt')!r}).read())")
    hidden = Sandbox().run(f"print(open({str(tmp_path / 'facts.txt')!r}).read())")

    assert shown.stdout == "fact\n"
    assert "FileNotFoundError" in hidden.stderr


@needs_sandbox
def test_the_home_directory_is_never_made_readable() -> None:
    with pytest.raises(SandboxError, match="the home directory"):
        Sandbox(readable=[Path.home()])
    with pytest.raises(SandboxError, match="the home directory"):
        Sandbox(readable=["/"])


def test_without_a_sandbox_it_refuses_and_says_why(no_sandbox: None) -> None:
    assert sandbox_available()[0] is False

    with pytest.raises(SandboxError, match=r"Operation not permitted.*unsafe_local=True"):
        PythonTool()


def test_another_system_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(SandboxError, match="made of Linux namespaces"):
        Sandbox()


def test_a_leak_makes_the_probe_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe believes what the program in it could do, not what the sandbox promises."""
    probe.probe.cache_clear()
    from metis_home.training.tools.unsafe_local import run_unprotected

    monkeypatch.setattr(
        sandbox,
        "_run_enclosed",
        lambda program, files, limits, *_: run_unprotected(program.decode(), files, limits, {}),
    )
    try:
        is_usable, why = sandbox_available()
    finally:
        probe.probe.cache_clear()

    assert is_usable is False
    assert "not kept from: network, read" in why


def test_unsafe_local_runs_with_a_loud_warning(no_sandbox: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tool = PythonTool(unsafe_local=True)
    context = ToolContext()

    tool.run({"code": "open('a.txt', 'w').write('kept')"}, context)
    result = tool.run({"code": "open('a.txt').read()"}, context)

    assert result.text == "'kept'"
    assert [record.levelname for record in caplog.records if "UNSAFE" in record.message] == ["WARNING"]


def test_unsafe_local_still_has_limits_and_ends_daemons(no_sandbox: None) -> None:
    box = Sandbox(SandboxLimits(wall_seconds=60, output_bytes=1000, process_bytes=1 << 30), unsafe_local=True)
    hasty = Sandbox(SandboxLimits(wall_seconds=1.5), unsafe_local=True)

    endless = hasty.run("import time; time.sleep(20)")
    loud = box.run("print('x' * 10**6)")
    large = box.run("x = bytearray(2 << 30)")
    daemon = box.run((HOSTILE / "daemon.py").read_text())

    assert (endless.ended, loud.ended) == ("time", "output")
    assert "MemoryError" in large.stderr
    if sys.platform == "linux":
        assert daemon.left_behind == 1


def test_figures_are_pictures_of_the_right_bytes() -> None:
    """The image check opens what it should: a real PNG passes through `open_image` unchanged."""
    from metis_home.training.tools.python_tool import open_image

    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(buffer, "PNG")

    assert open_image(buffer.getvalue(), 20).getpixel((4, 3)) == (1, 2, 3)
