"""`metis-home pass-rates`, `build-sft` and `rise`: what Metis-RISE does between and around the two trainings."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from metis_home.errors import OutputError
from metis_home.prompts import SYSTEM_PROMPT

from .answer import DtypeChoice, System
from .models import load_either, load_its_processor, model_path, system_prompt_for

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from metis_home.training.data.records import Record

PASS_RATES_HELP = """Sample answers to every prompt of DATA, verify them, write the pass rates and the answers.

A run that was stopped goes on where it was; under torchrun the ranks share the prompts. The cost is printed first.

Example: metis-home pass-rates reasoner-7b prompts.jsonl --samples 8 --out rates.jsonl
"""
BUILD_SFT_HELP = """Make the rows of Stage-SFT from DATA and its pass rates.

Solved always: dropped. Sometimes: the model's own correct answers. Never: a correct answer of an expert.

Example: metis-home build-sft prompts.jsonl --pass-rates rates.jsonl --non-thinking vqa.jsonl --out sft.jsonl
"""
RISE_HELP = """All stages of RECIPE: RL, pass rates, SFT set, convert, Stage-SFT, evaluate; goes on where it was stopped.

Example: metis-home rise rise.yaml model=qwen-7b prompts=rl.jsonl non_thinking=vqa.jsonl held_out=test.jsonl output_dir=out
"""
EXPORT_RECIPE_HELP = """Write a Stage-RL recipe for another trainer: data set, reward file, configuration.

Example: metis-home export-recipe rise_rl.yaml out/for-verl --to verl model.path=qwen-7b data.train=rl.jsonl
"""

Out = Annotated[Path, typer.Option("--out", help="File to write; it appears when it is complete.")]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    app.command("pass-rates", help=PASS_RATES_HELP)(pass_rates)
    app.command("build-sft", help=BUILD_SFT_HELP)(build_sft)
    app.command("rise", help=RISE_HELP)(rise)
    app.command("export-recipe", help=EXPORT_RECIPE_HELP)(export_recipe)


def pass_rates(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Dense or two-branch (its thinking branch answers).")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Rows with golds.")],
    out: Out,
    samples: Annotated[int, typer.Option(min=1, help="Answers per prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 8192,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Sample from this much probability mass.")] = 1.0,
    system: System = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens decoded at once.")] = 65536,
    prompts_per_unit: Annotated[int, typer.Option(min=1, help="Prompts that are written together.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts.")] = None,
    seed: Seed = 0,
    dtype: Annotated[DtypeChoice, typer.Option(help="Type of the loaded weights.")] = DtypeChoice.AUTO,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto: this rank's GPU, else cpu.")] = "auto",
    server: Annotated[
        list[str] | None,
        typer.Option(help="Address of a vLLM server of MODEL (of its thinking branch); several share the prompts."),
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print the cost and stop.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write pass rates."""
    from transformers import AutoConfig

    from metis_home.branch import Branch
    from metis_home.training.data.encode import Encoder
    from metis_home.training.data.records import load_records
    from metis_home.training.evaluation.fingerprint import model_fingerprint
    from metis_home.training.pipeline.pass_rates import check_prompts, cost_of
    from metis_home.training.pipeline.pass_rates import pass_rates as run
    from metis_home.training.pipeline.shards import remove_output
    from metis_home.training.rollouts.engine import RolloutEngine
    from metis_home.training.rollouts.hf import HFEngine
    from metis_home.training.rollouts.server import ServerEngine
    from metis_home.training.rollouts.types import Sampling
    from metis_home.training.rollouts.vocabulary import end_token_ids, unsampled_token_ids

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    refuse_inputs([out], [data])
    processor = load_its_processor(model)
    records = load_records(data)[:limit]
    check_prompts(records)
    encoder = Encoder(processor, system_prompt=system_prompt_for(model, system) or None)
    cost = cost_of(records, encoder, samples=samples, max_new_tokens=max_new_tokens)
    if rank == 0:
        _say(str(cost))
    if estimate:
        return
    if overwrite and rank == 0:
        remove_output(out)
    engine: RolloutEngine
    weights = None  # a server's are not known here
    if server:
        config, generation = AutoConfig.from_pretrained(model_path(model)), _generation_config(model_path(model))
        branch = Branch.THINKING if config.model_type == "metis_home" else None
        engine = ServerEngine(processor, {branch: server}, exact_logprobs=False)  # only the answers count
    else:
        loaded = load_either(model, dtype=dtype.value, device=_device(device))
        weights = model_fingerprint(loaded)
        config, generation = loaded.config, loaded.generation_config
        engine = HFEngine(loaded, processor.tokenizer, max_tokens=batch_tokens)
        branch = Branch.THINKING if engine.has_branches else None
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        branch=branch,
        eos_token_ids=end_token_ids(processor.tokenizer, generation),
        suppress_token_ids=unsampled_token_ids(config, processor.tokenizer),
    )
    complete = run(
        engine,
        encoder,
        records,
        samples=samples,
        sampling=sampling,
        out=out,
        settings={"model": model, "weights": weights, "data": data, "system_prompt": encoder.system_prompt},
        seed=seed,
        prompts_per_unit=prompts_per_unit,
        rank=rank,
        world_size=world_size,
        say=_say,
    )
    if complete:
        print(out)
    else:
        _say(f"rank {rank} is done; the last rank writes {out}")


