"""The neighbours: pipelines, adapters on one branch, and models exported with their code."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from metis_home.errors import UnsupportedError
from metis_home.export import export_with_code
from tests.model.pico import MIX, TEXT_ROWS, collate, pico_model
from tests.processing.tiny import write_model

ONE_BRANCH = r".*language_model\.layers\.\d+\.mlp\.experts\.1\.(gate|up|down)_proj"


@pytest.fixture(scope="module")
def answering_directory(tmp_path_factory):
    """A tiny two-branch model with a processor."""
    return write_model(tmp_path_factory.mktemp("answering"))


class TestAdapters:
    def test_lora_on_one_branch_leaves_the_other_alone(self, model, tmp_path):
        config = LoraConfig(r=4, target_modules=ONE_BRANCH, init_lora_weights=False)
        adapted = get_peft_model(pico_model(), config)
        batch = collate(TEXT_ROWS)

        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert len(trained) == 2 * 3 * 2  # layers x linears x (A, B)
        assert all(".mlp.experts.1." in name for name in trained)
        with torch.no_grad():
            assert torch.equal(adapted(**batch, branch_ids=0).logits, model(**batch, branch_ids=0).logits)
            changed = adapted(**batch, branch_ids=1).logits
            assert not torch.equal(changed, model(**batch, branch_ids=1).logits)
        assert adapted.generate(**batch, thinking=[True, False, True, None], max_new_tokens=2).shape[0] == 4

        adapted.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(pico_model(), tmp_path)
        with torch.no_grad():
            assert torch.equal(again(**batch, branch_ids=1).logits, changed)
            merged = again.merge_and_unload()
            torch.testing.assert_close(merged(**batch, branch_ids=1).logits, changed, atol=1e-4, rtol=1e-4)
            assert torch.equal(merged(**batch, branch_ids=0).logits, model(**batch, branch_ids=0).logits)

    def test_a_mixed_batch_trains_only_the_adapted_branch(self):
        adapted = get_peft_model(pico_model(), LoraConfig(r=2, target_modules=ONE_BRANCH)).train()
        batch = collate(TEXT_ROWS)

        adapted(**batch, labels=batch["input_ids"], branch_ids=torch.tensor(MIX)).loss.backward()

        gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())
        assert any(gradient.any() for gradient in gradients.values())


class TestPipelines:
    def test_image_text_to_text(self, answering_directory):
        from PIL import Image
        from transformers import pipeline

        pipe = pipeline("image-text-to-text", model=str(answering_directory), device="cpu")
        with torch.no_grad():
            for layer in pipe.model.model.language_model.layers:  # make the branches answer differently
                layer.mlp.experts[1].down_proj.weight.mul_(-30)
        blocks = [{"type": "image", "image": Image.new("RGB", (56, 56), "red")}, {"type": "text", "text": "What?"}]
        messages = [{"role": "user", "content": blocks}]
        answers = {
            thinking: pipe(
                text=messages,
                generate_kwargs={"thinking": thinking, "do_sample": False},
                max_new_tokens=6,
                return_full_text=False,
            )[0]["generated_text"]
            for thinking in (True, False, "auto")
        }

        assert type(pipe.model).__name__ == "MetisHomeForConditionalGeneration"
        assert type(pipe.processor).__name__ == "MetisHomeProcessor"
        assert answers[True] != answers[False]
        assert answers["auto"] in (answers[True], answers[False])


WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "metis_home":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Missing())
import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

directory, expected = sys.argv[1], torch.load(sys.argv[2])
inputs = expected["inputs"]
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model, info = auto.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        assert torch.equal(model(**inputs, branch_ids=expected["branch_ids"]).logits, expected["logits"])
    assert torch.equal(model.route(**inputs).logits, expected["router_logits"])
    tokens = model.generate(**inputs, thinking=[True, False], max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, expected["tokens"])
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
assert processor.parse_response("<think>a</think><answer>b</answer>") == {"reasoning_content": "a", "content": "b"}
print("loaded without the package")
"""


class TestExport:
    def test_it_loads_where_the_package_is_not_installed(self, answering_directory, tmp_path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(answering_directory)
        processor = AutoProcessor.from_pretrained(answering_directory)
        inputs = dict(processor(text=["one", "two three"], padding=True, return_tensors="pt"))
        ids = torch.tensor([1, 0])
        with torch.no_grad():
            expected = {
                "inputs": inputs,
                "branch_ids": ids,
                "logits": model(**inputs, branch_ids=ids).logits,
                "router_logits": model.route(**inputs).logits,
                "tokens": model.generate(**inputs, branch_ids=ids, max_new_tokens=3, do_sample=False),
            }
        torch.save(expected, tmp_path / "expected.pt")

        export_with_code(model, tmp_path / "exported", processor)

        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "exported"), str(tmp_path / "expected.pt")],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": ""},
        )
        assert result.returncode == 0, result.stderr
        assert "loaded without the package" in result.stdout

    def test_exporting_changes_nothing_in_this_process(self, model, tmp_path):
        export_with_code(model, tmp_path)

        assert not type(model).is_remote_code()
        loaded = type(model).from_pretrained(tmp_path)
        assert type(loaded) is type(model)

    def test_wrapped_models_are_refused(self, model, tmp_path):
        wrapped = get_peft_model(pico_model(), LoraConfig(r=2, target_modules=ONE_BRANCH))

        with pytest.raises(UnsupportedError, match="merge_and_unload"):
            export_with_code(wrapped, tmp_path)
        assert not list(tmp_path.iterdir())


def test_the_router_loop_of_the_docs_learns_and_survives_saving(tmp_path):
    """docs/model.md, "Training forward"."""
    from metis_home.router import router_cross_entropy

    model = pico_model()
    batch, router_labels = collate(TEXT_ROWS), torch.tensor(MIX)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.requires_grad_(False)
    model.model.router.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.router.parameters(), lr=1e-2)
    for _ in range(60):
        router_cross_entropy(model.route(**batch).logits, router_labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)

    assert type(model).from_pretrained(tmp_path).route(**batch).branch_ids.tolist() == MIX
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".router." in name for name in changed)
