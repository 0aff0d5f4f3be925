"""The two-branch model: the Qwen2.5-VL classes of transformers, and only what differs.

A decoder layer has two FFNs; `branch_ids` says per query (or per token of packed rows) which one runs. One decision
holds for all layers and for the whole answer, because every key and value after layer 0 depends on it.

Shapes: B batch, T tokens, D hidden size, E branches (2).
"""

# No `from __future__ import annotations`: transformers reads `config: MetisHomeConfig` of these classes as a type.
import re
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLAttention,
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2_5_VLTextModel,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import TransformersKwargs

from . import ops
from .branch_mlp import MetisHomeMLP
from .branch_plan import BranchIds, BranchPlan, check_branch_ids, plan_branches
from .cache_branch import branch_for_cache, stamp_cache
from .checkpoint import register_layouts
from .configuration import MetisHomeConfig, MetisHomeTextConfig
from .errors import BranchError, CheckpointError
from .generation import RoutedGenerationMixin
from .link_bundle import is_bundle, load_bundle
from .outputs import MetisHomeCausalLMOutputWithPast, MetisHomeModelOutputWithPast
from .router import MetisHomeRouter, RouterDecision, decide, router_cross_entropy
from .router_layout import router_tensors
from .routing import (
    ask_router,
    branch_per_token,
    check_query_ids,
    check_router_labels,
    prompt_mask,
    routable_mask,
    teacher_forced,
    total_loss,
    without_first_tokens,
)

register_layouts()
_OURS = re.compile(r"\.mlp\.experts\.|(^|\.)router\.")  # parameters that no dense checkpoint has