def build_sft(
    data: Annotated[str, typer.Argument(metavar="DATA", help="The rows that the pass rates are of.")],
    rates: Annotated[
        list[Path], typer.Option("--pass-rates", help="What pass-rates wrote; several times for several.")
    ],
    out: Out,
    expert: Annotated[Path | None, typer.Option(help="Expert answers: lines of id and response.")] = None,
    expert_url: Annotated[str | None, typer.Option(help="Expert endpoint that speaks OpenAI's protocol.")] = None,
    expert_model: Annotated[str | None, typer.Option(help="Name of the expert's model.")] = None,
    expert_tries: Annotated[int, typer.Option(min=1, help="Answers asked of the expert for each prompt.")] = 1,
    non_thinking: Annotated[str | None, typer.Option(help="Rows of the non-thinking part.")] = None,
    ratio: Annotated[float, typer.Option(min=0, help="Non-thinking rows per thinking row.")] = 1.0,
    pick: Annotated[str, typer.Option(help="Of several correct answers: shortest, or all.")] = "shortest",
    exclude: Annotated[str | None, typer.Option(help="Held-out rows that must not be taught.")] = None,
    system: Annotated[
        str | None,
        typer.Option(help="System prompt for the expert; '' for none. Default: Metis-RISE's.", show_default=False),
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Leave out rows that have no pass rate.")] = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write the rows of Stage-SFT."""
    if pick not in ("shortest", "all"):
        raise typer.BadParameter(f"--pick is shortest or all; found {pick!r}.")
    if (expert_url is None) != (expert_model is None):
        raise typer.BadParameter("--expert-url and --expert-model go together.")
    if expert is not None and expert_url is not None:
        raise typer.BadParameter("--expert and --expert-url: choose one.")
    report_file, picture = out.with_suffix(".report.json"), out.with_suffix(".pass-rates.png")
    refuse_inputs([out, report_file, picture], [data, *rates, expert, non_thinking, exclude])
    if out.exists() and not overwrite:
        raise OutputError(f"{out} already exists. Use another --out, or --overwrite.")
    from metis_home.training.data.records import load_records
    from metis_home.training.pipeline.experts import ExpertEndpoint, answers_from_file
    from metis_home.training.pipeline.report import draw_histogram, report_json, report_lines
    from metis_home.training.pipeline.sft_set import build_sft_set, never_solved, read_pass_rates

    records, known = load_records(data), read_pass_rates(rates)
    answers = None
    if expert is not None:
        answers = answers_from_file(expert)
    elif expert_url is not None:
        endpoint = ExpertEndpoint(
            base_url=expert_url,
            model=expert_model or "",
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            tries=expert_tries,
        )
        wanted = never_solved(records, known, partial=partial)
        _say(f"asking {expert_model} about {len(wanted)} prompts")
        answers = endpoint.answers(wanted, _system_prompt(system))
    out.parent.mkdir(parents=True, exist_ok=True)
    direct: list[Record] = [] if non_thinking is None else load_records(non_thinking)
    held_out: list[Record] = [] if exclude is None else load_records(exclude)
    report = build_sft_set(
        records,
        known,
        out,
        expert=answers,
        non_thinking=direct,
        ratio=ratio,
        pick=pick,  # type: ignore[arg-type]
        exclude=held_out,
        partial=partial,
        seed=seed,
    )
    report_file.write_text(json.dumps(report_json(report), indent=2) + "\n", encoding="utf-8")
    draw_histogram(report, picture)
    if as_json:
        print(json.dumps(report_json(report)))
    else:
        print("\n".join(report_lines(report)))


def rise(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or rise.yaml.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings that replace the recipe's.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and stop.")] = False,
) -> None:
    """Carry out all stages."""
    from metis_home.training.pipeline.rise import load_rise_recipe, run_rise
    from metis_home.training.pipeline.rise_summary import summarize_rise, summary_lines

    loaded = load_rise_recipe(recipe, settings or [])
    steps = run_rise(loaded, say=print if dry_run else _say, dry_run=dry_run)
    if dry_run:
        return
    summary = summarize_rise(loaded.output_dir, steps)
    file = Path(loaded.output_dir) / "summary.json"
    file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _say("\n".join(summary_lines(summary)))
    print(file)


def export_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or shipped recipe, stage rl.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    to: Annotated[str, typer.Option("--to", help="trl, verl or swift.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE...", help="Settings that replace the recipe's.")
    ] = None,
) -> None:
    """Write a recipe for another trainer."""
    from metis_home.training.data.records import load_records
    from metis_home.training.pipeline.handover import export_recipe as export
    from metis_home.training.recipe import load_recipe

    loaded = load_recipe(recipe, settings or [], {"training.output_dir": str(out)})
    records = [
        record for source in loaded.data.train for record in load_records(source, image_root=loaded.data.image_root)
    ]
    made = export(loaded, records, out, target=to)
    for note in made.not_carried_over:
        _say(f"not carried over: {note}")
    print(made.folder)


def _system_prompt(system: str | None) -> str | None:
    return SYSTEM_PROMPT if system is None else system or None


def _generation_config(model: str) -> "GenerationConfig | None":
    """The checkpoint's, without its weights."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None  # it has none


def refuse_inputs(written: Sequence[Path], read: Sequence[str | Path | None]) -> None:
    """Raise where a file to write is one of those to read.

    Raises:
        OutputError: names it.
    """
    sources = {Path(name).expanduser().resolve(): name for name in read if name is not None}
    for file in written:
        if file.resolve() in sources:
            raise OutputError(f"{file} would be written, but {sources[file.resolve()]} is read. Use another --out.")


def _device(device: str) -> str:
    if device != "auto":
        return device
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
