"""The demo's warm start as a separate process: `python -m learner.warmstart`."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder that `python -m actor.tasks.toy.command` wrote.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model folder to write.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(data: Path, out: Path, seed: int) -> None:
    """Train the toy task's initial policy on DATA/demonstrations.safetensors. OUT is created when it is complete."""
    import torch

    from learner.warmstart.recipe import NUM_STEPS, warm_start
    from protocol.atomic_write import atomic_path
    from protocol.role_startup import start_role
    from protocol.step_progress import StepProgress

    start_role("warm-start")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def report(phase: str, step: int, loss: float) -> None:
        if step % 10 == 0:
            click.echo(StepProgress(step, NUM_STEPS[phase], f"steps of {phase}, loss {loss:.3f}"))

    demonstrations, tokenizer = data / "demonstrations.safetensors", data / "tokenizer"
    with atomic_path(out) as unfinished:
        warm_start(unfinished, demonstrations=demonstrations, tokenizer_dir=tokenizer, seed=seed, on_progress=report)


if __name__ == "__main__":
    main()
