"""Makes everything that run.toml needs from a corpus and questions: index, tokenizer, demonstrations, policy.

    corpus, questions ─► index ─► tokenizer ─► demonstrations ─► base: copying, then language
        ─► rounds/1: imitation, measured ─► … until enough trajectories are well formed ─► model

Each stage writes its result to --out and is skipped if the result exists, so a stopped run resumes.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

RUN_TOML = Path(__file__).resolve().parent / "run.toml"
DEFAULT_OUT = RUN_TOML.parents[2] / "runs" / "wiki_pool"
TARGET_SHARE = 0.8
SHORTER_BY = 100
"""Tokens by which the short traces' contexts are shorter. Training processes four times as many in the same time."""
VECTORS = "minilm_passages_fp16.npz"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options."""

    data: Path
    out: Path
    encoder: str
    vocab_size: int
    copying_steps: int
    language_steps: int
    imitation_steps: int
    max_rounds: int
    num_eval_questions: int
    threads: int
    seed: int

    @property
    def corpus(self) -> Path:
        packed = self.data / "corpus.jsonl.gz"
        return packed if packed.is_file() else self.data / "corpus.jsonl"

    @property
    def overrides(self) -> tuple[str, ...]:
        """The `--set` arguments of a run on this --out."""
        if self.out.resolve() == DEFAULT_OUT:
            return ()
        return (
            f"run.dir={self.out / 'run'}",
            f"model.path={self.out / 'model'}",
            f"task.questions={json.dumps([str(self.out / 'questions_train.jsonl')])}",
            f"task.eval_questions={json.dumps([str(self.out / 'questions_dev.jsonl')])}",
            f"retriever.indexes.wiki_pool={self.out / 'index'}",
        )


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder with the corpus.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_OUT, help="Folder to write to."
)
@click.option("--encoder", default="minilm", help="See `palimpsest index --encoder`.")
@click.option("--vocab-size", type=click.IntRange(512), default=8192, help="Tokens of the tokenizer.")
@click.option("--copying-steps", type=click.IntRange(1), default=250, help="Steps on random words.")
@click.option(
    "--language-steps", type=click.IntRange(1), default=60, help="Steps on 16 passages, each with one on copying."
)
@click.option(
    "--imitation-steps", type=click.IntRange(1), default=900, help="Steps of round 1; later rounds have a sixth."
)
@click.option("--max-rounds", type=click.IntRange(1), default=8, help="Rounds of imitation, at most.")
@click.option("--eval-questions", type=click.IntRange(1), default=128, help="Questions to measure a round on.")
@click.option(
    "--threads", type=click.IntRange(1), default=min(2, os.cpu_count() or 1), help="Threads of torch and of the index."
)
@click.option("--seed", type=click.IntRange(0), default=0)
def main(
    data: Path,
    out: Path,
    encoder: str,
    vocab_size: int,
    copying_steps: int,
    language_steps: int,
    imitation_steps: int,
    max_rounds: int,
    eval_questions: int,
    threads: int,
    seed: int,
) -> None:
    """Prepare a run on real questions: DATA has corpus.jsonl(.gz), questions_train.jsonl and questions_dev.jsonl."""
    options = Options(
        data=data,
        out=out.resolve(),
        encoder=encoder,
        vocab_size=vocab_size,
        copying_steps=copying_steps,
        language_steps=language_steps,
        imitation_steps=imitation_steps,
        max_rounds=max_rounds,
        num_eval_questions=eval_questions,
        threads=threads,
        seed=seed,
    )
    from protocol.errors import UserError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        _run_stages(options)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


def _run_stages(options: Options) -> None:
    started_s = time.monotonic()
    for name, made, stage in [
        ("questions", "questions_dev.jsonl", copy_questions),
        ("index", "index", build_index),
        ("tokenizer", "tokenizer", make_tokenizer),
        ("traces", "demonstrations-whole.safetensors", record_traces),
        ("base", "base", train_base),
        ("model", "model", train_policy),
    ]:
        if (options.out / made).exists():
            click.echo(f"{name}: exists, {options.out / made}")
            continue
        click.echo(f"{name} …")
        stage(options)
    from learner.launch.command_line import command_line

    click.echo(f"prepared in {time.monotonic() - started_s:.0f} s. Next:")
    sets = [argument for override in options.overrides for argument in ("--set", override)]
    click.echo(f"  {command_line('palimpsest', 'up', RUN_TOML, *sets)}")


def copy_questions(options: Options) -> None:
    from protocol.errors import DataError

    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("questions_train.jsonl", "questions_dev.jsonl"):
        if not (options.data / name).is_file():
            raise DataError(f"--data {options.data} has no {name}; README.md names the sources of the questions")
        shutil.copyfile(options.data / name, options.out / name)


def build_index(options: Options) -> None:
    vectors = options.data / VECTORS
    given = ["--vectors", str(vectors)] if options.encoder == "minilm" and vectors.is_file() else []
    arguments = [str(options.corpus), "--out", str(options.out / "index"), "--encoder", options.encoder, *given]
    threads = ["--threads", str(options.threads)]
    subprocess.run([sys.executable, "-m", "learner.launch", "index", *arguments, *threads], check=True)


def make_tokenizer(options: Options) -> None:
    from bpe import train_tokenizer, write_tokenizer
    from search_tool import configured_top_n
    from traces import read_examples

    from actor.chat.chatml import plain
    from protocol.atomic_write import atomic_path
    from protocol.config_file import load_config

    tokenizer = train_tokenizer(
        _passages(options.corpus),
        questions=[plain(example.question) for example in read_examples(options.out / "questions_train.jsonl")],
        vocab_size=options.vocab_size,
        top_n=configured_top_n(load_config(RUN_TOML)),
    )
    with atomic_path(options.out / "tokenizer") as folder:
        write_tokenizer(tokenizer, folder)


def record_traces(options: Options) -> None:
    from pace import Pace
    from search_tool import configured_top_n
    from traces import LocalSearch, read_examples, record

    from actor.chat.tokenizer import Tokenizer
    from actor.workflows.demonstrations import save_demonstrations
    from protocol.config_file import load_config
    from retriever.collection import open_collections
    from retriever.encoders.base import Compute
    from retriever.search import Searcher

    tokenizer = Tokenizer.load(options.out / "tokenizer")
    collections = open_collections([str(options.out / "index")], compute=Compute(num_threads=options.threads))
    config = load_config(RUN_TOML)
    whole = config.workflow
    short = whole.model_copy(update={"context_tokens": whole.context_tokens - SHORTER_BY})
    for name, workflow in (("short", short), ("whole", whole)):
        traces = asyncio.run(
            record(
                read_examples(options.out / "questions_train.jsonl"),
                search=LocalSearch(Searcher(collections)),
                tokenizer=tokenizer,
                config=workflow,
                top_n=configured_top_n(config),
                on_progress=Pace(f"{name} traces"),
            )
        )
        click.echo(f"  {traces.num_episodes} episodes of {len(traces.contexts)} contexts; refused:")
        for reason, count in traces.refused.most_common():
            click.echo(f"    {count:4d} {reason}")
        save_demonstrations(options.out / f"demonstrations-{name}.safetensors", traces.contexts)


def train_base(options: Options) -> None:
    from fit import pretrain
    from pace import Pace
    from tokenizers import Tokenizer

    _set_up_torch(options.threads)
    pretrain(
        options.out / "base",
        tokenizer=Tokenizer.from_file(str(options.out / "tokenizer" / "tokenizer.json")),
        texts=_passages(options.corpus),
        copying_steps=options.copying_steps,
        language_steps=options.language_steps,
        seed=options.seed,
        on_copying=Pace("copying").of_steps(options.copying_steps),
        on_language=Pace("language").of_steps(options.language_steps),
    )


def train_policy(options: Options) -> None:
    from rounds import Rounds

    _set_up_torch(options.threads)
    rounds = Rounds(
        out=options.out,
        run_toml=RUN_TOML,
        overrides=options.overrides,
        imitation_steps=options.imitation_steps,
        num_eval_questions=options.num_eval_questions,
        threads=options.threads,
        seed=options.seed,
    )
    rounds.run_until(TARGET_SHARE, max_rounds=options.max_rounds)


def _passages(corpus: Path) -> list[str]:
    """The passages as `title: text`, the form in an observation. Raises: DataError."""
    from actor.chat.chatml import plain
    from protocol.errors import DataError

    try:
        with (gzip.open if corpus.suffix == ".gz" else open)(corpus, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [plain(f"{row.get('title', '')}: {row['text']}") for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the corpus {corpus}: {error!r}; README.md names the sources") from error


def _set_up_torch(threads: int) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
