"""`Encoder`: records to token ids, labels and pixels; prompts are never truncated.

Shapes: T tokens; pixel values are (patches, D).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metis_home.errors import DataError
from metis_home.media import Message, image_size, load_message_images
from metis_home.prompts import SYSTEM_PROMPT, thinking_prefix
from metis_home.responses import END_TOKENS

from .conversation import image_sources
from .formats import split_prefix
from .records import Record

if TYPE_CHECKING:
    from torch import Tensor

    from metis_home.processing import MetisHomeProcessor

logger = logging.getLogger(__name__)
IGNORE = -100


@dataclass(slots=True, kw_only=True)
class Example:
    """One row as a model reads it, unpadded. Its length is its number of tokens."""

    input_ids: list[int]
    labels: list[int]
    """The token ids of the response, -100 at the prompt."""
    mm_token_type_ids: list[int]
    """0 text, 1 image."""
    pixel_values: "Tensor | None"
    """(patches of all images, D) float32, None without images."""
    image_grid_thw: "Tensor | None"
    """(images, 3) int64, in patches; None without images."""
    router_label: int
    """The branch that should answer, or -100."""
    record_index: int
    source: str

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """How many tokens a record becomes."""

    prompt: int
    """With the image tokens."""
    images: int
    response: int
    """With the end token; 0 without a response."""

    @property
    def total(self) -> int:
        """Prompt and response."""
        return self.prompt + self.response


class Encoder:
    """Records to examples, with a processor's chat template and image processor.

    Args:
        processor: a `MetisHomeProcessor` (it serves dense Qwen2.5-VL models too).
        system_prompt: put before conversations that have no system message; None leaves that to the chat template.
        max_length: most tokens of an example.
    """

    def __init__(
        self,
        processor: "MetisHomeProcessor",
        *,
        system_prompt: str | None = SYSTEM_PROMPT,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.end_token_id = int(self.tokenizer.convert_tokens_to_ids(END_TOKENS[0]))

    def prompt(self, record: Record, enable_thinking: bool | None = None) -> Example:
        """The tokens that are to be answered; all labels are -100.

        Args:
            enable_thinking: True or False ends the prompt with the prefix of that branch; None lets the router choose.
        Raises:
            DataError: more than `max_length` tokens. ProcessorError: an image cannot be used.
        """
        return self._example(record, self.tokens(thinking_prefix(enable_thinking)), [])

    def example(self, record: Record) -> Example:
        """Prompt and response; the response and its end token are supervised, its prefix too.

        Raises:
            DataError: there is no response, or more than `max_length` tokens. ProcessorError: an image cannot be used.
        """
        return self._example(record, [], self.response_ids(record))

    def response_ids(self, record: Record) -> list[int]:
        """Token ids of the response and the end token.

        The prefix that forces a branch is tokenized by itself: a model whose prompt ends with it continues exactly the
        trained sequence.

        Raises:
            DataError: the record has no response.
        """
        if record.response is None:
            raise DataError(
                f"row {record.index} ({record.id}) has no response to train. Give it a response, reasoning and answer, "
                "or mode non_thinking and an answer."
            )
        pieces = split_prefix(record.response, record.mode)
        return [token for piece in pieces for token in self.tokens(piece)] + [self.end_token_id]

    def count(self, record: Record) -> TokenCount:
        """Count tokens without opening a pixel: image tokens follow from the sizes in the files' headers.

        Raises:
            ProcessorError: an image cannot be found or read.
        """
        text = self.tokens(self.prompt_text(record))
        images = [self.image_tokens(source) for source in image_sources(record.messages)]
        return TokenCount(
            prompt=len(text) - len(images) + sum(images),
            images=sum(images),
            response=0 if record.response is None else len(self.response_ids(record)),
        )

    def lengths(self, records: Sequence[Record]) -> list[int]:
        """Tokens of the example of each record (of its prompt, where it has no response)."""
        return [self.count(record).total for record in records]

    def image_tokens(self, source: object) -> int:
        """Tokens that an image becomes, from its size."""
        image_processor = self.processor.image_processor
        # Turning an image on its side (EXIF) swaps the two and changes nothing: the count is symmetric.
        width, height = image_size(source)  # type: ignore[arg-type]
        patches = image_processor.get_number_of_image_patches(height, width, {})
        return patches // image_processor.merge_size**2

    def prompt_text(self, record: Record) -> str:
        """The conversation as the chat template writes it, with one placeholder per image."""
        return self.processor.apply_chat_template(self.messages(record), tokenize=False, add_generation_prompt=True)

    def messages(self, record: Record) -> list[Message]:
        """The record's messages, with the system prompt before them where they have none."""
        if self.system_prompt is None or record.messages[0]["role"] == "system":
            return record.messages
        return [{"role": "system", "content": self.system_prompt}, *record.messages]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a piece of text, nothing added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _example(self, record: Record, prefix: list[int], response: list[int]) -> Example:
        opened = load_message_images(record.messages, allow_remote=self.processor.allow_remote_media)
        images = list(image_sources(opened))
        inputs = self.processor(text=[self.prompt_text(record)], images=images or None, return_tensors="pt")
        prompt = inputs["input_ids"][0].tolist() + prefix
        input_ids = prompt + response
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise DataError(
                f"row {record.index} ({record.id}) has {len(input_ids)} tokens ({len(prompt)} of the prompt), and "
                f"max_length is {self.max_length}. Prompts are not truncated: raise max_length, lower max_pixels, or "
                "leave the row out."
            )
        image_token_id = self.processor.image_token_id
        types = [int(token == image_token_id) for token in prompt] + [0] * len(response)
        return Example(
            input_ids=input_ids,
            labels=[IGNORE] * len(prompt) + response,
            mm_token_type_ids=types,
            pixel_values=inputs.get("pixel_values"),
            image_grid_thw=inputs.get("image_grid_thw"),
            router_label=IGNORE if record.mode is None else int(record.mode),
            record_index=record.index,
            source=record.source,
        )


def fitting_records(records: Sequence[Record], encoder: Encoder) -> list[Record]:
    """The records that fit into `encoder.max_length`; how many were left out is logged as a warning."""
    if encoder.max_length is None:
        return list(records)
    kept = [record for record in records if encoder.count(record).total <= encoder.max_length]
    if len(kept) < len(records):
        logger.warning(
            "left out %d of %d rows: more than %d tokens", len(records) - len(kept), len(records), encoder.max_length
        )
    return kept
