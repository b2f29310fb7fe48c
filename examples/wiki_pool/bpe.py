"""A byte-level BPE tokenizer with Qwen2's chat tokens, trained on the corpus and on the workflow's texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from script import ENOUGH, FREE_ANSWERS, NOTHING_YET
from search_tool import chat_rendering
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from actor.chat.rendering import Result, ToolCall
from actor.tools.tool import Observation
from protocol.types import Passage

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (PAD, START, END)
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
NUM_BYTES = 256
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's regular expression that splits text into words before merging."""
_QUESTION_COPIES = 20
"""Copies of each question in the training text: the corpus has no questions, so `What` would become W and hat."""
_PROMPT_COPIES = 500
"""Copies of the prompt in the training text: every context has it, so each of its words becomes one or two tokens."""


def train_tokenizer(texts: Iterable[str], *, questions: Iterable[str] = (), vocab_size: int, top_n: int) -> Tokenizer:
    """Control tokens have the first ids, then bytes and merges; tags come last and are ordinary text, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_all_texts(texts, questions, top_n=top_n), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


def word_ids(tokenizer: Tokenizer) -> range:
    """The ids of the merged tokens: all ids except control tokens, single bytes and tags."""
    return range(len(CONTROL) + NUM_BYTES, tokenizer.get_vocab_size() - len(TAGS))


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def fixed_ids(tokenizer: Tokenizer, *, top_n: int) -> frozenset[int]:
    """The ids of the tokens in the workflow's and the script's fixed texts."""
    return frozenset(token for piece in _pieces(top_n) for token in tokenizer.encode(piece).ids)


def _pieces(top_n: int) -> list[str]:
    rendering = chat_rendering(top_n)
    nothing = Passage("", "", "")
    return [
        rendering.prompt("", ""),
        rendering.write_action_search(NOTHING_YET, [""]),
        rendering.observation([Result(ToolCall(""), Observation(passages=(nothing,) * top_n))]),
        rendering.write_memory(""),
        rendering.write_answer(ENOUGH, ""),
        *FREE_ANSWERS,
    ]


def _all_texts(texts: Iterable[str], questions: Iterable[str], *, top_n: int) -> Iterator[str]:
    yield from texts
    for question in questions:
        yield from [question] * _QUESTION_COPIES
    for piece in _pieces(top_n):
        # Control tokens and tags are not words: no merge may be learned across or inside them.
        for token in (*CONTROL, *TAGS):
            piece = piece.replace(token, "\n")
        yield from [piece] * _PROMPT_COPIES
