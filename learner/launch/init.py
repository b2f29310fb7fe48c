"""`palimpsest init DIR`: writes a folder with an agent to edit; it runs without changes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

_FILES = ("agent.py", "run.toml")
# The vocabulary of the skeleton's prompts and questions.
_WORDS = ("look", "up", "answer", ":", "unknown", "red", "green", "blue", "black", "white", "gold")


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--model",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Hugging Face folder to start from.  [default: a tiny untrained model is written to DIR/model]",
)
def init(folder: Path, model: Path | None) -> None:
    """Write a commented run file and template code for your own agent to DIR.

    The template has a task, a tool, a workflow and a reward, and trains in half a minute on a CPU. Existing files are
    not overwritten.
    """
    from learner.launch.command_line import command_line
    from protocol.atomic_write import atomic_write
    from protocol.errors import DataError

    for name in (*_FILES, *(() if model else ("model",))):
        if (folder / name).exists():
            raise DataError(f"{folder / name} already exists: give another DIR, or remove it")
    skeleton = files("learner.launch") / "skeleton"
    for name in _FILES:
        text = (skeleton / name).read_text(encoding="utf-8")
        if name == "run.toml" and model is not None:
            text = text.replace('path = "model"  ', f"path = {str(model.resolve())!r}  ")
        atomic_write(folder / name, text)
    if model is None:
        from learner.model.tiny import make_tiny_model

        make_tiny_model(folder / "model", words=_WORDS)
    click.echo(f"{folder}: agent.py (edit it), run.toml" + ("" if model else ", model (tiny, untrained)"))
    click.echo(f"next:  PYTHONPATH={folder} {command_line('palimpsest', 'up', folder / 'run.toml')}")
