"""`palimpsest demo`: synthetic worlds, a supervised warm start, then RL with all asynchronous processes.

    worlds, tokenizer, demonstrations ─► indexes          (one core)
                                      └► warm start       (the other core)
    retriever, learner, engine ─► evaluate ─► + actors: RL until the last step ─► evaluate ─► report.json

Every stage writes its result into the run's folder (demo_stages.py), so a stopped demo resumes at the stage where it
was stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from learner.launch.demo_run import DemoRun
    from protocol.config import Config


@click.command(context_settings={"show_default": True})
@click.option(
    "--seed",
    type=click.IntRange(0, 1_000_000),
    default=0,
    help="Seed of the worlds, the first model and the evaluation.",
)
@click.option(
    "--steps", type=click.IntRange(1), default=120, help="Training steps, each of 16 questions x 8 trajectories."
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The run's folder.  [default: the next free runs/demo-N]",
)
@click.option("--actors", type=click.IntRange(1, 64), default=2, help="Number of actor processes.")
@click.option(
    "--eval-questions",
    type=click.IntRange(1),
    default=512,
    help="Questions about an unseen world, asked before and after RL.",
)
@click.option(
    "--staleness",
    type=click.IntRange(0, 64),
    default=2,
    help="Staleness bound in steps; 0: actors and learner alternate.",
)
@click.option("--quiet", is_flag=True, help="Show no live view.")
@click.option("--ablation", type=click.Choice(["last-context"]), help="Train only the last context of each trajectory.")
def demo(
    seed: int,
    steps: int,
    run_dir: Path | None,
    actors: int,
    eval_questions: int,
    staleness: int,
    quiet: bool,
    ablation: str | None,
) -> None:
    """Run the whole system on this machine and see the reward rise: real processes, real sockets.

    A tiny model answers multi-hop questions about synthetic worlds; it searches and rewrites a memory of one fact. A
    supervised warm start on scripted, noisy demonstrations teaches it the format. RL then makes it reliable; RL teaches
    no new skill here. About four minutes on two cores.
    """
    from learner.launch.demo_run import DemoRun, DemoSettings, choose_folder
    from protocol.role_startup import run_async

    settings = DemoSettings(
        seed=seed,
        num_steps=steps,
        num_actors=actors,
        num_eval_questions=eval_questions,
        staleness_bound=staleness,
        ablation=ablation or "none",
    )
    folder = choose_folder(run_dir, settings)
    try:
        run_async(_run(DemoRun(settings, run_dir=folder.resolve(), quiet=quiet)))
    except KeyboardInterrupt:
        click.echo("demo: stopped; the same command resumes it")
        raise


async def _run(run: DemoRun) -> None:
    """Runs the stages in order. Raises: UserError, TrainingStopped, RunFailed."""
    import json
    from dataclasses import asdict

    from learner.launch.command_line import relative
    from learner.launch.demo_report import write_report
    from learner.launch.demo_stages import evaluate, make_data_and_model
    from learner.launch.engine_token import with_engine_token
    from learner.launch.live_view import FINISHED, TRAINING, view_of
    from learner.launch.phase_timer import PhaseTimer
    from learner.launch.process_plan import plan, with_ports
    from learner.launch.supervisor import Supervisor
    from protocol.atomic_write import atomic_write
    from protocol.config_file import save_config

    click.echo(f"demo: seed {run.settings.seed}, {run.settings.num_steps} steps, in {relative(run.run_dir)}")
    config = _config(run)
    async with Supervisor(run.run_dir) as supervisor:
        view = view_of(config, supervisor.states, quiet=run.quiet)
        async with view.shown():
            atomic_write(run.settings_path, json.dumps(asdict(run.settings)) + "\n")
            timer = PhaseTimer(run.seconds)
            with timer.measure("warm_start_s"):
                await make_data_and_model(run, supervisor, view)
            config = with_engine_token(with_ports(config), run.folder.engine_token)
            save_config(config, run.folder.config)
            processes = plan(config, config_path=run.folder.config)
            view.phase = "starting the learner, the retriever and the engine"
            await supervisor.start([spec for spec in processes if spec.role != "actor"])
            with timer.measure("eval_s"):
                await evaluate(run, config, supervisor, view, when="before", version=0)
            with timer.measure("rl_s"):
                view.phase = TRAINING
                await supervisor.start([spec for spec in processes if spec.role == "actor"])
                await supervisor.wait("learner")
            with timer.measure("eval_s"):
                await evaluate(run, config, supervisor, view, when="after", version=run.settings.num_steps)
            view.phase = FINISHED
    click.echo(write_report(run, config, seconds=timer.seconds))


def _config(run: DemoRun) -> Config:
    """The config without ports. Learning rate, batch size and schedule were tuned on a prototype (docs/log.md)."""
    from protocol.config_file import parse_config

    indexes = {f"world-{world}": str(run.index(world)) for world in run.all_worlds}
    tree: dict[str, object] = {
        "run": {"name": f"demo-seed-{run.settings.seed}", "dir": str(run.run_dir), "seed": run.settings.seed},
        "model": {"path": str(run.model)},
        "task": {
            "use": "toy",
            "worlds": list(run.worlds),
            "eval_worlds": [run.eval_world],
        },
        "reward": {"use": "em"},
        "tool": [{"use": "search", "top_n": 3}],
        "workflow": {
            "use": "memsearcher",
            "rendering": "toy",
            "max_turns": 5,
            "action_tokens": 16,
            "memory_tokens": 20,
            "context_tokens": 160,
        },
        "actor": {"count": run.settings.num_actors, "max_trajectories": max(8, 128 // run.settings.num_actors)},
        "engine": {"count": 1, "max_running_requests": 128},
        "retriever": {"indexes": indexes},
        "learner": {
            "num_steps": run.settings.num_steps,
            "groups_per_batch": 16,
            "group_size": 8,
            "staleness_bound": run.settings.staleness_bound,
            "tokens_per_micro_batch": 4096,
            "ablation": run.settings.ablation,
            "advantage": {"use": "grpo", "eps": 1e-4},
            "loss": {"use": "ppo", "aggregation": "token"},
            "optimizer": {
                "learning_rate": 1e-3,
                "betas": [0.9, 0.99],
                "weight_decay": 0.0,
                "schedule": "linear",
                "warmup_steps": 5,
                "final_fraction": 0.1,
            },
            "checkpoint": {"every_steps": 20, "keep": 2},
        },
    }
    return parse_config(tree, source="the demo's config")
