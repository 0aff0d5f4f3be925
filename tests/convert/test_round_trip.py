"""split(upcycle(a, b)) is a and b, bit for bit, whatever the shards, their order and the key layout."""

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metis_home.convert import split, upcycle, verify
from metis_home.errors import CheckpointError, VerificationError
from tests.convert.pico import CONFIG, module_name, read_all, shapes, snapshot, tensors, write_dense


@st.composite
def partitions(draw: st.DrawFn, tied: bool) -> list[list[str]] | None:
    """None for a single file, or shards in any order with any content."""
    if draw(st.booleans()):
        return None
    names = draw(st.permutations(sorted(shapes(tied=tied))))
    cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1), max_size=5)))
    return [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> dict:
    tied = draw(st.booleans())
    return {
        "tied": tied,
        "dtype": draw(st.sampled_from(["F32", "BF16", "F16"])),
        "layouts": (draw(st.sampled_from(["hub", "module"])), draw(st.sampled_from(["hub", "module"]))),
        "groups": (draw(partitions(tied)), draw(partitions(tied))),
        "shard_bytes": draw(st.integers(1, 40_000)),
        "two": draw(st.booleans()),
    }


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_split_after_upcycle_is_the_identity(case: dict) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        how = {"tied": case["tied"], "dtype": case["dtype"]}
        contents = [tensors(ffn_seed=1, **how), tensors(ffn_seed=2, **how)]
        a, b = (
            write_dense(root / name, content, groups=groups, layout=layout)
            for name, content, groups, layout in zip("ab", contents, case["groups"], case["layouts"], strict=True)
        )

        upcycle(a, root / "two", b if case["two"] else None, max_shard_size=case["shard_bytes"])
        split(root / "two", root / "a2", "thinking")
        split(root / "two", root / "b2", "non-thinking", layout="source")

        assert read_all(root / "a2") == contents[0]  # hub names, the same bytes
        expected_b = b if case["two"] else a
        assert snapshot(root / "b2") == snapshot(expected_b)  # every file of the directory, byte for byte
        if case["layouts"][0] == "hub":
            assert snapshot(root / "a2") == snapshot(a)
        verify(root / "two", a, expected_b)
    finally:
        shutil.rmtree(root)


def test_each_branch_gets_the_ffn_of_its_source_and_the_router_is_new(tmp_path: Path) -> None:
    thinking, non_thinking = tensors(ffn_seed=1), tensors(ffn_seed=2)
    upcycle(
        write_dense(tmp_path / "t", thinking, layout="module"),
        tmp_path / "two",
        write_dense(tmp_path / "n", non_thinking),
    )

    two = read_all(tmp_path / "two")

    name = "model.layers.1.mlp.up_proj.weight"
    assert two["model.layers.1.mlp.experts.1.up_proj.weight"] == thinking[name]
    assert two["model.layers.1.mlp.experts.0.up_proj.weight"] == non_thinking[name]
    assert two["visual.blocks.0.mlp.up_proj.weight"] == thinking["visual.blocks.0.mlp.up_proj.weight"]
    assert two["model.router.norm.weight"][0] == "F32"
    assert not [name for name in two if name.startswith("model.language_model.")]
    assert len(two) == len(thinking) + 6 + 5


def test_the_router_depends_on_the_seed_only(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "d")
    upcycle(dense, tmp_path / "one", seed=1)
    upcycle(dense, tmp_path / "again", seed=1, max_shard_size=3000)
    upcycle(dense, tmp_path / "other", seed=2)

    one, again, other = (read_all(tmp_path / name)["model.router.hidden.weight"] for name in ("one", "again", "other"))

    assert one == again
    assert one != other


def test_a_redundant_tied_head_is_left_out_and_given_back(tmp_path: Path) -> None:
    content = tensors(tied=True)
    content["lm_head.weight"] = content["model.embed_tokens.weight"]
    config = dict(CONFIG, tie_word_embeddings=True)
    dense = write_dense(tmp_path / "d", content, config=config)

    upcycle(dense, tmp_path / "two")
    split(tmp_path / "two", tmp_path / "back")

    assert "lm_head.weight" not in read_all(tmp_path / "two")
    assert snapshot(tmp_path / "back") == snapshot(dense)


def test_after_training_split_translates_instead_of_restoring(tmp_path: Path) -> None:
    from tests.convert.pico import read_safetensors, write_safetensors

    dense = write_dense(tmp_path / "d")
    upcycle(dense, tmp_path / "two")
    two = tmp_path / "two"
    trained = read_safetensors(two / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    dtype, shape, data = trained[name]
    trained[name] = (dtype, shape, bytes(len(data)))
    (two / "metis_home_manifest.json").unlink()  # save_pretrained into a new directory writes none
    (two / "model.safetensors").unlink()
    write_safetensors(
        two / "model.safetensors", {module_name(n) if "router" not in n else n: t for n, t in trained.items()}
    )

    split(two, tmp_path / "back")

    back = snapshot(tmp_path / "back")
    assert read_all(tmp_path / "back")["model.layers.0.mlp.up_proj.weight"][2] == bytes(len(data))
    assert b'"qwen2_5_vl"' in back["config.json"]
    assert b"router" not in back["config.json"] + back["generation_config.json"]
    assert b"Qwen2_5_VLProcessor" in back["preprocessor_config.json"]


def test_verify_names_the_tensor_that_differs(tmp_path: Path) -> None:
    a, b = write_dense(tmp_path / "a", ffn_seed=1), write_dense(tmp_path / "b", ffn_seed=2)
    upcycle(a, tmp_path / "two", b)

    with pytest.raises(VerificationError, match=r"branch thinking: 'model\.layers\.0\.mlp.* element 0"):
        verify(tmp_path / "two", b)


def test_verify_notices_one_flipped_bit(tmp_path: Path) -> None:
    upcycle(write_dense(tmp_path / "a"), tmp_path / "two")
    path = tmp_path / "two" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(VerificationError, match="first difference in"):
        verify(tmp_path / "two")


def test_splitting_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="one branch only"):
        split(write_dense(tmp_path / "a"), tmp_path / "out")


def test_converting_imports_no_torch() -> None:
    import subprocess

    code = (
        "import sys, tempfile, pathlib; from tests.convert.pico import write_dense;"
        "from metis_home.convert import upcycle, split, verify; r = pathlib.Path(tempfile.mkdtemp());"
        "d = write_dense(r / 'd'); upcycle(d, r / 't', dtype='bf16'); split(r / 't', r / 's'); verify(r / 't', d);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
