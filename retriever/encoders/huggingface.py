"""Bi-encoders from a Hugging Face folder: E5, BGE, MiniLM and their like, on torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.errors import ConfigError, DataError
from protocol.types import Passage
from retriever.encoders.base import Compute, EncoderSpec, Pooling, passage_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "sentencepiece.bpe.model", "spiece.model", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSettings:
    """How texts become vectors: prefixes, pooling over the last hidden states, tokens kept of a text."""

    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "mean"
    max_tokens: int = 512


class HuggingFaceEncoder:
    """Normalises the pooled last hidden states. Texts run in sub-batches of about equal length."""

    def __init__(
        self,
        *,
        folder: Path,
        source: str,
        settings: HuggingFaceSettings,
        compute: Compute,
    ) -> None:
        """Raises: DataError where the folder has no model or tokenizer, or its positions end before `max_tokens`;
        ConfigError where the device cannot be used.
        """
        self._model, self._tokenizer = _load(folder, compute)
        self._settings = settings
        self._batch_size = compute.batch_size
        positions = getattr(self._model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and settings.max_tokens > positions:
            raise DataError(
                f"max_tokens must be <= {positions}, the positions of the model in {folder}, got {settings.max_tokens}"
            )
        self._spec = EncoderSpec(
            kind="huggingface",
            source=source,
            fingerprint=fingerprint(folder),
            dimension=int(self._model.config.hidden_size),
            query_prefix=settings.query_prefix,
            passage_prefix=settings.passage_prefix,
            pooling=settings.pooling,
            max_tokens=settings.max_tokens,
        )

    @property
    def spec(self) -> EncoderSpec:
        return self._spec

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        return self._encode([self._settings.query_prefix + query for query in queries])

    def encode_passages(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        return self._encode([self._settings.passage_prefix + passage_text(passage) for passage in passages])

    def save_state(self, folder: Path) -> tuple[str, ...]:
        """Nothing: the model stays where it is, and the fingerprint recognises it."""
        return ()

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.empty((len(texts), self._spec.dimension), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            vectors[rows] = self._encode_batch([texts[row] for row in rows])
        return vectors

    def _encode_batch(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            tokens = self._tokenizer(
                texts, padding=True, truncation=True, max_length=self._settings.max_tokens, return_tensors="pt"
            ).to(self._model.device)
            hidden = self._model(**tokens).last_hidden_state
            pooled = _pool(hidden.float(), tokens["attention_mask"], self._settings.pooling)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def _pool(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """[n, L, d] and [n, L] (1 where a token is) to [n, d]."""
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
        raise ConfigError(f"--device {compute.device} cannot be used: {error}; leave it out or use cpu") from None
    return model.eval(), tokenizer


def fingerprint(folder: Path) -> str:
    """sha256 over the config, the tokenizer and the weights, so that it stays when the folder is moved."""
    digest = hashlib.sha256()
    tokenizer = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for path in sorted([folder / "config.json", *tokenizer, *_weight_files(folder)]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
