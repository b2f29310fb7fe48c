"""Renders a trajectory as Markdown, for TensorBoard's text tab."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.types import Context, Trajectory


def render_trajectory(trajectory: Trajectory, contexts: Sequence[str], *, question: str) -> str:
    """Returns Markdown of a trajectory. `contexts`: the decoded text of each of its contexts."""
    head = f"**{question}** → {trajectory.answer!r}, reward {trajectory.reward:.3f}, {trajectory.status}"
    parts = [
        f"Context {number} ({_origin(context)}, {len(context)} tokens)\n\n```\n{text}\n```"
        for number, (context, text) in enumerate(zip(trajectory.contexts, contexts, strict=True), start=1)
    ]
    return "\n\n".join([head, *parts])


def _origin(context: Context) -> str:
    versions = sorted({span.version for span in context.policy_versions})
    return f"{context.role}, versions {', '.join(map(str, versions)) or 'none'}"
