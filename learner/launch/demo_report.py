"""The demo's report.json, and what is printed of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from learner.launch.view import Steps, sparkline
from learner.store.audit import audit_run
from learner.store.run_folder import RunFolder
from protocol.config import Config


def relative(path: Path) -> Path:
    """As a person would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def finish(
    config: Config, *, seed: int, num_steps: int, before: Path, after: Path, seconds: Mapping[str, float]
) -> str:
    """Writes RUN/report.json from the evaluations, the audit of the store and the metrics; the text to print."""
    run_dir = config.run.dir
    audit = audit_run(run_dir)
    evaluations = {name: json.loads(path.read_text()) for name, path in (("before", before), ("after", after))}
    steps = Steps(RunFolder(run_dir).metrics)
    steps.refresh()
    rewards = [steps.by_step[step]["reward/mean"] for step in sorted(steps.by_step)]
    report = {
        "seed": seed,
        "num_steps": num_steps,
        "ablation": config.learner.ablation,
        "em_before": evaluations["before"]["sampled"]["em"],
        "em_after": evaluations["after"]["sampled"]["em"],
        "em_greedy_before": evaluations["before"]["greedy"]["em"],
        "em_greedy_after": evaluations["after"]["greedy"]["em"],
        "num_eval_questions": evaluations["after"]["sampled"]["num_questions"],
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
    (run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return _text(report, rewards, relative(run_dir))


def _text(report: Mapping[str, object], rewards: list[float], run_dir: Path) -> str:
    r = report
    return "\n".join(
        (
            "",
            f"reward  {sparkline(rewards, width=90)}  {rewards[0]:.2f} -> {rewards[-1]:.2f} over {len(rewards)} steps",
            f"unseen world, EM sampled at T = 1: {r['em_before']:.3f} -> {r['em_after']:.3f}"
            f"   greedy: {r['em_greedy_before']:.3f} -> {r['em_greedy_after']:.3f}"
            f"   ({r['num_eval_questions']} questions)",
            f"trained {r['num_trajectories_trained']:,} trajectories, {r['num_contexts_trained']:,} contexts, "
            f"{r['num_tokens_trained']:,} tokens; ages mean {r['staleness_mean']:.2f}, max {r['staleness_max']} of at "
            f"most {r['staleness_bound']}; groups lost {r['num_groups_lost']}",
            f"warm start {r['warm_start_s']:.0f} s, reinforcement learning {r['rl_s']:.0f} s, "
            f"evaluations {r['eval_s']:.0f} s",
            "",
            f"next:  palimpsest audit {run_dir}",
            f"       tensorboard --logdir {run_dir}/tensorboard",
            "       palimpsest demo --ablation last-context     (what training every context is worth)",
            "       palimpsest up examples/wiki_pool/run.toml   (real questions over Wikipedia; see its README)",
        )
    )
