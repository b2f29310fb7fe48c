"""`TokenData`: the columns of sampled tokens that corrections, losses and token metrics read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenData:
    """N sampled tokens of a batch, or of a micro-batch of whole contexts. All columns are [N].

    Always set; float unless stated otherwise:

    behavior        log-prob under pi_behave, which sampled the token, at the sampling temperature
    advantages      0 for tokens that are not trained
    weight          aggregation weight: the loss is the sum of weight * token loss
    context         int64, the context of each token, 0 .. C - 1
    trajectory      int64, the trajectory of each token, 0 .. T - 1
    age             int64, learner step minus the version that sampled the token
    context_index   int64, the place of the token's context in its trajectory, from 0

    Set for the loss:

    logprobs        log-prob under pi_theta, with gradient
    entropy         entropy of pi_theta at the token, in nats; with gradient only if there is an entropy bonus
    proximal        log-prob under pi_prox, the policy at the start of the step
    importance      w~ >= 0, the importance weight pi_prox / pi_behave after all corrections

    None unless the config asks for them:

    reference       log-prob under the reference policy (KL)
    values          output of the value head, with gradient
    old_values      output of the value head at the start of the step
    returns         targets of the values
    """

    behavior: Tensor
    advantages: Tensor
    weight: Tensor
    context: Tensor
    trajectory: Tensor
    age: Tensor
    context_index: Tensor
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    proximal: Tensor | None = None
    importance: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.behavior)

    def select(self, index: Tensor) -> TokenData:
        """The tokens that `index` (int64 indices or a bool mask) selects."""
        selected: dict[str, Any] = {
            each.name: None if (column := getattr(self, each.name)) is None else column[index] for each in fields(self)
        }
        return TokenData(**selected)

    def column(self, name: str) -> Tensor:
        """The column `name`, which must be set. Raises: ValueError if it is None."""
        if (column := getattr(self, name)) is None:
            raise ValueError(f"token column {name} must be set, got None")
        return column

    @property
    def log_ratio(self) -> Tensor:
        """log(pi_theta / pi_prox) [N], with gradient. Raises: ValueError before the training forward pass."""
        return self.column("logprobs") - self.column("proximal")

    @property
    def log_importance(self) -> Tensor:
        """log(pi_prox / pi_behave) [N], before any correction. Raises: ValueError before pi_prox is known."""
        return self.column("proximal") - self.behavior
