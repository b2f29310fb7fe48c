"""What an encoder is: texts in, normalised vectors out, and a spec that says exactly how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from protocol.types import Passage

Pooling = Literal["mean", "cls"]


class EncoderSpec(BaseModel):
    """All that decides an encoder's vectors; stored in an index's manifest.

    `source` says where the encoder was found (`minilm`, `bow` or a folder) and is the one field that two equal
    encoders may differ in: `fingerprint` (sha256 over the model's files, or over the vocabulary) is what identifies it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["huggingface", "bow"]
    source: str
    fingerprint: str
    dimension: int
    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Where and how a model runs. It is no part of the spec: bfloat16 moves a MiniLM vector by 3e-5 of a cosine.

    On CPUs with bfloat16 instructions that dtype is two to three times as fast, on others slower. Batches of more than
    32 texts gain little on a CPU.
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = 1
    batch_size: int = 32


class Encoder(Protocol):
    """Maps texts to rows of unit length, so that an inner product is a cosine."""

    @property
    def spec(self) -> EncoderSpec: ...

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """float32 [len(queries), dimension], normalised; a row of zeros where nothing in the query is known."""
        ...

    def encode_passages(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """float32 [len(passages), dimension], normalised."""
        ...

    def save_state(self, folder: Path) -> tuple[str, ...]:
        """Writes what the encoder needs besides `spec.source` to be opened again; returns the names of the files."""
        ...


def passage_text(passage: Passage) -> str:
    """`title. text`, or the text alone where there is no title."""
    return f"{passage.title}. {passage.text}" if passage.title else passage.text


def normalise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [n, d] to unit length; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)
