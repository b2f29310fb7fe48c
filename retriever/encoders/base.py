"""The base class of encoders, which turn texts into vectors, and the record of an encoder in an index's manifest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from protocol.config_base import Options
from protocol.types import Passage

HUGGINGFACE = "huggingface"


class EncoderSpec(BaseModel):
    """Everything that decides an encoder's vectors; stored in an index's manifest.

    use          a built-in name or an import path `package.module:Name`
    options      the encoder's validated options, with their defaults and with absolute paths
    fingerprint  identifies the model, independent of its folder; "" if the encoder defines none
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: str
    options: dict[str, JsonValue]
    fingerprint: str
    dimension: Annotated[int, Field(ge=1)]

    @property
    def source(self) -> str:
        """The encoder as `--encoder` names it: the model folder of a Hugging Face encoder, else `use`."""
        return str(self.options["folder"]) if self.use == HUGGINGFACE else self.use


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """The device, precision, threads and batch size of a model.

    It is not recorded in an index: MiniLM's bfloat16 and float32 vectors of a text have a cosine of 1 - 3e-5.
    On CPUs with bfloat16 instructions bfloat16 is two to three times as fast as float32, on others slower. On a CPU,
    batches of more than 32 texts are hardly faster.
    """

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: int = 1
    batch_size: int = 32


class Encoder(ABC):
    """Maps texts to vectors of unit length, so that an inner product is a cosine.

    palimpsest index      Encoder(options, compute=…) ─► fit(passages)      ─► encode_passages … ─► save_state(folder)
    palimpsest retriever  Encoder(options, compute=…) ─► load_state(folder) ─► encode_queries …

    A subclass may define a class attribute `Options`, a subclass of `protocol.config_base.Options`: the options that
    its constructor gets. It raises a `protocol.errors.UserError` if it cannot be used. One thread uses it at a time.
    """

    @abstractmethod
    def __init__(self, options: Options, *, compute: Compute) -> None: ...

    @property
    @abstractmethod
    def dimension(self) -> int:
        """The length of a vector. It is read after `fit` or `load_state`."""

    @property
    def fingerprint(self) -> str:
        """A digest of the model and of the state, read after `fit` or `load_state`; "" if the encoder defines none.

        The retriever refuses an index whose recorded fingerprint differs, and shares one encoder between indexes
        whose options and non-empty fingerprint are equal.
        """
        return ""

    def fit(self, passages: Iterable[Passage]) -> None:
        """Learns from the passages of the corpus, such as a vocabulary. Called once, before passages are encoded."""

    @abstractmethod
    def encode_passages(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """float32 [len(passages), dimension], rows of unit length."""

    @abstractmethod
    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """float32 [len(queries), dimension], rows of unit length; zeros for a query without a known word."""

    def save_state(self, folder: Path) -> tuple[str, ...]:
        """Writes what `fit` learned into files of the index `folder`; returns the names of the files."""
        return ()

    def load_state(self, folder: Path) -> None:
        """Reads what `save_state` wrote. Raises: DataError if it cannot."""


def passage_text(passage: Passage) -> str:
    """`title. text`, or only the text if the passage has no title."""
    return f"{passage.title}. {passage.text}" if passage.title else passage.text


def normalise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales the rows of [n, d] to unit length; rows of zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)