class MetisHomeDecoderLayer(Qwen2_5_VLDecoderLayer):
    """A Qwen2.5-VL decoder layer whose FFN has two branches."""

    def __init__(self, config: MetisHomeTextConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = MetisHomeMLP(config)

    # `branch_ids` is named, or it would travel on into the attention function.
    def forward(  # type: ignore[misc]  # transformers' TypedDict repeats position_ids
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        branch_ids: BranchIds | BranchPlan | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """As in transformers, with `branch_ids`: an int, (B,), (B, T) or the plan of this forward."""
        if branch_ids is None:
            raise BranchError("a decoder layer needs branch_ids: an int, (B,), (B, T) or a plan; found None")
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.mlp(hidden_states, branch_ids)


class MetisHomePreTrainedModel(Qwen2_5_VLPreTrainedModel):
    """What all classes of the model share: the config class, and how a fresh router is filled."""

    config: MetisHomeConfig
    _no_split_modules = ["MetisHomeDecoderLayer", "Qwen2_5_VLVisionBlock"]
    _keep_in_fp32_modules_strict = ["router"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers; a checkpoint without the weights of both branches and the router is refused.

        Args:
            pretrained_model_name_or_path: a hub id, a directory, or a bundle that `metis-home convert --link` made.
        Raises:
            ConfigError: the directory holds another model, for example a dense one.
            CheckpointError: branch or router weights are missing.
        """
        if is_bundle(pretrained_model_name_or_path):
            return load_bundle(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        lost = sorted(name for name in info["missing_keys"] if _OURS.search(name))
        if lost:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: {len(lost)} weights of the branches or the router are missing, "
                f"the first is {lost[0]!r}. For dense weights, run `metis-home convert DENSE OUT` and load OUT."
            )
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MetisHomeRouter):
            layout = router_tensors(module.norm.weight.numel(), module.hidden.weight.shape[0], module.pooling)
            for name, tensor in module.named_parameters():
                fill = layout[name]
                if fill.std is None:
                    init.constant_(tensor, fill.constant)
                else:
                    init.normal_(tensor, mean=0.0, std=fill.std)


class MetisHomeTextModel(MetisHomePreTrainedModel, Qwen2_5_VLTextModel):
    """The text decoder. Its `branch_ids` is required: only the whole model can route."""

    config: MetisHomeTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": MetisHomeDecoderLayer, "attentions": Qwen2_5_VLAttention}

    def __init__(self, config: MetisHomeTextConfig) -> None:
        # Not Qwen2_5_VLTextModel.__init__: it would build, and initialise, the dense layers first.
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MetisHomeDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self._attn_implementation = config._attn_implementation
        self.norm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.has_sliding_layers = "sliding_attention" in config.layer_types
        self.rotary_emb = Qwen2_5_VLRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        branch_ids: BranchIds | BranchPlan | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """As in transformers, with `branch_ids`: an int, (B,) or (B, T)."""
        if branch_ids is None:
            raise BranchError(
                "the text model cannot route by itself: pass branch_ids (an int, (B,) or (B, T)), "
                "or call MetisHomeForConditionalGeneration, which asks the router"
            )
        if not isinstance(branch_ids, BranchPlan):
            hidden = input_ids if input_ids is not None else inputs_embeds
            if hidden is not None:  # else the stock forward explains what is missing
                branch_ids = plan_branches(branch_ids, hidden.shape[0], hidden.shape[1], hidden.device)
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, branch_ids=branch_ids, **kwargs)


class MetisHomeModel(MetisHomePreTrainedModel, Qwen2_5_VLModel):
    """Vision tower, two-branch text decoder and router, without a head."""

    def __init__(self, config: MetisHomeConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = MetisHomeTextModel._from_config(config.text_config)
        self.router = MetisHomeRouter(config.text_config.hidden_size, config.router_hidden_size, config.router_pooling)
        self.rope_deltas = None
        self.post_init()

    def embed(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
    ) -> Tensor:
        """Return what enters layer 0: token embeddings with image and video features in their places, (B, T, D).

        The arguments are those of `forward`. Features that `mm_encoder_outputs` already holds are not computed again.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = dict(mm_encoder_outputs or {})
        if encoded.get("image") is None and pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        if encoded.get("video") is None and pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
        for place, modality in enumerate(("image", "video")):
            if encoded.get(modality) is not None:
                features = torch.cat(tuple(encoded[modality].pooler_output), dim=0).to(inputs_embeds)
                masks = self.get_placeholder_mask(
                    input_ids, inputs_embeds=inputs_embeds, **{f"{modality}_features": features}
                )
                inputs_embeds = inputs_embeds.masked_scatter(masks[place], features)
        return inputs_embeds

    @can_return_tuple
    def forward(  # type: ignore[misc]  # transformers' TypedDict repeats position_ids
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        branch_ids: BranchIds | None = None,
        router_labels: Tensor | None = None,
        router_mask: Tensor | None = None,
        query_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetisHomeModelOutputWithPast:
        """As in transformers, with the routing arguments of `MetisHomeForConditionalGeneration.forward`, and

        Args:
            router_mask: (B, T), true at the tokens that the router may read; default: `attention_mask`, or for packed
                rows all tokens of a query.
        """
        embeds = self.embed(
            input_ids,
            inputs_embeds,
            pixel_values,
            pixel_values_videos,
            image_grid_thw,
            video_grid_thw,
            mm_encoder_outputs,
        )
        batch, tokens = embeds.shape[:2]
        if branch_ids is not None:
            branch_ids = check_branch_ids(branch_ids, batch, tokens)
        if query_ids is not None:
            if past_key_values is not None:
                raise BranchError("packed rows (query_ids) cannot continue a cache: leave past_key_values out")
            check_query_ids(query_ids, batch, tokens, router_labels, attention_mask, position_ids)
            use_cache = False  # with a cache, transformers does not look for packed rows and lets them see each other
        branch_ids = branch_for_cache(past_key_values, branch_ids)
        router_logits = None
        if branch_ids is None or router_labels is not None:
            if router_mask is None and query_ids is None:
                router_mask = routable_mask(batch, tokens, attention_mask, position_ids, kwargs)
            backend = ops.check_backend(self.config.text_config.ffn_implementation)
            decision = ask_router(self.router, embeds, router_mask, query_ids, router_labels, backend)
            router_logits = decision.logits
            if branch_ids is None:
                branch_ids = teacher_forced(decision, router_labels)
                if query_ids is not None:
                    branch_ids = branch_per_token(branch_ids, query_ids)

        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            use_cache=use_cache,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            branch_ids=branch_ids,
            return_dict=True,
            **kwargs,
        )
        stamp_cache(outputs.past_key_values, branch_ids)
        return MetisHomeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
            branch_ids=branch_ids,
        )


class MetisHomeForConditionalGeneration(
    RoutedGenerationMixin, MetisHomePreTrainedModel, Qwen2_5_VLForConditionalGeneration
):
    """The drop-in model: answers with one of two branches, chosen per query."""

    config: MetisHomeConfig

    def __init__(self, config: MetisHomeConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = MetisHomeModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(  # type: ignore[misc]  # transformers' TypedDict repeats position_ids
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        branch_ids: BranchIds | None = None,
        router_labels: Tensor | None = None,
        query_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MetisHomeCausalLMOutputWithPast:
        """As `Qwen2_5_VLForConditionalGeneration.forward`, and

        Args:
            branch_ids: the branch of the batch (int), of each query (B,), or of each token of packed rows (B, T).
                None: continue the cache's branch; else take `router_labels`; else ask the router (threshold 0.5).
            router_labels: (B,), the branch that each query should have, -100 where unknown. Rows are then sent to that
                branch (teacher forcing, unless branch_ids says otherwise) and the router's loss is added.
                The router reads prompts only: with `labels`, the tokens before the first that is supervised.
            query_ids: (B, T), for packed rows: the query of each token, -1 at padding. Queries are numbered 0 to S - 1
                over the batch; router_labels and router_logits are then per query, (S,) and (S, 2). Needs position_ids
                (4, B, T) that start again at each query, and no attention_mask. See `PackingCollator`.
        Returns:
            `MetisHomeCausalLMOutputWithPast`.
        Raises:
            BranchError: branch_ids, router_labels or query_ids that name no branch or do not fit the batch; packed rows
                without branch_ids and query_ids. CacheBranchError: a cache of another branch.
        Source: Metis-HOME, L_total = L_prediction + L_router.
        """
        router_mask = None
        hidden = input_ids if input_ids is not None else inputs_embeds
        may_route = branch_ids is None and past_key_values is None
        if router_labels is not None:
            if hidden is None:
                raise BranchError("router_labels need a prompt: pass input_ids or inputs_embeds; found neither")
            check_router_labels(router_labels, hidden.shape[0] if query_ids is None else None)
            router_labels = router_labels.to(hidden.device)
        if hidden is not None and query_ids is not None:
            check_query_ids(query_ids, hidden.shape[0], hidden.shape[1], router_labels, attention_mask, position_ids)
        if hidden is not None and (router_labels is not None or (labels is not None and may_route)):
            if query_ids is None:
                router_mask = routable_mask(hidden.shape[0], hidden.shape[1], attention_mask, position_ids, kwargs)
            if labels is not None:
                router_mask = prompt_mask(labels, router_mask, query_ids)
        if labels is not None and query_ids is not None:
            labels = without_first_tokens(labels, query_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            mm_encoder_outputs=mm_encoder_outputs,
            branch_ids=branch_ids,
            router_labels=router_labels,
            router_mask=router_mask,
            query_ids=query_ids,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep, :])

        lm_loss = router_loss = None
        if labels is not None:
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        if router_labels is not None:
            router_loss = router_cross_entropy(outputs.router_logits, router_labels)
        loss = lm_loss if router_loss is None else total_loss(lm_loss, router_loss, self.config.router_loss_weight)
        return MetisHomeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            branch_ids=outputs.branch_ids,
            lm_loss=lm_loss,
            router_loss=router_loss,
        )

    def route(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        router_threshold: float | None = None,
        query_ids: Tensor | None = None,
        **ignored,
    ) -> RouterDecision:
        """Ask the router about each query without answering: embeddings, vision tower and router run, no decoder layer.

        Args:
            input_ids, attention_mask, ...: the prompts, as for `forward` and `generate`; further inputs of a processor
                (`mm_token_type_ids`, ...) are taken and not needed.
            router_threshold: think where P(thinking) >= this; default: the generation config's, else 0.5.
            query_ids: (B, T), for packed prompts: the query of each token, -1 at padding; decisions are per query.
        Raises:
            BranchError: a threshold outside [0, 1], or rows that are no single query.
        """
        embeds = self.model.embed(
            input_ids,
            inputs_embeds,
            pixel_values,
            pixel_values_videos,
            image_grid_thw,
            video_grid_thw,
            mm_encoder_outputs,
        )
        batch, tokens = embeds.shape[:2]
        mask = None
        if query_ids is None:
            mask = routable_mask(batch, tokens, attention_mask, ignored.get("position_ids"), ignored)
        backend = ops.check_backend(self.config.text_config.ffn_implementation)
        decision = ask_router(self.model.router, embeds, mask, query_ids, None, backend)
        return decide(decision.logits, self._router_threshold(router_threshold))
