"""The model's own tokenizer, without torch: `tokenizer.json` of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from protocol.errors import DataError

# Bounds of the cache of encoded texts: about 2,048 texts of at most 4,096 characters.
_NUM_CACHED_TEXTS = 2_048
_MAX_CACHED_CHARS = 4_096


class Tokenizer:
    """Encodes and decodes text without adding or removing special tokens."""

    def __init__(self, fast: FastTokenizer, *, eos_token: str, source: str) -> None:
        self._fast = fast
        self._source = source
        self.eos_token = eos_token
        self.eos_token_id = self.token_id(eos_token)
        self._cached_encode = lru_cache(_NUM_CACHED_TEXTS)(self._encode)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Loads the tokenizer. Raises: DataError if tokenizer.json or tokenizer_config.json is missing or unusable."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"no tokenizer.json in model folder {folder}: save one with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
            raise DataError(f"{path} cannot be read: {error}") from error
        fast.no_truncation()
        fast.no_padding()
        return cls(fast, eos_token=_eos_token(folder / "tokenizer_config.json"), source=str(folder))

    @property
    def num_ids(self) -> int:
        """The highest id + 1; ids may have gaps."""
        return max(self._fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Short texts are cached: the trajectories of a group share their first prompt."""
        return list(self._cached_encode(text)) if len(text) <= _MAX_CACHED_CHARS else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._fast.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int:
        """Returns the id of `token`. Raises: DataError if `token` is not one token of the vocabulary."""
        if (token_id := self._fast.token_to_id(token)) is None:
            raise DataError(
                f"the tokenizer of {self._source} has no token {token!r}: use a model that was trained with it"
            )
        return token_id

    def truncate(self, text: str, num_tokens: int) -> str:
        """The text of the first `num_tokens` tokens, without an incomplete character at its end."""
        ids = self.encode(text)
        if len(ids) <= num_tokens:
            return text
        return self.decode(ids[:num_tokens]).rstrip("\N{REPLACEMENT CHARACTER}")


def _eos_token(path: Path) -> str:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error}): it must name the eos_token") from error
    token = value.get("content") if isinstance(value, dict) else value
    if not isinstance(token, str):
        raise DataError(f"{path}: eos_token must be a string, got {value!r:.80}")
    return token
