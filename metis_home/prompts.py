"""What goes around a question: the system prompt, the thinking switch of the chat template, published defaults.

Standard library only: the converter may call `add_thinking_switch` without torch, and exported models carry this file.
"""

import re

# Metis-RISE's published usage example, verbatim.
SYSTEM_PROMPT = (
    "Solve the question. The user asks a question, and you solves it. You first thinks about the reasoning process in "
    "the mind and then provides the user with the answer. The answer is in latex format and wrapped in $...$. The "
    "final answer must be wrapped using the \\boxed{} command. The reasoning process and answer are enclosed within "
    "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> Since $1+1=2$, so the answer is $2$. "
    "</think><answer> The answer is $\\boxed{2}$ </answer>, which means assistant's output should start with <think> "
    "and end with </answer>."
)

# Image sizes and answer length of the same example. One visual token is a 28 x 28 pixel square.
MIN_PIXELS = 128 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
MAX_NEW_TOKENS = 8192

# Metis-HOME's two formats: <think>reasoning</think><answer>content</answer>, non-thinking with nothing in <think>.
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"

# What the template writes after the generation prompt, so that the answer has the format of its branch from the start.
THINKING_PREFIX = THINK_OPEN
NON_THINKING_PREFIX = THINK_OPEN + THINK_CLOSE

# An expression, not a statement: Jinja's trim_blocks and lstrip_blocks, which transformers and vLLM switch on, leave
# the white space around it alone.
_SWITCH = (
    "{{ '' if not add_generation_prompt or enable_thinking is not defined or enable_thinking is none "
    f"else ('{THINKING_PREFIX}' if enable_thinking else '{NON_THINKING_PREFIX}') }}}}"
)
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_FINAL_NEWLINE = re.compile(r"(?:\r\n|\r|\n)\Z")


def thinking_prefix(enable_thinking: bool | None) -> str:
    """The text that the chat template puts after the generation prompt: nothing where the router decides (None)."""
    if enable_thinking is None:
        return ""
    return THINKING_PREFIX if enable_thinking else NON_THINKING_PREFIX


def handles_thinking(template: str) -> bool:
    """Does this chat template read `enable_thinking`? A mention in a Jinja comment does not count."""
    return re.search(r"\benable_thinking\b", _COMMENT.sub("", template)) is not None


def add_thinking_switch(template: str) -> str:
    """Return the Jinja chat template with `enable_thinking=None|True|False`; unchanged if it has the switch already.

    Without the variable (or with None) the result renders exactly what `template` renders. The switch lives in the
    template, so that servers which only take `chat_template_kwargs` obey it too. It expects what every Qwen template
    does: the generation prompt comes last.
    """
    if handles_thinking(template):
        return template
    # Jinja drops one final newline of a template; left before the switch it would be printed.
    return _FINAL_NEWLINE.sub("", template) + _SWITCH
