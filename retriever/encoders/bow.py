"""A bag of words weighted by inverse document frequency: the encoder of the toy world, which needs no model.

A word is a maximal run of characters other than whitespace; case and punctuation count. A vector has one entry for
each distinct word of the corpus, so this encoder is for small vocabularies: the toy world has about 870 words.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from protocol.config_base import Options
from protocol.errors import DataError
from protocol.types import Passage
from retriever.encoders.base import Compute, Encoder, normalise

STATE_FILE = "bow.json"
MAX_NUM_WORDS = 8192


class BagOfWordsEncoder(Encoder):
    """weight(word, text) = occurrences · idf(word), with idf = ln((1 + n) / (1 + df)) + 1 over n passages."""

    def __init__(self, options: Options | None = None, *, compute: Compute | None = None) -> None:
        self._set_words({})

    def fit(self, passages: Iterable[Passage]) -> None:
        """Learns the vocabulary and the idf. Raises: DataError if there are more than `MAX_NUM_WORDS` words."""
        num_passages = 0
        passages_with: Counter[str] = Counter()
        for passage in passages:
            num_passages += 1
            passages_with.update(set(_words(passage)))
            if len(passages_with) > MAX_NUM_WORDS:
                raise DataError(
                    f"the bow encoder takes at most {MAX_NUM_WORDS} distinct words and this corpus has more "
                    f"(passage {passage.id!r} exceeds the bound); use --encoder minilm or a model folder"
                )
        self._set_words(
            {word: math.log((1 + num_passages) / (1 + passages_with[word])) + 1 for word in sorted(passages_with)}
        )

    def save_state(self, folder: Path) -> tuple[str, ...]:
        (folder / STATE_FILE).write_bytes(self._state)
        return (STATE_FILE,)

    def load_state(self, folder: Path) -> None:
        """Raises: DataError if `bow.json` of the index folder is missing or damaged."""
        path = folder / STATE_FILE
        try:
            self._set_words({str(word): float(idf) for word, idf in orjson.loads(path.read_bytes())})
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"cannot read the bow encoder's words from {path}: {error}; build the index again"
            ) from None

    @property
    def dimension(self) -> int:
        return len(self._idf)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._state).hexdigest()

    def encode_passages(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        return self._encode([_words(passage) for passage in passages])

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        return self._encode([query.split() for query in queries])

    def _set_words(self, idf_by_word: dict[str, float]) -> None:
        self._column = {word: column for column, word in enumerate(idf_by_word)}
        self._idf = np.fromiter(idf_by_word.values(), dtype=np.float32, count=len(idf_by_word))
        self._state = orjson.dumps(list(idf_by_word.items()))

    def _encode(self, texts: Sequence[list[str]]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), len(self._idf)), dtype=np.float32)
        for row, words in enumerate(texts):
            for word in words:
                column = self._column.get(word)
                if column is not None:
                    vectors[row, column] += self._idf[column]
        return normalise(vectors)


def _words(passage: Passage) -> list[str]:
    return [*passage.title.split(), *passage.text.split()]
