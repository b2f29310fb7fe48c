"""The `palimpsest` command. Subcommands are imported when they are called, so `--help` is instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator

import click

# name: (where it is, one line of help)
_COMMANDS = {
    "demo": ("learner.launch.demo:demo", "Show the whole system learn on this machine, in about four minutes."),
    "up": ("learner.launch.up:up", "Start and supervise all roles of a run; run it again to resume."),
    "learner": ("learner.command:learner", "One role: lease questions, train, publish weights."),
    "actor": ("actor.command:actor", "One role: roll out trajectories."),
    "engine": ("actor.engine.command:engine", "One role: serve the policy (or attach to an SGLang server)."),
    "retriever": ("retriever.command:retriever", "One role: serve indexes."),
    "index": ("retriever.command:index", "Corpus -> index folder."),
    "eval": ("actor.command:evaluate", "Accuracy and token cost of the policy that an engine serves."),
    "audit": ("learner.store.audit:audit", "Recompute from the store what was leased, trained, skipped, and how old."),
    "chaos": (
        "learner.launch.chaos:chaos",
        "Kill, stop, slow and cut off processes of a run that goes on; then audit.",
    ),
    "keys": ("learner.launch.keys:keys", "Make CURVE keys for addresses beyond loopback."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="palimpsest")
def cli() -> None:
    """Palimpsest trains language-model agents that rewrite a small memory, by asynchronous reinforcement learning."""


def main() -> None:
    """Exit status: 0 done, 1 a defect or a failed run, 2 bad input, 3 training cannot go on (one sentence each), 130
    Ctrl-C."""
    try:
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BaseException as error:
        known = _known(error)
        if known is None:
            raise
        message, code = known
        click.echo(f"error: {message}", err=True)
        sys.exit(code)
    sys.exit(status if isinstance(status, int) else 0)  # what ctx.exit() was given


def _known(error: BaseException) -> tuple[str, int] | None:
    """(sentence, exit status) of an error raised on purpose, also from inside task groups; None for a defect."""
    from protocol.errors import PalimpsestError, TrainingStopped, UserError

    leaves = list(_leaves(error))
    if not all(isinstance(leaf, PalimpsestError) for leaf in leaves):
        return None
    first = next((leaf for leaf in leaves if isinstance(leaf, UserError)), leaves[0])
    return str(first), 2 if isinstance(first, UserError) else 3 if isinstance(first, TrainingStopped) else 1


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
