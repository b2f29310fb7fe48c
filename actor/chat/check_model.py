"""What of a model folder's config.json an actor has to agree with, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actor.chat.rendering import Rendering
from actor.chat.tokenizer import Tokenizer
from protocol.errors import ConfigError, DataError
from protocol.framing import describe


class _Fields(BaseModel):
    """config.json has many more; a model of several parts has those of its text in `text_config`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    vocab_size: int | None = Field(default=None, ge=1)
    max_position_embeddings: int | None = Field(default=None, ge=1)
    text_config: _Fields | None = None


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Both None where config.json does not say."""

    vocab_size: int | None
    max_position_embeddings: int | None


def read_limits(folder: Path) -> ModelLimits:
    """Raises: DataError where the folder has no config.json that can be read."""
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


def check_model(folder: Path, *, tokenizer: Tokenizer, rendering: Rendering, context_tokens: int) -> None:
    """What would otherwise fail every episode.

    Raises: DataError where the tokenizer has ids that the model has not, or lacks the rendering's end token;
    ConfigError where contexts are longer than the model's positions.
    """
    limits = read_limits(folder)
    if limits.vocab_size is not None and tokenizer.num_ids > limits.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer's ids must be < vocab_size = {limits.vocab_size} of config.json, the highest is "
            f"{tokenizer.num_ids - 1}: take the tokenizer that the model was trained with"
        )
    if limits.max_position_embeddings is not None and context_tokens > limits.max_position_embeddings:
        raise ConfigError(
            f"workflow.context_tokens must be <= max_position_embeddings = {limits.max_position_embeddings} of "
            f"{folder / 'config.json'}, got {context_tokens}: lower it or take a model of longer contexts"
        )
    tokenizer.token_id(rendering.end_token)
