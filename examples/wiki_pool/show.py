"""Prints recorded trajectories turn by turn as Markdown: python examples/wiki_pool/show.py FILE [--id ID] [--status S]

FILE is the samples.jsonl of `palimpsest eval RUN --transcripts`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
_MEMORY = re.compile(r"<memory>\n(.*?)\n?</memory>", re.DOTALL)


@click.command(context_settings={"show_default": True})
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--id", "wanted", help="Only trajectories of this question.")
@click.option("--status", help="Only trajectories with this status, such as completed.")
@click.option("--num", default=1, help="Trajectories to print, at most.")
@click.option("--system", is_flag=True, help="Also print the system message, which is equal in all contexts.")
def main(file: Path, wanted: str | None, status: str | None, num: int, system: bool) -> None:
    """Print trajectories of FILE."""
    shown = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["contexts"] is None:
            raise click.ClickException(f"{file} has no texts: evaluate with --transcripts")
        if shown < num and wanted in (None, row["id"]) and status in (None, row["status"]):
            shown += 1
            click.echo(as_markdown(row, system=system))


def as_markdown(row: dict, *, system: bool) -> str:
    """A trajectory: its question, the memory and messages of each turn, and its result."""
    parts = [f"**{row['question']}** (gold: {'; '.join(row['answers'])})"]
    for turn, context in enumerate(row["contexts"], start=1):
        messages = _MESSAGE.findall(context)
        memory = _MEMORY.search(messages[1][1])
        parts.append(f"### Turn {turn}\n\nMemory at its start: {_quoted(memory[1].strip() if memory else '')}")
        for role, text in messages if system else messages[2:]:
            who = "policy" if role == "assistant" else role
            parts.append(f"{who}:\n\n```text\n{text.strip()}\n```")
    reward = "none" if row["reward"] is None else f"{row['reward']:.2f}"
    stats, reason = row["stats"], f" ({row['reason']})" if row["reason"] else ""
    parts.append(
        f"Ended as `{row['status']}`{reason}, answer `{row['answer']}`, reward {reward}; "
        f"{stats['num_searches']:.0f} searches, {stats['num_generated_tokens']:.0f} tokens generated, "
        f"longest context {stats['peak_context_tokens']:.0f} tokens."
    )
    return "\n\n".join(parts) + "\n"


def _quoted(memory: str) -> str:
    return "\n\n" + "\n".join(f"> {line}  " for line in memory.splitlines()) if memory else "none."


if __name__ == "__main__":
    main()
