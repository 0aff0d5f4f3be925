"""`MetisHomeProcessor`: messages, images and videos to model inputs, and answers to their parts.

Qwen2.5-VL's processor with four things added: it also works without torchvision (images only), its chat template
knows `enable_thinking`, it takes answers apart, and media from messages are checked before they are opened.
"""

# No `from __future__ import annotations`: this file is exported as remote code, and transformers reads signatures.
import importlib
import os
from collections.abc import Callable

from PIL import Image
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from .errors import ProcessorError
from .media import check_video_source, load_image, load_message_images
from .prompts import MAX_PIXELS, MIN_PIXELS, add_thinking_switch
from .responses import END_TOKENS, ParsedResponse, parse_response, response_template

try:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    if is_torchvision_available():
        importlib.import_module("torchvision.transforms.v2")
except (ImportError, RuntimeError) as error:
    # A torchvision built for another torch is worse than none: every Qwen-VL processor fails with it.
    raise ImportError(
        f"the Qwen2.5-VL processor cannot be imported: {error}. If torchvision is installed, it must be built for "
        "this torch; otherwise `pip uninstall torchvision` (images work without it, videos do not)."
    ) from error

READS_VIDEO: bool = is_torchvision_available()
_DEFAULT_VIDEO_PROCESSOR = "Qwen2VLVideoProcessor"
_HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
_NOT_VIDEO_SETTINGS = ("auto_map", "image_processor_type", "feature_extractor_type", "processor_class")


