"""Supervised fine-tuning on demonstrations: next-token loss on the tokens that a demonstrator wrote.

A file of demonstrations is safetensors with three flat arrays, contexts concatenated:
token_ids int32 [N], loss_mask bool [N], offsets int64 [C + 1] with context c at [offsets[c], offsets[c + 1]).
Its metadata may give ranges of ids as `start:stop`: `symbols`, the ids that texts consist of, and `permutable`, those
of them whose meaning is defined only within a context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from learner.training.optimizer import apply_update, build_optimizer, learning_rate
from protocol.errors import ConfigError, DataError
from protocol.learner_config import OptimizerConfig

OnProgress = Callable[[str, int, float], None]
"""Called after every step with (phase, steps done, mean loss of the last steps)."""

_WINDOW = 8
"""Number of batches whose contexts are sorted by length together, so that random batches need little padding."""
_MEAN_STEPS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Demonstrations:
    """C contexts. token_ids int32 [N], loss_mask bool [N], offsets int64 [C + 1]; ranges of ids, None if not given."""

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    symbols: range | None = None
    permutable: range | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 [C]"""
        return np.diff(self.offsets)

    @classmethod
    def load(cls, path: Path) -> Demonstrations:
        """Reads a file of the format above. Raises: DataError if it has another format."""
        try:
            with safe_open(path, framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                ranges = {name: _parse_range(text) for name, text in (file.metadata() or {}).items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"cannot read demonstrations from {path}: {error}; write them again") from None
        missing = {"token_ids", "loss_mask", "offsets"} - arrays.keys()
        if missing:
            raise DataError(f"demonstrations {path} lack the array {min(missing)!r}; write them again")
        ids, mask = arrays["token_ids"].astype(np.int32), arrays["loss_mask"].astype(np.bool_)
        offsets = arrays["offsets"].astype(np.int64)
        whole = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(ids) == len(mask)
        if not whole or (np.diff(offsets) < 2).any():
            raise DataError(
                f"the offsets of demonstrations {path} must cut its {len(ids)} tokens into contexts of at least 2; "
                "write them again"
            )
        return cls(ids, mask, offsets, symbols=ranges.get("symbols"), permutable=ranges.get("permutable"))


class NextTokenFit:
    """Minimises the next-token loss with AdamW, one batch per step."""

    def __init__(self, model: PreTrainedModel, config: OptimizerConfig, *, num_steps: int) -> None:
        self._model = model
        self._config = config
        self._project = cast(nn.Module, model.get_output_embeddings())
        self._optimizer = build_optimizer(model, config)
        self._num_steps = num_steps
        self._losses: list[float] = []
        model.train()

    @property
    def num_steps_done(self) -> int:
        return len(self._losses)

    @property
    def mean_loss(self) -> float:
        """The mean of the last 20 steps; infinite before the first."""
        return float(np.mean(self._losses[-_MEAN_STEPS:])) if self._losses else float("inf")

    def step(self, token_ids: NDArray[np.int64], loss_mask: NDArray[np.bool_]) -> None:
        """One update. token_ids, loss_mask [B, L]: the loss is over the tokens with a true mask.

        Rows are padded on the right, so causal attention alone hides padding from every trained token.
        """
        ids, mask = torch.from_numpy(token_ids), torch.from_numpy(loss_mask)[:, 1:]
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        loss = functional.cross_entropy(self._logits(ids, mask).float(), ids[:, 1:][mask])
        loss.backward()
        rate = learning_rate(self.num_steps_done, num_steps=self._num_steps, config=self._config)
        apply_update(self._model, self._optimizer, rate=rate, clip_norm=self._config.clip_norm)
        self._losses.append(float(loss.detach()))

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """float [trained tokens, V]: logits are computed only for trained tokens."""
        hidden = self._model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return self._project(hidden[:, :-1][mask])


def supervised_finetune(
    model: PreTrainedModel,
    demonstrations: Demonstrations,
    *,
    steps: int,
    batch_size: int = 32,
    optimizer: OptimizerConfig,
    permute: range | None = None,
    seed: int,
    on_progress: OnProgress | None = None,
) -> float:
    """Trains `model` in place and returns the mean loss of the last steps.

    permute: in every context of every batch, these ids are permuted at random, so that their meaning cannot be
             memorised, only read from the context
    Raises: ConfigError if `permute` is not within the vocabulary.
    """
    vocabulary = int(model.config.vocab_size)
    if permute is not None and not 0 <= permute.start <= permute.stop <= vocabulary:
        raise ConfigError(f"permute must lie within the vocabulary of {vocabulary} ids, got {permute}")
    rng = np.random.default_rng([seed, 0x5F7])
    fit = NextTokenFit(model, optimizer, num_steps=steps)
    batches = _batches(demonstrations.lengths, batch_size=batch_size, rng=rng)
    for _ in range(steps):
        ids, mask = padded(demonstrations, next(batches))
        fit.step(ids if permute is None else permuted(ids, permute, rng), mask)
        if on_progress is not None:
            on_progress("imitation", fit.num_steps_done, fit.mean_loss)
    return fit.mean_loss


def padded(demonstrations: Demonstrations, contexts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Right-padded ids int64 [B, L] and mask bool [B, L] of the contexts; padding is id 0, never trained."""
    lengths = demonstrations.lengths[contexts]
    filled = np.arange(int(lengths.max())) < lengths[:, None]
    ids, mask = np.zeros(filled.shape, dtype=np.int64), np.zeros(filled.shape, dtype=np.bool_)
    spans = [slice(demonstrations.offsets[c], demonstrations.offsets[c + 1]) for c in contexts]
    ids[filled] = np.concatenate([demonstrations.token_ids[span] for span in spans])
    mask[filled] = np.concatenate([demonstrations.loss_mask[span] for span in spans])
    return ids, mask


def permuted(token_ids: NDArray[np.int64], permute: range, rng: np.random.Generator) -> NDArray[np.int64]:
    """`token_ids` [B, L] with the ids in `permute` permuted at random, with another permutation per row."""
    size = max(permute.stop, int(token_ids.max()) + 1)
    mapping = np.tile(np.arange(size), (len(token_ids), 1))
    mapping[:, permute.start : permute.stop] = rng.permuted(mapping[:, permute.start : permute.stop], axis=1)
    return np.take_along_axis(mapping, token_ids, axis=1)


def _parse_range(text: str) -> range | None:
    start, colon, stop = text.partition(":")
    return range(int(start), int(stop)) if colon and start.isdigit() and stop.isdigit() else None


def _batches(lengths: NDArray[np.int64], *, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Endless batches of context indices; each context once per epoch."""
    window = _WINDOW * batch_size
    while True:
        order = rng.permutation(len(lengths))
        batches: list[NDArray[np.int64]] = []
        for at in range(0, len(order), window):
            bucket = order[at : at + window]
            bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
            batches += [bucket[k : k + batch_size] for k in range(0, len(bucket), batch_size)]
        for k in rng.permutation(len(batches)):
            yield batches[k]
