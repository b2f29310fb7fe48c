"""Makes everything that run.toml needs from a corpus and questions: index, tokenizer, demonstrations, policy.

    data (all, or a subset) ─► index ─► tokenizer ─► demonstrations ─► base: copying, then language
        ─► rounds/1: imitation, measured ─► … until enough trajectories are well formed ─► model

Each stage writes its result to --out and is skipped if the result exists, so a stopped run resumes.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import click
from stages import (
    DEFAULT_OUT,
    RL_STEPS,
    RUN_TOML,
    Options,
    build_index,
    make_tokenizer,
    record_traces,
    take_data,
    train_base,
    train_policy,
)

QUICK: dict[str, object] = {
    "out": DEFAULT_OUT.with_name("wiki_pool-quick"),
    "questions": 160,
    "passages": 1000,
    "vocab_size": 4096,
    "copying_steps": 150,
    "language_steps": 10,
    "imitation_steps": 400,
    "max_rounds": 1,
    "target_share": 0.0,
    "eval_questions": 32,
    "rl_steps": 3,
}
"""The defaults with --quick. One round is trained, and used however few of its trajectories are well formed."""
SAMPLED = ("--temperature", "1", "--transcripts")


def _use_quick(context: click.Context, _parameter: click.Parameter, is_quick: bool) -> None:
    if is_quick:
        context.default_map = QUICK


@click.command(context_settings={"show_default": True})
@click.option(
    "--quick",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_use_quick,
    help="Other defaults: the whole pipeline in a few minutes, with a model that is worse still.",
)
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder with the corpus.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_OUT, help="Folder to write to."
)
@click.option("--encoder", default="minilm", help="See `palimpsest index --encoder`.")
@click.option("--questions", type=click.IntRange(0), default=0, help="Training questions. 0: all, and all passages.")
@click.option("--passages", type=click.IntRange(0), default=0, help="Passages, if --questions is set.")
@click.option("--vocab-size", type=click.IntRange(512), default=8192, help="Tokens of the tokenizer.")
@click.option("--copying-steps", type=click.IntRange(1), default=250, help="Steps on random words.")
@click.option(
    "--language-steps", type=click.IntRange(1), default=60, help="Steps on 16 passages, each with one on copying."
)
@click.option(
    "--imitation-steps", type=click.IntRange(1), default=900, help="Steps of round 1; later rounds have a sixth."
)
@click.option("--max-rounds", type=click.IntRange(1), default=8, help="Rounds of imitation, at most.")
@click.option(
    "--target-share", type=click.FloatRange(0, 1), default=0.8, help="Well-formed trajectories that end the rounds."
)
@click.option("--eval-questions", type=click.IntRange(1), default=128, help="Questions to measure a round on.")
@click.option("--rl-steps", type=click.IntRange(1), default=RL_STEPS, help="Steps of the run that is printed.")
@click.option(
    "--threads", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), help="Threads of torch and of the index."
)
@click.option("--seed", type=click.IntRange(0), default=0)
def main(
    data: Path,
    out: Path,
    encoder: str,
    questions: int,
    passages: int,
    vocab_size: int,
    copying_steps: int,
    language_steps: int,
    imitation_steps: int,
    max_rounds: int,
    target_share: float,
    eval_questions: int,
    rl_steps: int,
    threads: int,
    seed: int,
) -> None:
    """Prepare a run on real questions: DATA has corpus.jsonl(.gz), questions_train.jsonl and questions_dev.jsonl."""
    options = Options(
        data=data,
        out=out.resolve(),
        encoder=encoder,
        num_questions=questions,
        num_passages=passages,
        vocab_size=vocab_size,
        copying_steps=copying_steps,
        language_steps=language_steps,
        imitation_steps=imitation_steps,
        max_rounds=max_rounds,
        target_share=target_share,
        num_eval_questions=eval_questions,
        rl_steps=rl_steps,
        threads=threads,
        seed=seed,
    )
    from protocol.errors import UserError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _run_stages(options)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def _run_stages(options: Options) -> None:
    started_s = time.monotonic()
    for name, made, stage in [
        ("data", "questions_dev.jsonl", take_data),
        ("index", "index", build_index),
        ("tokenizer", "tokenizer", make_tokenizer),
        ("traces", "demonstrations-whole.safetensors", record_traces),
        ("base", "base", train_base),
        ("model", "model", train_policy),
    ]:
        if (options.out / made).exists():
            click.echo(f"{name}: exists, {options.out / made}")
            continue
        click.echo(f"{name} …")
        stage(options)
    from learner.launch.command_line import command_line

    click.echo(f"prepared in {time.monotonic() - started_s:.0f} s. Next:")
    run = options.out / "run"
    sets = [argument for override in options.overrides for argument in ("--set", override)]
    click.echo(f"  {command_line('palimpsest', 'up', RUN_TOML, *sets)}")
    click.echo(f"  {command_line('palimpsest', 'audit', run)}")
    click.echo(f"  {command_line('palimpsest', 'eval', run, '--limit', str(options.num_eval_questions), *SAMPLED)}")


if __name__ == "__main__":
    main()
