"""Lines of metrics.jsonl as the learner writes them."""

from __future__ import annotations

import json


def metrics_line(step: int, reward: float) -> str:
    """A line of metrics.jsonl, without its end; every other metric is 1."""
    names = (
        "reward/em policy/entropy staleness/mean staleness/max rollout/tokens_per_s rollout/contexts "
        "rollout/context_tokens learner/tokens_per_s learner/step_s learner/publish_s learner/wait_s"
    )
    return json.dumps({"step": step, "reward/mean": reward, **dict.fromkeys(names.split(), 1.0)})
