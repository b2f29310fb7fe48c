"""The `palimpsest` command. A subcommand's module is imported when it is called, so that `--help` is instant."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator

import click

# name: (module:attribute, one line of help)
_COMMANDS = {
    "demo": (
        "learner.launch.demo:demo",
        "Run the whole system on this machine for about four minutes and see the reward rise.",
    ),
    "up": ("learner.launch.up:up", "Start and supervise all roles of a run; the same command resumes it."),
    "check": ("learner.launch.check:check", "Check everything that can be known before a run is started."),
    "learner": ("learner.command:learner", "One role: lease questions, train, publish weights."),
    "actor": ("actor.command:actor", "One role: roll out trajectories."),
    "engine": ("actor.engine_command:engine", "One role: serve the policy (or attach to an SGLang server)."),
    "retriever": ("retriever.command:retriever", "One role: serve indexes."),
    "index": ("retriever.command:index", "Build an index folder from a corpus."),
    "eval": (
        "learner.launch.eval_command:evaluate",
        "Measure rewards and token counts of a run's checkpoint; starts what it needs.",
    ),
    "evaluator": ("actor.command:evaluator", "One role: take the samples of an evaluation (started by eval)."),
    "audit": (
        "learner.store.audit:audit",
        "Check a run's guarantees: no group lost or trained twice, no token over the staleness bound.",
    ),
    "chaos": (
        "learner.launch.chaos:chaos",
        "Kill, stop, slow down and disconnect processes of a running run; then audit it.",
    ),
    "init": ("learner.launch.init:init", "Write a run file and template code for your own agent."),
    "keys": ("learner.launch.keys:keys", "Make CURVE keys; required if a role listens beyond loopback."),
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
@click.version_option(package_name="palimpsest-rl")
def cli() -> None:
    """Palimpsest trains language-model agents that rewrite a small memory, by asynchronous reinforcement learning."""


def main() -> None:
    """Exit status: 0 success, 1 a bug or a failed run, 2 bad input, 3 training cannot continue, 130 Ctrl-C.

    Bad input, a failed run and a training stop print one sentence; a bug prints its traceback.
    """
    try:
        status = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C would print a traceback at the interpreter's exit
        sys.exit(130)
    except BaseException as error:
        reported = _message_and_status(error)
        if reported is None:
            raise
        message, code = reported
        from learner.launch.command_line import with_runnable_commands

        click.echo(f"error: {with_runnable_commands(message)}", err=True)
        sys.exit(code)
    sys.exit(status if isinstance(status, int) else 0)  # the argument of ctx.exit()


def _message_and_status(error: BaseException) -> tuple[str, int] | None:
    """(message, exit status) of a PalimpsestError or a group of them; None for any other exception (a bug)."""
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
