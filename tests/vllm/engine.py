"""Run in the vLLM environment: load DIR in a real engine, answer prompts greedily, print token ids as JSON.

engine.py DIR PROMPTS.json        [{"token_ids": [...], "image": "file.png" | null}, ...]
"""

import json
import sys


def main() -> None:
    """Answer every prompt of the file."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    directory, prompts_file = sys.argv[1:]
    with open(prompts_file) as file:
        prompts = json.load(file)
    engine = LLM(
        directory,
        dtype="float32",  # in bf16 the two implementations round differently
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 28,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    requests = []
    for prompt in prompts:
        request = {"prompt_token_ids": prompt["token_ids"]}
        if prompt["image"]:
            request["multi_modal_data"] = {"image": Image.open(prompt["image"]).convert("RGB")}
        requests.append(request)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, logprobs=1)
    answers = []
    for output in engine.generate(requests, sampling, use_tqdm=False):
        best = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(best.logprobs, best.token_ids, strict=True)]
        answers.append({"token_ids": list(best.token_ids), "logprobs": logprobs})
    print("ANSWERS " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
