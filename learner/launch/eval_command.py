"""`palimpsest eval RUN`: measures a policy of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click


@click.command("eval", context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--checkpoint", type=click.IntRange(0), help="Step to evaluate; 0 is model.path.  [default: the newest]")
@click.option("--live", is_flag=True, help="Ask the engines of RUN, which is running, instead of starting one.")
@click.option("--engine", "engines", multiple=True, metavar="URL", help="Ask this engine instead of starting one.")
@click.option("--split", type=click.Choice(["eval", "train"]), default="eval", help="Questions of this split.")
@click.option("--limit", type=click.IntRange(1), help="Questions.  [default: all; 512 if the task has no last one]")
@click.option("--samples", type=click.IntRange(1), default=1, help="Trajectories of each question.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0), help="Seed of sampling.  [default: run.seed]")
@click.option("--concurrency", type=click.IntRange(1), default=128, help="Trajectories at once.")
@click.option("--transcripts", is_flag=True, help="Also write the text of every context.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="[default: RUN/evaluations/NAME]")
@click.option("--overwrite", is_flag=True, help="Delete the samples in the output folder and start anew.")
@click.option("--max-failed", type=click.IntRange(0), default=0, help="Exit with status 1 if more samples failed.")
@click.option("--mixed-versions", is_flag=True, help="Accept samples of several weight versions.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
def evaluate(
    run: Path,
    checkpoint: int | None,
    live: bool,
    engines: tuple[str, ...],
    split: Literal["eval", "train"],
    limit: int | None,
    samples: int,
    temperature: float,
    seed: int | None,
    concurrency: int,
    transcripts: bool,
    output: Path | None,
    overwrite: bool,
    max_failed: int,
    mixed_versions: bool,
    overrides: tuple[str, ...],
) -> None:
    """Run the workflow on questions and report rewards and token counts.

    RUN is the folder of a run, finished or not, or a config file. An engine is started with the checkpoint, and a
    retriever if the run has indexes. Every trajectory is written to samples.jsonl as soon as it ends, and the same
    command resumes where it stopped; it also repeats the samples that FAILED.
    """
    import logging

    from learner.launch.eval_report import report_text
    from learner.launch.eval_run import Request, evaluate_run
    from protocol.role_startup import run_async

    if live + bool(engines) + (checkpoint is not None) > 1:
        raise click.UsageError("--checkpoint, --live and --engine exclude each other")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    request = Request(
        run=run,
        overrides=overrides,
        checkpoint=checkpoint,
        live=live,
        engines=engines,
        output=output,
        overwrite=overwrite,
        split=split,
        limit=limit,
        samples=samples,
        temperature=temperature,
        seed=seed,
        concurrency=concurrency,
        transcripts=transcripts,
        mixed_versions=mixed_versions,
    )
    try:
        report, folder = run_async(evaluate_run(request))
    except KeyboardInterrupt:
        click.echo("eval: stopped; the same command continues with the missing samples", err=True)
        raise
    click.echo(report_text(report, folder))
    if report.num_failed > max_failed or report.reward is None:
        click.echo(f"error: {report.num_failed} samples failed, at most {max_failed} may (--max-failed)", err=True)
        click.get_current_context().exit(1)
