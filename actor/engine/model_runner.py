"""Runs the engine's steps on a transformers model, one packed forward pass each, and replaces its weights in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from actor.engine.kv_cache import ATTENTION_NAME, KVCache, pack, row_attention
from actor.engine.sampler import sample
from actor.engine.scheduler import Step
from actor.engine.weight_loading import apply_weights, match_weights, read_weights
from protocol.errors import DataError, WeightsError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class ModelProperties:
    """Constants of the loaded model. `eos_token_ids` end a sequence unless the request sets `ignore_eos`."""

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: frozenset[int]


class ModelRunner:
    """Runs steps on a model in fp32 on the CPU. Not thread-safe, except for `prepare_weights`."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        num_rows: int,
        context_length: int,
        properties: ModelProperties,
    ) -> None:
        config = model.config
        num_heads: int = config.num_attention_heads
        self._model = model
        self._tokenizer = tokenizer
        self._cache = KVCache.allocate(
            num_layers=config.num_hidden_layers,
            num_rows=num_rows,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            length=context_length,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            dtype=torch.float32,
        )
        self.properties = properties
        self.context_length = context_length

    @classmethod
    def load(cls, folder: Path, *, num_rows: int, context_length: int | None) -> ModelRunner:
        """Loads a Hugging Face folder: config, safetensors weights and tokenizer.

        num_rows        rows of the cache, saved rows included
        context_length  upper limit of the model's own context length

        Raises: DataError (the folder cannot be served).
        """
        tokenizer = _load_tokenizer(folder)
        model = _load_model(folder)
        properties = _properties_of(model, tokenizer)
        longest = properties.max_position_embeddings
        return cls(
            model=model,
            tokenizer=tokenizer,
            num_rows=num_rows,
            context_length=min(context_length or longest, longest),
            properties=properties,
        )

    def run(self, step: Step) -> tuple[list[int], list[float]]:
        """Returns one token and its log-prob for each sequence of the step, decoding sequences first.

        If the model's output for a sequence is not finite, neither is its log-prob, and its cache row is cleared.
        """
        cache, prefixes = self._cache, step.prefix_lengths
        cache.copy(step.saves, length=step.save_length)
        cache.copy(step.moves, length=max((s.num_tokens for s in step.decode), default=0))
        cache.copy(step.loads, length=max(prefixes, default=0))
        packed = [sequence.output_ids[-1] for sequence in step.decode]
        positions = [sequence.num_tokens - 1 for sequence in step.decode]
        last = list(range(len(packed)))
        batch = pack(
            cache,
            decode_lengths=positions,
            prefix_lengths=prefixes,
            prompt_lengths=[sequence.num_tokens for sequence in step.prefill],
        )
        for sequence, prefix in zip(step.prefill, prefixes, strict=True):
            packed += sequence.tokens[prefix:]
            positions += range(prefix, sequence.num_tokens)
            last.append(len(packed) - 1)
        sequences = step.decode + step.prefill
        with torch.inference_mode():
            logits: torch.Tensor = self._model(
                input_ids=torch.tensor([packed]),
                position_ids=torch.tensor([positions]),
                use_cache=False,
                logits_to_keep=torch.tensor(last),
                batch=batch,
            ).logits[0]
            token_ids, logprobs = sample(logits, sequences)
            for row, logprob in enumerate(logprobs):
                if not abs(logprob) < float("inf"):
                    self._cache.clear(row)
        return token_ids, logprobs

    def prepare_weights(self, folder: Path) -> Callable[[], None]:
        """Reads and checks a folder's weights. Returns a function that copies them into the model.

        May be called from another thread: the model does not change before the returned function is called. Raises:
        WeightsError.
        """
        if not folder.is_dir():
            raise WeightsError(f"model_path {str(folder)!r} is not a folder")
        pairs = match_weights(self._model, read_weights(folder))
        return lambda: apply_weights(pairs)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise DataError(f"model folder {folder} does not exist: give a Hugging Face folder")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"model folder {folder} has no tokenizer: save one there with save_pretrained()")
    try:
        if (folder / "tokenizer.json").is_file():
            # AutoTokenizer would replace the decoder in the file with the default of the model's architecture.
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises errors without a common base class
        raise DataError(f"the tokenizer in {folder} cannot be loaded ({error}): save it again") from error


def _load_model(folder: Path) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise DataError(f"model folder {folder} has no config.json: save the model there with save_pretrained()")
    try:
        weights = read_weights(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        layer_types: list[str] = getattr(config, "layer_types", None) or ["full_attention"]
        if other := sorted(set(layer_types) - {"full_attention"}):
            raise DataError(
                f"the model in {folder} has {other[0]} layers: the embedded engine serves full attention only"
            )
        disable_progress_bar()
        AttentionInterface.register(ATTENTION_NAME, row_attention)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, attn_implementation=ATTENTION_NAME
        )
        match_weights(model, weights)
    except (WeightsError, ValueError, OSError, RuntimeError) as error:
        raise DataError(
            f"the model in {folder} cannot be loaded ({error}): save it again with save_pretrained()"
        ) from error
    return model.eval()


def _properties_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelProperties:
    eos: set[int] = set()
    generation = model.generation_config.eos_token_id if model.generation_config is not None else None
    for value in (getattr(model.config, "eos_token_id", None), generation, tokenizer.eos_token_id):
        if isinstance(value, int):
            eos.add(value)
        elif isinstance(value, list):
            eos.update(token_id for token_id in value if isinstance(token_id, int))
    return ModelProperties(
        model_type=model.config.model_type,
        architectures=tuple(model.config.architectures or ()),
        vocab_size=model.config.vocab_size,
        max_position_embeddings=model.config.max_position_embeddings,
        eos_token_ids=frozenset(eos),
    )
