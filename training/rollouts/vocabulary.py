"""Which tokens end an answer, and which must never be sampled."""

from typing import TYPE_CHECKING

from metis_home.errors import EngineError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

_PLACEHOLDERS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_VISION_WORDS = ("<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>")
_ENDS = ("<|im_end|>", "<|endoftext|>")


def end_token_ids(
    tokenizer: "PreTrainedTokenizerBase", generation_config: "GenerationConfig | None" = None
) -> tuple[int, ...]:
    """Tokens that end an answer: the end of a turn, the end of a text, the tokenizer's own and the model's.

    Raises:
        EngineError: there is none.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    own = list(configured) if isinstance(configured, list | tuple) else [configured]
    found = [*_known_ids(tokenizer, _ENDS), *(end for end in [tokenizer.eos_token_id, *own] if end is not None)]
    if not found:
        raise EngineError(f"the tokenizer has no end token: expected {' or '.join(_ENDS)}, or an eos_token")
    return tuple(dict.fromkeys(found))


def unsampled_token_ids(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Tokens that stand for pixels. A policy that writes one has a placeholder more than images, and crashes."""
    configured = [getattr(config, name, None) for name in _PLACEHOLDERS]
    found = [token for token in configured if token is not None]
    return tuple(sorted({*found, *_known_ids(tokenizer, _VISION_WORDS)}))


def _known_ids(tokenizer: "PreTrainedTokenizerBase", words: tuple[str, ...]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[word] for word in words if word in vocabulary]
