"""The stages of prepare.py: each reads the results of the stages before it in --out, and writes its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click

RUN_TOML = Path(__file__).resolve().parent / "run.toml"
DEFAULT_OUT = RUN_TOML.parents[2] / "runs" / "wiki_pool"
RL_STEPS = 5
"""learner.num_steps of run.toml."""
SHORTER_BY = 100
"""Tokens by which the short traces' contexts are shorter. Training processes four times as many in the same time."""


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's options."""

    data: Path
    out: Path
    encoder: str
    num_questions: int
    num_passages: int
    vocab_size: int
    copying_steps: int
    language_steps: int
    imitation_steps: int
    max_rounds: int
    target_share: float
    num_eval_questions: int
    rl_steps: int
    threads: int
    seed: int

    @property
    def corpus_folder(self) -> Path:
        """The folder with the passages that are used, and their vectors if there are any."""
        return self.out if self.num_questions else self.data

    @property
    def overrides(self) -> tuple[str, ...]:
        """The `--set` arguments of a run on this --out."""
        if self.out.resolve() == DEFAULT_OUT:
            return (f"learner.num_steps={self.rl_steps}",) if self.rl_steps != RL_STEPS else ()
        return (
            f"run.dir={self.out / 'run'}",
            f"model.path={self.out / 'model'}",
            f"task.questions={json.dumps([str(self.out / 'questions_train.jsonl')])}",
            f"task.eval_questions={json.dumps([str(self.out / 'questions_dev.jsonl')])}",
            f"retriever.indexes.wiki_pool={self.out / 'index'}",
            f"learner.num_steps={self.rl_steps}",
        )


def take_data(options: Options) -> None:
    from corpus import copy_questions, write_subset

    if not options.num_questions:
        copy_questions(options.data, options.out)
        return
    write_subset(
        options.data,
        options.out,
        num_train=options.num_questions,
        num_dev=options.num_eval_questions,
        num_passages=options.num_passages,
    )


def build_index(options: Options) -> None:
    from corpus import VECTORS, corpus_in

    folder = options.corpus_folder
    vectors = folder / VECTORS
    given = ["--vectors", str(vectors)] if options.encoder == "minilm" and vectors.is_file() else []
    arguments = [str(corpus_in(folder)), "--out", str(options.out / "index"), "--encoder", options.encoder, *given]
    threads = ["--threads", str(options.threads)]
    subprocess.run([sys.executable, "-m", "learner.launch", "index", *arguments, *threads], check=True)


def make_tokenizer(options: Options) -> None:
    from bpe import train_tokenizer, write_tokenizer
    from corpus import corpus_in, read_passages
    from search_tool import configured_top_n
    from traces import read_examples

    from actor.chat.chatml import plain
    from protocol.atomic_write import atomic_path
    from protocol.config_file import load_config

    tokenizer = train_tokenizer(
        read_passages(corpus_in(options.corpus_folder)),
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
    from corpus import corpus_in, read_passages
    from fit import pretrain
    from pace import Pace
    from tokenizers import Tokenizer

    _set_up_torch(options.threads)
    pretrain(
        options.out / "base",
        tokenizer=Tokenizer.from_file(str(options.out / "tokenizer" / "tokenizer.json")),
        texts=read_passages(corpus_in(options.corpus_folder)),
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
    rounds.run_until(options.target_share, max_rounds=options.max_rounds)


def _set_up_torch(threads: int) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