class MetisHomeProcessor(Qwen2_5_VLProcessor):
    """Tokenizer, image processor and, where torchvision works, video processor of a two-branch model.

    Attributes:
        allow_remote_media: fetch http and https addresses found in messages. Off: a message may name any host.
    """

    allow_remote_media: bool = False
    _video_settings: dict[str, object]

    # transformers reads the parts of a processor from the parameter names of `__init__`, and a video processor cannot
    # be built without torchvision: so it is named only where it works.
    if READS_VIDEO:

        def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
            template = self._prepare(tokenizer, chat_template)
            if video_processor is None:  # so that what works without torchvision also works with it
                from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

                video_processor = Qwen2VLVideoProcessor()
            ProcessorMixin.__init__(self, image_processor, tokenizer, video_processor, chat_template=template)

    else:

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):  # type: ignore[misc]
            template = self._prepare(tokenizer, chat_template)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a directory or a hub id.

        Args:
            min_pixels, max_pixels: smallest and largest image area, in pixels. Without them the directory's limits
                hold, and where it has none, Metis-RISE's (128 and 16384 visual tokens).
        Raises:
            OSError: there is no processor there.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        source = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        limits = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}  # transformers' words for areas
        for stated in _stated_limits({**get_image_processor_config(source, **options), **kwargs}):
            del limits[stated]
        processor.image_processor.size = type(processor.image_processor.size)(
            **{**dict(processor.image_processor.size), **limits}
        )
        if not READS_VIDEO:
            settings = get_video_processor_config(source, **options)
            processor._video_settings = {k: v for k, v in settings.items() if k not in _NOT_VIDEO_SETTINGS}
        return processor

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Make model inputs: input_ids, attention_mask, mm_token_type_ids, pixel_values, image_grid_thw, ...

        Args:
            images: PIL images, arrays, paths or `data:` URLs; one, a list, or a list per text (None or empty for a text
                without images).
            text: prompts with one image placeholder per image; usually from `apply_chat_template`.
            videos: paths, frames or arrays; needs torchvision.
        Raises:
            ProcessorError: an image or video cannot be used.
        """
        if images is not None:
            images = self._open_images(_flat(images))
        if videos is not None:
            self._check_videos(videos)
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, *, enable_thinking: bool | None = None, **kwargs
    ):
        """Render a conversation, or tokenize it with its media (`tokenize=True, return_dict=True`).

        Args:
            enable_thinking: None adds nothing, so the router decides; False adds `<think></think>` and True
                `<think>` after the generation prompt, and so to nothing else.
        Raises:
            ProcessorError: an image or video cannot be used, or `enable_thinking` is none of the three.
        """
        if not (enable_thinking is None or isinstance(enable_thinking, bool)):
            raise ProcessorError(f"enable_thinking is {enable_thinking!r}. Expected None (router), True or False.")
        if enable_thinking is not None and kwargs.get("continue_final_message"):
            raise ProcessorError(
                "enable_thinking writes after the generation prompt, and continue_final_message has none. "
                "Write <think> into the message that is continued instead."
            )
        if not conversation:
            raise ProcessorError('the conversation is empty. Expected [{"role": "user", "content": ...}].')
        if kwargs.get("tokenize"):
            conversation = self._open_message_images(conversation)
        return super().apply_chat_template(
            conversation, chat_template=self._template(chat_template), enable_thinking=enable_thinking, **kwargs
        )

    def parse_response(
        self, response, schema: dict | None = None, *, prefix=None, tools: list[dict | Callable] | None = None
    ) -> ParsedResponse | list[ParsedResponse]:
        """Split an answer into {"reasoning_content": str, "content": str}, see `responses.parse_response`.

        Args:
            response: text or token ids, one answer or a batch.
            schema: a response template; transformers' own parser is used with it.
            prefix: the prompt, or one per answer; needed only to recognise a thought that the template opened and
                the token limit cut.
        Raises:
            ProcessorError: there are neither one nor as many prefixes as answers.
        """
        if schema is not None:
            return super().parse_response(response, schema, prefix="" if prefix is None else prefix, tools=tools)
        texts, is_batch = self._texts(response)
        prefixes, _ = self._texts("" if prefix is None else prefix)
        if len(prefixes) == 1:
            prefixes = prefixes * len(texts)
        if len(prefixes) != len(texts):
            raise ProcessorError(f"{len(texts)} answers came with {len(prefixes)} prefixes. Expected 1 or as many.")
        ends = _end_tokens(self.tokenizer)
        parsed = [
            parse_response(text, prefix=start, end_tokens=ends) for text, start in zip(texts, prefixes, strict=True)
        ]
        return parsed if is_batch else parsed[0]

    def to_dict(self) -> dict[str, object]:
        """The content of `processor_config.json`; video settings survive a machine without torchvision."""
        settings = super().to_dict()
        if not READS_VIDEO:
            default = {"video_processor_type": _DEFAULT_VIDEO_PROCESSOR}
            settings["video_processor"] = {**default, **getattr(self, "_video_settings", {})}
        return settings

    def _prepare(self, tokenizer, chat_template):
        """Find the media tokens, teach template and tokenizer our format, and return the template."""
        if tokenizer is None:
            raise ProcessorError("a MetisHomeProcessor needs a tokenizer; found None. Load one with AutoTokenizer.")
        for kind in ("image", "video"):
            token = getattr(tokenizer, f"{kind}_token", None) or f"<|{kind}_pad|>"
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id is None or token_id == tokenizer.unk_token_id:
                raise ProcessorError(
                    f"the tokenizer has no token {token!r}, which holds the place of {kind}s in a prompt. "
                    "Is it the tokenizer of a Qwen2.5-VL model?"
                )
            setattr(self, f"{kind}_token", token)
            setattr(self, f"{kind}_token_id", token_id)
        template = _with_switch(tokenizer.chat_template if chat_template is None else chat_template)
        # On the tokenizer too: it is saved beside the processor, and pipelines and servers load it alone.
        tokenizer.chat_template = template
        if getattr(tokenizer, "response_template", None) is None:
            tokenizer.response_template = response_template(_end_tokens(tokenizer))
        return template

    def _template(self, name):
        """The template to render: the default, a named one, or the text itself; always with the thinking switch."""
        templates = self.chat_template
        if isinstance(templates, dict):
            template = templates.get(name or "default", name)
        else:
            template = name or templates
        return _with_switch(template)

    def _open_images(self, images):
        if isinstance(images, (list, tuple)):
            return [self._open_images(image) for image in images]
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            return load_image(images, allow_remote=self.allow_remote_media)
        return images  # an array, a tensor, or None

    def _open_message_images(self, conversation):
        if isinstance(conversation[0], (list, tuple)):
            return [self._open_message_images(single) for single in conversation]
        return load_message_images(conversation, allow_remote=self.allow_remote_media)

    def _check_videos(self, videos):
        if not READS_VIDEO:
            raise ProcessorError(
                "a video was passed, and reading videos needs torchvision, which is not installed. Install the build "
                "that fits this torch (`pip install 'metis_home[vision]'`), or pass frames as images."
            )
        if isinstance(videos, (list, tuple)):
            for video in videos:
                self._check_videos(video)
        else:
            check_video_source(videos, allow_remote=self.allow_remote_media)

    def _texts(self, response):
        """Decode token ids where needed; return the texts and whether they came as a batch."""
        if isinstance(response, str):
            return [response], False
        rows = response.tolist() if hasattr(response, "tolist") else list(response)
        if not rows:
            return [], True
        if isinstance(rows[0], int):
            return [self.tokenizer.decode(rows)], False
        return [row if isinstance(row, str) else self.tokenizer.decode(row) for row in rows], True


def _end_tokens(tokenizer):
    return tuple(dict.fromkeys(t for t in (*END_TOKENS, tokenizer.eos_token, tokenizer.pad_token) if t))


def _flat(images):
    """Images in the order of their placeholders; transformers cannot read None, which TRL writes for text-only rows."""
    if not isinstance(images, (list, tuple)) or not any(
        row is None or isinstance(row, (list, tuple)) for row in images
    ):
        return images
    rows = [row if isinstance(row, (list, tuple)) else [] if row is None else [row] for row in images]
    return [image for row in rows for image in row] or None


def _with_switch(template):
    if isinstance(template, dict):
        return {name: add_thinking_switch(text) for name, text in template.items()}
    return None if template is None else add_thinking_switch(template)


def _stated_limits(settings):
    """Which of the two pixel limits a directory or a caller states, in transformers' words."""
    size = settings.get("size") or {}
    aliases = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
    return [
        name
        for name, alias in aliases.items()
        if settings.get(alias) is not None or size.get(name) is not None or size.get(alias) is not None
    ]
