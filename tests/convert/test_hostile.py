"""A checkpoint from a stranger: each trap is refused with one clear message, and nothing is left behind."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from metis_home.cli import main
from metis_home.convert import upcycle
from metis_home.errors import CheckpointError, OutputError
from tests.convert.pico import CONFIG, shapes, snapshot, tensors, write_dense, write_safetensors

NAMES = sorted(shapes())
TWO = [NAMES[:20], NAMES[20:]]
FIRST = "model-00001-of-00002.safetensors"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw_header(path, json.dumps(header).encode(), data[8 + length :])


def raw_header(path: Path, text: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def name_shard(name: str) -> Callable[[Path], None]:
    def trap(d: Path) -> None:
        index = d / "model.safetensors.index.json"
        edit_json(index, lambda v: v["weight_map"].update({"lm_head.weight": name}))

    return trap


def link_outside(d: Path) -> None:
    (d / FIRST).rename(d.parent / "secret.safetensors")
    (d / FIRST).symlink_to(d.parent / "secret.safetensors")


def link_config_outside(d: Path) -> None:
    (d / "config.json").rename(d.parent / "secret.json")
    (d / "config.json").symlink_to(d.parent / "secret.json")


def set_entry(**fields: object) -> Callable[[Path], None]:
    return lambda d: edit_header(d / FIRST, lambda h: h[NAMES[0]].update(fields))


def truncated(d: Path) -> None:
    (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-1])


def duplicate_key(d: Path) -> None:
    data = (d / FIRST).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length]
    raw_header(d / FIRST, text.rstrip()[:-1] + b',"' + NAMES[0].encode() + b'":{}}', data[8 + length :])


def pickled(d: Path) -> None:
    for path in [*d.glob("*.safetensors"), d / "model.safetensors.index.json"]:
        path.unlink()
    (d / "pytorch_model.bin").write_bytes(b"never read")


def stale_single_file(d: Path) -> None:
    write_safetensors(d / "model.safetensors", tensors())


def set_config(**fields: object) -> Callable[[Path], None]:
    return lambda d: edit_json(d / "config.json", lambda c: c.update(fields))


def set_text(**fields: object) -> Callable[[Path], None]:
    return lambda d: edit_json(d / "config.json", lambda c: c["text_config"].update(fields))


def both_layouts(d: Path) -> None:
    content = tensors()
    content["model.language_model.norm.weight"] = content["model.norm.weight"]
    for path in [*d.glob("*.safetensors"), d / "model.safetensors.index.json"]:
        path.unlink()
    write_safetensors(d / "model.safetensors", content)


def quantised(d: Path) -> None:
    edit_json(d / "config.json", lambda c: c.update(quantization_config={"quant_method": "fp8"}))


HUGE = 2**62
TRAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard in the parent directory": (name_shard("../victim.safetensors"), "no plain name"),
    "shard with an absolute path": (name_shard("/etc/victim.safetensors"), "no plain name"),
    "shard with a backslash": (name_shard("a\\b.safetensors"), "no plain name"),
    "shard that is no safetensors": (name_shard("pytorch_model.bin"), r"no \.safetensors file name"),
    "shard that is a number": (lambda d: name_shard(3)(d), r"no \.safetensors file name"),  # type: ignore[arg-type]
    "shard that is missing": (name_shard("model-00009-of-00002.safetensors"), "does not exist"),
    "shard that links outside": (link_outside, "outside the checkpoint"),
    "config that links outside": (link_config_outside, "outside the checkpoint"),
    "shard that is a pipe": (lambda d: ((d / FIRST).unlink(), os.mkfifo(d / FIRST)), "no plain file"),
    "shard that is a directory": (
        lambda d: ((d / FIRST).unlink(), (d / FIRST).mkdir()),
        "cannot be read|no plain file",
    ),
    "index names a tensor that is not there": (
        lambda d: edit_json(d / "model.safetensors.index.json", lambda v: v["weight_map"].update(ghost=FIRST)),
        "'ghost' is in .*it is in no shard",
    ),
    "index leaves a tensor out": (
        lambda d: edit_json(d / "model.safetensors.index.json", lambda v: v["weight_map"].pop(NAMES[3])),
        "does not name",
    ),
    "index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        "must be an object",
    ),
    "index that is no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
    "single file beside shards": (stale_single_file, "has both"),
    "pickled weights only": (pickled, "pickled weights"),
    "empty shard": (lambda d: (d / FIRST).write_bytes(b""), "too few"),
    "truncated shard": (truncated, "Is the download complete"),
    "header longer than the file": (lambda d: (d / FIRST).write_bytes(struct.pack("<Q", 5000) + b"{}"), "the file has"),
    "header of 2**63 bytes": (lambda d: (d / FIRST).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "more than"),
    "header that is no JSON": (lambda d: raw_header(d / FIRST, b"{nonsense"), "not valid JSON"),
    "header that is no UTF-8": (lambda d: raw_header(d / FIRST, b'{"\xff":1}'), "not valid JSON"),
    "header that is a list": (lambda d: raw_header(d / FIRST, b"[]"), "does not start"),
    "header nested 100,000 deep": (
        lambda d: raw_header(d / FIRST, b'{"a":' + b"[" * 100_000),
        "nested too deep|not valid",
    ),
    "duplicate key": (duplicate_key, "there twice"),
    "NaN in the header": (lambda d: raw_header(d / FIRST, b'{"a":NaN}'), "NaN is not JSON"),
    "unknown dtype": (set_entry(dtype="F31"), "unknown dtype"),
    "quantised dtype": (lambda d: edit_header(d / FIRST, lambda h: h[NAMES[0]].update(dtype="I32")), "only BF16"),
    "negative shape": (set_entry(shape=[-1, 8]), "not valid JSON|whole numbers"),
    "huge shape": (set_entry(shape=[HUGE, 16]), r"2\*\*63"),
    "shape of 10**30": (set_entry(shape=[10**30]), "larger than"),
    "shape with a fraction": (set_entry(shape=[1.5]), "whole numbers"),
    "shape with a boolean": (set_entry(shape=[True]), "whole numbers"),
    "length that does not fit the shape": (set_entry(shape=[7]), "needs"),
    "offsets that overlap": (
        lambda d: edit_header(d / FIRST, lambda h: h[NAMES[1]].update(data_offsets=h[NAMES[0]]["data_offsets"])),
        "overlaps|needs",
    ),
    "a hole between tensors": (lambda d: edit_header(d / FIRST, lambda h: h.pop(NAMES[0])), "leaves a hole"),
    "offsets backwards": (set_entry(data_offsets=[32, 0]), "needs"),
    "extra field in an entry": (set_entry(code="import os"), "expected the fields"),
    "metadata that is no text": (
        lambda d: edit_header(d / FIRST, lambda h: h.update(__metadata__={"a": 1})),
        "strings",
    ),
    "another architecture": (set_config(model_type="llama"), "expected model_type 'qwen2_5_vl'"),
    "a two-branch model": (set_config(model_type="metis_home"), "already has two branches"),
    "a quantised model": (quantised, "is quantised"),
    "a config of another width": (set_text(hidden_size=16), "config.json makes it"),
    "a config with more layers": (set_text(num_hidden_layers=3), "lacks 12 of"),
    "a config with fewer layers": (set_text(num_hidden_layers=1), "has 12 tensors that Qwen2.5-VL has not"),
    "a config with 10**9 layers": (set_text(num_hidden_layers=10**9), "sensible size"),
    "a config with no heads": (set_text(num_attention_heads=0), "positive whole number"),
    "a config that is a list": (lambda d: (d / "config.json").write_text("[]"), "expected a JSON object"),
    "a config that is missing": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a text config that is a number": (set_config(text_config=3), "must be objects"),
    "both layouts at once": (both_layouts, "both key layouts"),
    "tied, but the head differs": (set_config(tie_word_embeddings=True), "differs from"),
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda name: name.replace(" ", "_"))
def test_a_trap_is_refused_and_leaves_nothing(trap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spring, message = TRAPS[trap]
    dense = write_dense(tmp_path / "dense", groups=TWO)
    spring(dense)
    before = sorted(p.name for p in tmp_path.iterdir())

    with pytest.raises(CheckpointError, match=message):
        upcycle(dense, tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(dense), str(tmp_path / "out")])

    errors = capsys.readouterr().err
    assert stopped.value.code == 1
    assert errors.startswith("error: ")
    assert "Traceback" not in errors
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_no_head_although_it_is_not_tied(tmp_path: Path) -> None:
    config = dict(CONFIG, tie_word_embeddings=False)
    dense = write_dense(tmp_path / "d", tensors(tied=True), config=config)

    with pytest.raises(CheckpointError, match="does not say that it is tied"):
        upcycle(dense, tmp_path / "out")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    plain = write_dense(tmp_path / "plain", groups=TWO)
    repository = tmp_path / "models--a--b"
    snapshot_directory, blobs = repository / "snapshots" / "0a1b", repository / "blobs"
    snapshot_directory.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / str(number))
        (snapshot_directory / path.name).symlink_to(f"../../blobs/{number}")

    upcycle(snapshot_directory, tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 10_000
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_code_in_a_checkpoint_is_left_behind(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "d")
    (dense / "modeling_evil.py").write_text("raise SystemExit('ran')")

    manifest = upcycle(dense, tmp_path / "out")

    assert not list((tmp_path / "out").rglob("*.py"))
    assert any("modeling_evil.py" in notice for notice in manifest.notices)


def test_a_target_that_is_taken(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "d")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "photos")

    for name, overwrite, message in (
        ("photos", False, "not empty"),
        ("photos", True, "no checkpoint"),
        ("file", True, "is a file"),
        ("link", True, "is a link"),
        ("missing/out", False, "does not exist"),
    ):
        with pytest.raises(OutputError, match=message):
            upcycle(dense, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"
    with pytest.raises(CheckpointError, match="lie in one another"):
        upcycle(dense, dense / "out")


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    from metis_home.convert.disk import Disk

    class ReadOnly(Disk):
        def before(self, operation: str, path: str, size: int = 0) -> None:
            raise OSError(30, "Read-only file system", path)

    dense = write_dense(tmp_path / "d")

    with pytest.raises(OutputError, match=r"Read-only file system\. Is the disk writable"):
        upcycle(dense, tmp_path / "out", disk=ReadOnly())
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_dense(tmp_path / "d")
    monkeypatch.setattr("metis_home.convert.output.free_space", lambda out: 1000)

    with pytest.raises(OutputError, match="GB free"):
        upcycle(dense, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_empty_directory_may_become_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    upcycle(write_dense(tmp_path / "d"), tmp_path / "out")
    assert "config.json" in snapshot(tmp_path / "out")
