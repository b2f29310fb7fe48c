"""The toy's tokenizer: one token per word and per syllable of a name; saved as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from actor.tasks.toy.world import RELATIONS, SYLLABLES

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
MARKERS = ("<question>", "<memory>", "<think>", "<search>", "<answer>", "<information>")
WORDS = ("what", "is", "?", ".", "none")
VOCABULARY_SIZE = 98


def vocabulary() -> tuple[str, ...]:
    """The tokens in the order of their ids: pad 0, end 1, markers, words, relations, syllables, reserved tokens."""
    used = (PAD, END, UNKNOWN, *MARKERS, *WORDS, *RELATIONS, *SYLLABLES)
    return used + tuple(f"<reserve{k}>" for k in range(VOCABULARY_SIZE - len(used)))


def syllable_ids() -> range:
    """The ids of the syllables of names. A permutation of them renames entities and changes nothing else."""
    first = vocabulary().index(SYLLABLES[0])
    return range(first, first + len(SYLLABLES))


def symbol_ids() -> range:
    """The ids of words, relations and syllables, without markers and reserved tokens."""
    return range(vocabulary().index(WORDS[0]), syllable_ids().stop)


def build_tokenizer() -> Tokenizer:
    """Words are split at spaces and names into syllables; decoding writes the syllables of a name as one word.

    `encode(decode(ids)) == ids` for all ids except `<unk>`.
    """
    tokens = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({token: k for k, token in enumerate(tokens)}, unk_token=UNKNOWN))
    syllable = f"(?:{'|'.join(SYLLABLES)})"
    word_or_syllable = Regex(rf"(?!{syllable}+(?!\S))\S+|{syllable}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(word_or_syllable, behavior="isolated")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"\z"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(rf"(?<=\b{syllable}) (?={syllable} )"), ""),
            decoders.Replace(Regex(r" \z"), ""),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, END)])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
