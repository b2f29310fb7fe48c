"""Checks a model folder's config.json against the tokenizer and the context length, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actor.chat.tokenizer import Tokenizer
from protocol.errors import ConfigError, DataError
from protocol.framing import describe


class _Fields(BaseModel):
    """The fields of config.json that are read. A multimodal model has those of its text model in `text_config`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    vocab_size: int | None = Field(default=None, ge=1)
    max_position_embeddings: int | None = Field(default=None, ge=1)
    text_config: _Fields | None = None


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Limits stated in config.json. A field is None if config.json does not have it."""

    vocab_size: int | None
    max_position_embeddings: int | None


def read_limits(folder: Path) -> ModelLimits:
    """Reads config.json. Raises: DataError if the folder has no readable config.json."""
    path = folder / "config.json"
    try:
        fields = _Fields.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; model.path must be a Hugging Face folder") from None
    except ValidationError as error:
        raise DataError(f"{path} cannot be read: {describe(error)}") from None
    text = fields.text_config or fields
    return ModelLimits(
        vocab_size=text.vocab_size or fields.vocab_size,
        max_position_embeddings=text.max_position_embeddings or fields.max_position_embeddings,
    )


def check_model(folder: Path, *, tokenizer: Tokenizer, context_tokens: int) -> None:
    """Checks the tokenizer's ids and the context length. If they exceeded the model's limits, every episode would fail.

    Raises: DataError if the tokenizer has ids that the model does not have; ConfigError if `context_tokens` exceeds the
    model's number of positions.
    """
    limits = read_limits(folder)
    if limits.vocab_size is not None and tokenizer.num_ids > limits.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer's ids must be < vocab_size = {limits.vocab_size} of config.json, the highest is "
            f"{tokenizer.num_ids - 1}: use the tokenizer that the model was trained with"
        )
    if limits.max_position_embeddings is not None and context_tokens > limits.max_position_embeddings:
        raise ConfigError(
            f"workflow.context_tokens must be <= max_position_embeddings = {limits.max_position_embeddings} of "
            f"{folder / 'config.json'}, got {context_tokens}: lower it or use a model with longer contexts"
        )
