"""`MetisRLConfig`: everything that says how Stage-RL trains, beside what every Trainer of transformers takes."""

# No `from __future__ import annotations`: command line parsers read the types of these fields.
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...errors import RecipeError
from ...prompts import SYSTEM_PROMPT
from ..freezing import trainable_sets
from .ranges import check_ranges


@dataclass
class MetisRLConfig(TrainingArguments):
    """Settings of Stage-RL: all fields of `TrainingArguments`, and those below.

    Metis-RISE publishes a GRPO variant without KL, with DAPO's and VAPO's tricks, and a binary rule-verified reward
    with a format reward; not the numbers. Where a number is unknown, the default says whose it is.

    One optimizer step takes `prompts_per_step` prompts with `num_generations` rollouts each, over all ranks; how many
    rollouts share a forward (`per_device_train_batch_size`, `micro_batch_tokens`) does not change the result.

    Raises:
        RecipeError: values out of range or that contradict each other, or settings of `TrainingArguments` that this
            trainer cannot honour.
    """

    # ---- rollouts
    num_generations: int = field(default=8, metadata={"help": "G, rollouts per prompt. 8: MM-EUREKA's script."})
    prompts_per_step: int = field(
        default=128,
        metadata={"help": "Prompts of one optimizer step, over all ranks. 128: MM-EUREKA's train batch."},
    )
    updates_per_rollout: int = field(
        default=1,
        metadata={"help": "Optimizer steps that share one batch of rollouts, each on its own prompts. HDPO: 2."},
    )
    passes_per_rollout: int = field(
        default=1, metadata={"help": "How often those steps are repeated on the same rollouts. 1: on policy (ours)."}
    )
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Longer prompts are left out and reported, never truncated. None: no limit."},
    )
    max_completion_tokens: int = field(
        default=4096, metadata={"help": "Longest answer, tokens. 4096: MM-EUREKA's script."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling and of all log-probabilities. 1.0: all."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of sampling; 1: off."})
    top_k: int = field(default=0, metadata={"help": "Most likely tokens that may be drawn; 0: off."})
    thinking: bool | str | None = field(
        default=None,
        metadata={
            "help": "Two-branch models: which branch answers. True or False: that one; 'sample': drawn from the "
            "router's probability (needed to train the router by reward); 'router': where the router sends it. None: "
            "a dense model."
        },
    )
    rollout_batch_tokens: int = field(
        default=65536, metadata={"help": "Tokens that the HF engine decodes at once: rows x longest. Bounds its cache."}
    )
    engine: str = field(
        default="hf",
        metadata={"help": "What generates: 'hf', the model itself; 'server', vLLM servers, see docs/rollouts.md."},
    )
    server_urls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Addresses of servers of the dense model, or of the thinking branch. They share the prompts."
        },
    )
    server_urls_non_thinking: list[str] | None = field(
        default=None, metadata={"help": "Addresses of servers of the non-thinking branch."}
    )
    server_weights_dir: str | None = field(
        default=None,
        metadata={"help": "Where new weights are written for the servers, which read the same path. None: output_dir."},
    )
    server_weights_dtype: str | None = field(
        default=None, metadata={"help": "bf16, fp16 or fp32: type of the written weights. None: as they are trained."}
    )
    server_timeout_seconds: float = field(
        default=1800.0, metadata={"help": "Longest wait for an answer of a server (ours)."}
    )
    server_concurrency: int = field(default=64, metadata={"help": "Requests at a time and rank (ours)."})
    system_prompt: str | None = field(
        default=SYSTEM_PROMPT,
        metadata={"help": "System prompt of rows without one; None: the chat template's own. Default: Metis-RISE's."},
    )

    # ---- rewards and advantages
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. None: 1 each. HDPO's reference: 0.9, 0.1."}
    )
    correct_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward that says whether an answer is right (> 0.5), for pass rates and the NLL term. "
            "None: accuracy_reward if there, else the first."
        },
    )
    advantage: str = field(default="grpo", metadata={"help": "'grpo' or 'hdpo'."})
    hdpo_compat: str | None = field(
        default=None, metadata={"help": "'reference': the released code's numbers, with its defects."}
    )
    efficiency_reward: str = field(
        default="efficiency_reward",
        metadata={"help": "HDPO: name of the reward function whose group is the correct rollouts."},
    )
    w_acc: float = field(default=1.0, metadata={"help": "HDPO: weight of the accuracy loss (reference)."})
    w_tool: float = field(default=0.15, metadata={"help": "HDPO: weight of the efficiency loss (reference)."})
    overlong_buffer_tokens: int = field(
        default=0,
        metadata={
            "help": "Soft overlong penalty: falls from 0 to -1 over the last so many tokens before the limit. 0: off. "
            "DAPO: 4096 of 20480."
        },
    )
    overlong_weight: float = field(default=1.0, metadata={"help": "Weight of that penalty. 1.0: DAPO."})
    mask_truncated: bool = field(
        default=False, metadata={"help": "Leave answers that the limit cut out of the loss. Off in DAPO and HDPO."}
    )
    dynamic_sampling: bool = field(
        default=True,
        metadata={"help": "Drop prompts whose rollouts all have the same reward, and draw others instead. On in DAPO."},
    )
    max_sampling_rounds: int = field(
        default=10, metadata={"help": "At most so many rounds of drawing per batch of rollouts. 10: DAPO in verl."}
    )

    # ---- tools
    tools: list[str | dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "What rollouts may call: python, text_search, image_search, each a name or {name: options}, see "
            "docs/tools.md. None: rollouts are single turns."
        },
    )
    describe_tools: bool = field(
        default=True,
        metadata={"help": "Put the tools' schemas into the system prompt. False: the rows' prompts describe them."},
    )
    max_tool_turns: int = field(
        default=9,
        metadata={"help": "Tool turns of a rollout; a call in the turn after them is not run. 9: HDPO's 10 turns."},
    )
    max_calls_per_turn: int = field(default=4, metadata={"help": "Calls of one turn that are run (ours)."})
    max_observation_tokens: int = field(
        default=8192,
        metadata={
            "help": "Of one observation, image tokens included; longer ones are shortened. 8192: HDPO. With tools, "
            "max_completion_tokens bounds all turns and observations together. HDPO: 16384."
        },
    )
    tool_seconds: float = field(default=400.0, metadata={"help": "Spent in tools by one rollout. 400: HDPO."})
    tool_workers: int = field(default=8, metadata={"help": "Rollouts of a rank that run tools at one time (ours)."})
    unsafe_local: bool = field(
        default=False,
        metadata={"help": "Where no sandbox can be made, run the policy's programs with all rights of the user."},
    )

    # ---- loss
    loss_aggregation: str = field(
        default="token_mean",
        metadata={"help": "token_mean (global; DAPO's text), sequence_mean (as printed in Metis-HOME), dr_grpo, dapo."},
    )
    clip_low: float = field(default=0.2, metadata={"help": "Ratios are clipped below 1 - clip_low. 0.2: DAPO."})
    clip_high: float = field(default=0.28, metadata={"help": "... and above 1 + clip_high. 0.28: DAPO."})
    dual_clip: float | None = field(
        default=3.0, metadata={"help": "Bound on the loss where the advantage is negative; None: off. 3: HDPO."}
    )
    kl_coef: float = field(default=0.0, metadata={"help": "Weight of KL(policy || initial model). 0: Metis-RISE."})
    log_kl: bool = field(
        default=False,
        metadata={
            "help": "Log KL(policy || initial model) without a loss: one more forward, and a copy of the model unless "
            "adapters train."
        },
    )
    nll_coef: float = field(
        default=0.0, metadata={"help": "Weight of the likelihood of correct rollouts. VAPO: 0.1; 0: off (ours)."}
    )
    router_coef: float = field(
        default=1.0, metadata={"help": "Weight of the router's policy loss, a mean over queries (ours)."}
    )
    old_logprobs: str = field(
        default="auto",
        metadata={
            "help": "Log-probabilities that ratios start from, where several steps share rollouts. 'sampler': the "
            "engine's; 'recompute': one more forward; 'auto': the engine's if it shares the weights in float32."
        },
    )
    importance_cap: float | None = field(
        default=2.0,
        metadata={
            "help": "Engines with other numerics: weigh each token by min(p_trainer / p_sampler, cap). None: do not. "
            "2: verl's recipes."
        },
    )

    # ---- validation
    eval_num_generations: int = field(
        default=1,
        metadata={
            "help": "Answers per held-out prompt. 1: greedy, which is what is reported; more: sampled at `temperature`, for "
            "pass@k (ours)."
        },
    )

    # ---- running
    check_data: bool = field(
        default=True,
        metadata={
            "help": "Look at all rows before training: images that cannot be read, ids that occur twice, control tokens; "
            "with accuracy_reward also golds that no answer could be compared with. Every bad row is reported by number."
        },
    )
    micro_batch_tokens: int = field(
        default=32768,
        metadata={"help": "Most tokens of one forward, padding and image tokens included (ours)."},
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Most rollouts of one forward."})
    skip_idle_rollouts: bool = field(
        default=True,
        metadata={"help": "Do not compute rollouts whose every coefficient is 0: same gradient, less work."},
    )
    freeze: list[str] | None = field(
        default=None,
        metadata={
            "help": "Two-branch models: parameter sets that do not train, see MetisSFTConfig. None with thinking=True "
            "or False: all but that branch; with 'sample': all but both branches and the router. Adapters: None trains "
            "all of them; otherwise those on these sets do not train."
        },
    )
    train_only: list[str] | None = field(default=None, metadata={"help": "The sets that train. Instead of `freeze`."})
    freeze_vision: bool = field(
        default=True, metadata={"help": "Dense models: do not train the vision tower, nor adapters on it. MM-EUREKA's."}
    )
    self_check: bool = field(
        default=True, metadata={"help": "Compare the log-probabilities of sampler and trainer before the first step."}
    )
    self_check_tolerance: float | None = field(
        default=None, metadata={"help": "Largest difference, nats. None: 1e-3 in float32, 0.3 else (ours)."}
    )
    log_completions: bool = field(default=True, metadata={"help": "Write every rollout to output_dir/completions."})
    watchdog_seconds: float | None = field(
        default=None,
        metadata={
            "help": "End a run that hangs: the longest that a filling of the buffer, a micro-batch, an optimizer step or "
            "a checkpoint may take, in seconds; the report says where each rank is. None: wait for ever."
        },
    )
    plots: bool = field(default=True, metadata={"help": "Draw the logged curves into output_dir/plots at the end."})

    # ---- other defaults than transformers'
    learning_rate: float = field(default=1e-6, metadata={"help": "1e-6: MM-EUREKA and HDPO."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Constant: HDPO."})
    weight_decay: float = field(default=0.0, metadata={"help": "Ours."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps (ours)."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: rows are records."})
    label_names: list[str] | None = field(default_factory=list, metadata={"help": "There are no labels."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: a loss that is no number is an error."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})

    def __post_init__(self) -> None:
        super().__post_init__()
        trainable_sets(self.freeze, self.train_only)
        check_ranges(self)
        if not 0 <= self.overlong_buffer_tokens < self.max_completion_tokens:
            raise RecipeError(
                f"overlong_buffer_tokens is {self.overlong_buffer_tokens}; expected 0 (off) up to "
                f"max_completion_tokens - 1 = {self.max_completion_tokens - 1}"
            )
        self._check_servers()
        if self.hdpo_compat is not None and self.advantage != "hdpo":
            raise RecipeError(
                f"hdpo_compat is {self.hdpo_compat!r} with advantage {self.advantage!r}; it belongs to advantage: hdpo"
            )
        if self.num_generations < 2 and self.hdpo_compat is None:
            raise RecipeError(
                "num_generations is 1: a rollout is judged against the others of its prompt. Use 2 or more."
            )
        if self.gradient_accumulation_steps != 1:
            raise RecipeError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}; this trainer cuts the "
                "prompts_per_step * num_generations rollouts of a step into micro-batches by itself "
                "(per_device_train_batch_size, micro_batch_tokens). Leave it at 1."
            )
        if self.auto_find_batch_size:
            raise RecipeError(
                "auto_find_batch_size restarts a run from its first step, with its weights already changed. Lower "
                "micro_batch_tokens or per_device_train_batch_size instead: they do not change the result."
            )
        if self.remove_unused_columns:
            raise RecipeError("remove_unused_columns must be False: the trainer encodes whole records, not columns.")

    def _check_servers(self) -> None:
        """Raises:
        RecipeError: addresses without `engine: server`, or too few or too many for what answers.
        """
        given = {"server_urls": bool(self.server_urls), "server_urls_non_thinking": bool(self.server_urls_non_thinking)}
        wanted = dict.fromkeys(given, False)
        if self.engine == "server":
            wanted["server_urls"] = self.thinking is not False
            wanted["server_urls_non_thinking"] = self.thinking in (False, "router", "sample")
        for name, is_wanted in wanted.items():
            if given[name] != is_wanted:
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r} with engine {self.engine!r} and thinking {self.thinking!r}; "
                    f"expected {'addresses such as http://127.0.0.1:8000' if is_wanted else 'none: nothing would use them'}"
                )
        if self.engine == "server" and (self.top_p < 1 or self.top_k):
            raise RecipeError(
                f"top_p is {self.top_p} and top_k {self.top_k}: a server's log-probabilities would be of what they leave, "
                "not of the policy. Set top_p 1 and top_k 0, or engine: hf."
            )
