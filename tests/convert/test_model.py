"""A converted checkpoint loads, and each branch computes the dense model's logits bit for bit; a bundle likewise."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from metis_home.convert import link, split, upcycle, verify
from metis_home.errors import CheckpointError, OutputError, VerificationError
from metis_home.link_bundle import BUNDLE_FILE, tensor_places
from tests.convert.pico import CONFIG, read_all, snapshot, tensors, write_dense

torch = pytest.importorskip("torch")


def model_class() -> type:
    from metis_home import MetisHomeForConditionalGeneration

    return MetisHomeForConditionalGeneration


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_dense(tmp_path / "t", ffn_seed=1), write_dense(tmp_path / "n", ffn_seed=2, layout="module")


def test_logits_equal_the_dense_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    upcycle(pair[0], tmp_path / "two", pair[1])

    found = verify(tmp_path / "two", *pair, logits=True)

    assert found.logits == {"thinking": 0.0, "non-thinking": 0.0}


def test_logits_of_a_tied_flat_config_in_bf16(tmp_path: Path) -> None:
    text = dict(CONFIG["text_config"])  # type: ignore[call-overload]
    rope = text.pop("rope_parameters")
    flat = {k: v for k, v in CONFIG.items() if k not in ("text_config", "dtype")} | text
    flat |= {"model_type": "qwen2_5_vl", "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    dense = write_dense(tmp_path / "d", config=flat, tied=True, dtype="BF16")
    upcycle(dense, tmp_path / "two")

    assert verify(tmp_path / "two", dense, logits=True).logits == {"thinking": 0.0}


def test_different_logits_are_an_error(pair: tuple[Path, Path], tmp_path: Path) -> None:
    upcycle(pair[0], tmp_path / "two", pair[1])
    path = tmp_path / "two" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    path.write_text(json.dumps(config))
    (tmp_path / "two" / "metis_home_manifest.json").unlink()

    with pytest.raises(VerificationError, match="logits differ from"):
        verify(tmp_path / "two", pair[0], logits=True)


def test_a_loaded_model_has_exactly_the_files_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    upcycle(pair[0], tmp_path / "two", pair[1], max_shard_size=9000)

    model, info = model_class().from_pretrained(tmp_path / "two", output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.router_trained is False
    # `_from_model_config` in the source's file would have made transformers drop it
    assert model.generation_config.router_threshold == 0.5
    assert model.generation_config.eos_token_id == 2


def test_a_source_without_generation_config_keeps_its_special_tokens(tmp_path: Path) -> None:
    upcycle(write_dense(tmp_path / "d", extras=False), tmp_path / "two")
    split(tmp_path / "two", tmp_path / "back")

    model = model_class().from_pretrained(tmp_path / "two")

    assert model.generation_config.eos_token_id == 2
    assert "generation_config.json" not in snapshot(tmp_path / "back")


def test_split_after_save_pretrained_gives_the_dense_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    upcycle(pair[0], tmp_path / "two", pair[1])
    model = model_class().from_pretrained(tmp_path / "two")
    from transformers import Qwen2_5_VLForConditionalGeneration

    with pytest.raises(Exception, match="metis-home split"):  # no stock class loads it by mistake
        Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "two")
    for number, original in enumerate((True, False)):
        saved, back = tmp_path / f"saved{number}", tmp_path / f"back{number}"
        model.save_pretrained(saved, save_original_format=original)

        split(saved, back, "non-thinking")

        assert read_all(back) == tensors(ffn_seed=2)
        _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(back, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def test_a_bundle_is_links_and_loads_as_one_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    upcycle(pair[0], tmp_path / "two", pair[1])
    link(pair[0], tmp_path / "bundle", pair[1])
    copied = model_class().from_pretrained(tmp_path / "two")

    linked, info = model_class().from_pretrained(tmp_path / "bundle", output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = copied.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in linked.state_dict().items())
    assert linked.generation_config.router_threshold == 0.5
    assert linked.config.name_or_path == str(tmp_path / "bundle")
    for source, folder in zip(pair, ("thinking", "non_thinking"), strict=True):
        branch = tmp_path / "bundle" / "branches" / folder
        assert snapshot(branch) == snapshot(source)  # a complete dense directory
        assert all((branch / name).samefile(source / name) for name in snapshot(source))
    from transformers import Qwen2_5_VLForConditionalGeneration

    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "bundle" / "branches" / "thinking")


def test_a_bundle_outlives_its_sources_and_replaces_only_when_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    link(pair[0], bundle)
    with pytest.raises(OutputError, match="--overwrite"):
        link(pair[1], bundle)
    link(pair[1], bundle, overwrite=True)
    for path in pair[1].iterdir():
        path.unlink()

    places = tensor_places(bundle)

    assert len(places) == 39 + 2 * 6 + 5
    assert model_class().from_pretrained(bundle).config.model_type == "metis_home"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "n", "t"]


def test_a_damaged_bundle_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = link(pair[0], tmp_path / "bundle")
    text = json.loads((bundle / BUNDLE_FILE).read_text())
    text["branches"]["thinking"] = "../../elsewhere"
    (bundle / BUNDLE_FILE).write_text(json.dumps(text))

    with pytest.raises(CheckpointError, match="no bundle of format 1"):
        tensor_places(bundle)
    for use in (lambda: split(bundle, tmp_path / "out"), lambda: verify(bundle)):
        with pytest.raises(CheckpointError, match="is a link bundle"):
            use()


def test_an_average_or_another_file_system_cannot_be_linked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from metis_home.convert.disk import Disk

    class OtherFileSystem(Disk):
        def link(self, source: Path, path: Path) -> None:
            raise OSError(18, "Invalid cross-device link")

    with pytest.raises(CheckpointError, match="average"):
        link(*pair[:1], tmp_path / "bundle", pair[1], shared_from="average")
    with pytest.raises(OutputError, match="different file systems"):
        link(pair[0], tmp_path / "bundle", pair[1], disk=OtherFileSystem())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n", "t"]


def test_the_schema_is_that_of_transformers() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from metis_home.convert.schema import read_shape
    from metis_home.names import to_hub_name

    for tied in (True, False):
        raw = json.loads(json.dumps(dict(CONFIG, tie_word_embeddings=tied)))
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw))
        expected = {to_hub_name(name): tuple(t.shape) for name, t in model.state_dict().items()}
        if tied:
            expected.pop("lm_head.weight")
        assert read_shape(dict(CONFIG, tie_word_embeddings=tied), "x").tensors() == expected


def test_every_config_field_of_transformers_is_carried_and_accepted() -> None:
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as stock

    from metis_home import MetisHomeConfig
    from metis_home.convert.config_files import dense_config, two_branch_config

    config = stock.Qwen2_5_VLConfig().to_dict()
    two, dropped = two_branch_config({**config, "surprise": 1, "_name_or_path": "x"})

    assert dropped == ["surprise"]
    for part in ("text_config", "vision_config"):
        assert set(config[part]) - set(two[part]) <= {"architectures", "_name_or_path"}
    MetisHomeConfig.from_dict(two)
    back = dense_config(two)
    again = stock.Qwen2_5_VLConfig.from_dict(back).text_config.to_dict()
    assert {name: again[name] for name in config["text_config"]} == config["text_config"]
    for kind in (stock.Qwen2_5_VLConfig, stock.Qwen2_5_VLTextConfig, stock.Qwen2_5_VLVisionConfig):
        names = {field.name for field in dataclasses.fields(kind)} - {"text_config", "vision_config"}
        holder = {stock.Qwen2_5_VLTextConfig: "text_config", stock.Qwen2_5_VLVisionConfig: "vision_config"}.get(kind)
        raw = {"text_config": {}, "vision_config": {}}
        (raw[holder] if holder else raw).update(dict.fromkeys(names))
        assert two_branch_config(raw)[1] == [], kind  # type: ignore[arg-type]


def test_the_command_line_converts_splits_and_verifies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = "import sys; from metis_home.cli import main; main(sys.argv[1:])"
        root = Path(__file__).parents[2]
        return subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)

    one, other, out = str(pair[0]), str(pair[1]), str(tmp_path / "two")
    dry = run("convert", one, out, "--non-thinking", other, "--dry-run", "--json")
    plan = json.loads(dry.stdout)
    assert dry.returncode == 0
    assert plan["tensors"]["thinking"] == {"tensors": 6, "bytes": 2 * 3 * 12 * 8 * 4}
    assert plan["tensors"]["router (new)"]["tensors"] == 5
    assert plan["bytes_free"] > plan["bytes_needed"] > 0
    assert not Path(out).exists()

    assert run("convert", one, out, "--non-thinking", other).returncode == 0
    assert json.loads(run("verify", out, "--thinking", one, "--non-thinking", other, "--json").stdout)["compared"]
    assert run("split", out, str(tmp_path / "dense"), "--branch", "both").returncode == 0
    assert snapshot(tmp_path / "dense" / "thinking") == snapshot(pair[0])
    wrong = run("verify", out, "--thinking", other)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: branch thinking")
    assert run("convert", one, out, "--dtype", "int8").returncode == 2
    assert run("convert", one, str(tmp_path / "l"), "--link", "--json").returncode == 0
    failed = run("convert", str(tmp_path / "nowhere"), str(tmp_path / "x"))
    assert failed.returncode == 1
    assert "does not exist" in failed.stderr
