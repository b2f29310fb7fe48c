"""The smallest run of the toy task: an untrained model of two layers, one world, no part replaced by a mock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TinyRun:
    config: Path
    model: Path
    index: Path
    run_dir: Path


_CONFIG = """
[run]
name = "tiny"
dir = "run"

[model]
path = "model"

[task]
use = "toy"
worlds = [1]
eval_worlds = [1]

[reward]
use = "em"

[[tool]]
use = "search"
top_n = 2

[workflow]
use = "memsearcher"
rendering = "toy"
max_turns = 2
action_tokens = 8
memory_tokens = 8
context_tokens = 96

[actor]
count = 1
max_trajectories = 8

[engine]
count = 1
max_running_requests = 8

[retriever]
indexes = { world-1 = "index" }

[learner]
num_steps = 2
groups_per_batch = 2
group_size = 2
staleness_bound = 1
checkpoint = { every_steps = 1, keep = 1 }
"""


def make_tiny_run(folder: Path) -> TinyRun:
    """Writes model, tokenizer, corpus, index and run.toml into `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from actor.tasks.toy.task import write_corpus
    from actor.tasks.toy.tokenizer import VOCABULARY_SIZE, write_tokenizer
    from actor.tasks.toy.world import make_world
    from retriever.build_index import build_index
    from retriever.extensions import encoder_section, structure_section

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    write_corpus(folder / "corpus.jsonl", make_world(1))
    build_index(
        corpus=folder / "corpus.jsonl",
        out=folder / "index",
        encoder=encoder_section("bow"),
        structure=structure_section("flat"),
    )
    (folder / "run.toml").write_text(_CONFIG)
    return TinyRun(folder / "run.toml", folder / "model", folder / "index", folder / "run")
