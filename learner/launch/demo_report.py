"""Writes the demo's report.json and its printed summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from learner.launch.command_line import command_line
from learner.launch.demo_run import DemoRun
from learner.launch.demo_stages import TEMPERATURES
from learner.launch.live_view import sparkline
from learner.launch.step_log import StepLog
from learner.store.audit import audit_run
from protocol.atomic_write import atomic_write
from protocol.config import Config

_REAL_QUESTIONS = Path("examples/wiki_pool/README.md")


def write_report(run: DemoRun, config: Config, *, seconds: Mapping[str, float]) -> str:
    """Writes RUN/report.json from the evaluations, the audit and the metrics; returns the summary to print.

    `seconds`: phase → seconds.
    """
    audit = audit_run(run.run_dir)
    evaluations = {
        (when, how): run.evaluation(when, how).read_report() for when in ("before", "after") for how in TEMPERATURES
    }
    em = {key: evaluation.parts["em"].mean for key, evaluation in evaluations.items()}
    steps = StepLog(run.folder.metrics)
    steps.refresh()
    rewards = [steps.by_step[step]["reward/mean"] for step in sorted(steps.by_step)]
    report = {
        "seed": run.settings.seed,
        "num_steps": run.settings.num_steps,
        "ablation": config.learner.ablation,
        "em_before": em["before", "sampled"],
        "em_after": em["after", "sampled"],
        "em_greedy_before": em["before", "greedy"],
        "em_greedy_after": em["after", "greedy"],
        "num_eval_questions": evaluations["after", "sampled"].parts["em"].num_questions,
        "warm_start_s": seconds["warm_start_s"],
        "rl_s": seconds["rl_s"],
        "eval_s": seconds["eval_s"],
        "num_groups_trained": audit.num_trained,
        "num_trajectories_trained": audit.num_trajectories_trained,
        "num_contexts_trained": audit.num_contexts_trained,
        "num_tokens_trained": audit.num_tokens_trained,
        "staleness_bound": audit.staleness_bound,
        "staleness_max": audit.staleness_max,
        "staleness_mean": audit.staleness_mean,
        "num_groups_lost": audit.num_groups_lost,
        "num_publications": audit.num_publications,
        "num_lease_attempts": audit.num_lease_attempts,
        "num_reissued": audit.num_reissued,
        "audit_problems": list(audit.problems),
        "reward_by_10_steps": [
            sum(block) / len(block) for i in range(0, len(rewards), 10) if (block := rewards[i : i + 10])
        ],
    }
    atomic_write(run.folder.report, json.dumps(report, indent=2) + "\n")
    return _summary(report, rewards, run)


def _summary(report: Mapping[str, object], rewards: list[float], run: DemoRun) -> str:
    r = report
    return "\n".join(
        (
            "",
            f"reward  {sparkline(rewards, width=90)}  {rewards[0]:.2f} -> {rewards[-1]:.2f} over {len(rewards)} steps",
            f"unseen world, EM sampled at T = 1: {r['em_before']:.3f} -> {r['em_after']:.3f}"
            f"   greedy: {r['em_greedy_before']:.3f} -> {r['em_greedy_after']:.3f}"
            f"   ({r['num_eval_questions']} questions)",
            f"trained {r['num_trajectories_trained']:,} trajectories, {r['num_contexts_trained']:,} contexts, "
            f"{r['num_tokens_trained']:,} tokens; staleness mean {r['staleness_mean']:.2f}, "
            f"max {r['staleness_max']} (bound {r['staleness_bound']}); groups lost {r['num_groups_lost']}",
            f"warm start {r['warm_start_s']:.0f} s, reinforcement learning {r['rl_s']:.0f} s, "
            f"evaluations {r['eval_s']:.0f} s",
            "",
            *_next_commands(run),
        )
    )


def _next_commands(run: DemoRun) -> list[str]:
    """The commands to try next; they work from the current folder as printed."""
    lines = [
        f"next:  {command_line('palimpsest', 'audit', run.run_dir)}",
        f"       {command_line('tensorboard', '--logdir', run.folder.tensorboard)}",
        f"       {command_line('palimpsest', 'demo', '--ablation', 'last-context')}"
        "     (compare with training every context)",
    ]
    if _REAL_QUESTIONS.is_file():
        lines.append(f"       see {_REAL_QUESTIONS} for real questions over Wikipedia")
    return lines
