"""A processor that makes few tokens of an image, and images on disk."""

from pathlib import Path

from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from metis_home import MetisHomeProcessor
from tests.processing.tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer


def tiny_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> MetisHomeProcessor:
    """Images of 4 to 64 tokens."""
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28})
    return MetisHomeProcessor(images, tokenizer or tiny_tokenizer())


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and `><` as one token: as with Qwen's vocabulary, tags that touch are tokenized together."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate([*alphabet, "><"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(">", "<")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_image(path: Path, width: int = 56, height: int = 56, **options: object) -> Path:
    """A grey picture of that size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((width, height), 50).convert("RGB").save(path, **options)
    return path


THINKING_ROW = {"prompt": "1 + 1?", "reasoning": "one and one", "answer": "2", "mode": "thinking"}
DIRECT_ROW = {"prompt": "Say 2.", "answer": "2", "mode": "non_thinking"}
