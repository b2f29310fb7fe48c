"""Rounds of imitation, each measured, until enough trajectories are well formed.

The first round imitates the script: many short contexts, then whole ones. Each later round trains the policy on its
own well-formed trajectories of the training questions (rejection-sampling fine-tuning, Yuan et al. 2023), which raises
the share of well-formed ones.
"""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
from bpe import fixed_ids
from fit import LATER_ROUNDS, OPTIMIZER, Lesson, imitate
from measure import is_measured, measure, read_measured, well_formed_contexts
from pace import Pace
from search_tool import configured_top_n
from tokenizers import Tokenizer

from actor.workflows.demonstrations import save_demonstrations
from protocol.atomic_write import atomic_path
from protocol.config import Config
from protocol.config_file import load_config
from protocol.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Runs rounds in `out`/rounds. Steps whose results exist are skipped."""

    out: Path
    run_toml: Path
    overrides: tuple[str, ...]
    imitation_steps: int
    num_eval_questions: int
    threads: int
    seed: int

    def run_until(self, wanted_share: float, *, max_rounds: int) -> None:
        """Copies the model of the first round whose share is >= `wanted_share` to `out`/model.

        Raises: DataError if no round reaches it.
        """
        previous, share = self.out / "base", 0.0
        for number in range(1, max_rounds + 1):
            folder = self.out / "rounds" / str(number)
            share = self._round(number, start=previous, folder=folder)
            previous = folder / "model"
            if share >= wanted_share:
                with atomic_path(self.out / "model") as temporary:
                    shutil.copytree(previous, temporary)
                return
        raise DataError(
            f"after {max_rounds} rounds {share:.0%} of the trajectories are well formed, must be >= "
            f"{wanted_share:.0%}; read {previous.parent / 'samples.jsonl'}, then increase --max-rounds or "
            "--imitation-steps"
        )

    def _round(self, number: int, *, start: Path, folder: Path) -> float:
        """Trains and measures one round; returns its share of well-formed trajectories."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").is_dir():
            tokenizer = Tokenizer.from_file(str(self.out / "tokenizer" / "tokenizer.json"))
            lessons = self._script_lessons() if number == 1 else self._own_lessons(start, folder)
            imitate(
                start,
                folder / "model",
                tokenizer=tokenizer,
                lessons=lessons,
                fixed=fixed_ids(tokenizer, top_n=configured_top_n(load_config(self.run_toml))),
                optimizer=OPTIMIZER if number == 1 else LATER_ROUNDS,
                seed=self.seed + number,
                on_progress=Pace(f"round {number}, imitation").of_steps(sum(lesson.steps for lesson in lessons)),
            )
        if not is_measured(folder):
            click.echo(f"  round {number}, measuring {self.num_eval_questions} trajectories …")
            config = self._config(folder / "model")
            asyncio.run(measure(config, num_questions=self.num_eval_questions, folder=folder, threads=self.threads))
        measured = read_measured(folder / "samples.jsonl")
        click.echo(f"  round {number}: {measured}")
        return measured.share

    def _script_lessons(self) -> list[Lesson]:
        short, whole = (self.out / f"demonstrations-{name}.safetensors" for name in ("short", "whole"))
        third = max(1, self.imitation_steps // 3)
        return [
            Lesson(short, steps=2 * third, num_contexts=16, system=False, exchange=True),
            Lesson(whole, steps=third, num_contexts=4, system=True, exchange=True),
        ]

    def _own_lessons(self, model: Path, folder: Path) -> list[Lesson]:
        own = folder / "demonstrations.safetensors"
        if not own.is_file():
            click.echo("  sampling on the training questions …")
            contexts = asyncio.run(well_formed_contexts(self._config(model), folder=folder, threads=self.threads))
            click.echo(f"  {len(contexts)} contexts of well-formed trajectories to train on")
            save_demonstrations(own, contexts)
        steps = max(1, self.imitation_steps // 6)
        return [Lesson(own, steps=steps, num_contexts=8, system=True, exchange=False)]

    def _config(self, model: Path) -> Config:
        return load_config(self.run_toml, (*self.overrides, f"model.path={model}"))
