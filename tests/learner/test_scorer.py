from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from learner.batch.packing import pack, split
from learner.model.attention import to_device
from learner.model.scorer import Scorer
from tests.learner.forests import (
    FAMILIES,
    Ids,
    every_token,
    grown,
    model_of,
    norm_in_fp64,
    plain_attention,
    plain_logprobs,
)

__all__ = ["norm_in_fp64"]


class Case:
    """Contexts, their trained tokens, and the weights of the trained tokens."""

    def __init__(self, seed: int, *, num_contexts: int = 12) -> None:
        rng = np.random.default_rng(seed)
        contexts = grown(rng, num_contexts=num_contexts, stretches=(2, 15, 60))
        contexts = [np.append(each, number % 3) for number, each in enumerate(contexts)]
        self.contexts = [*contexts, contexts[0], contexts[0][:10]]
        context, position, token_id = every_token(self.contexts)
        trained = rng.random(len(context)) < 0.5  # random: a shared token is trained in some contexts only
        trained |= position == np.array([len(each) - 1 for each in self.contexts])[context]
        self.context, self.position, self.token_id = context[trained], position[trained], token_id[trained]
        self.weight = torch.from_numpy(rng.normal(size=len(self.context)))
        self.entropy_weight = torch.from_numpy(rng.normal(size=len(self.context)))

    def loss(self, logprob: Tensor, entropy: Tensor, at: Ids | slice = slice(None)) -> Tensor:
        return (logprob * self.weight[at] + entropy * self.entropy_weight[at]).sum()

    def packed(self, scorer: Scorer, chosen: Ids, *, share: bool) -> tuple[Tensor, Ids]:
        """(logprobs of the chosen contexts' trained tokens, their indices); accumulates gradients."""
        row = pack([self.contexts[c][:-1] for c in chosen], share=share)
        at = np.flatnonzero(np.isin(self.context, chosen))
        local = np.argsort(chosen)[np.searchsorted(np.sort(chosen), self.context[at])]
        placement = row.place(local, self.position[at], self.token_id[at])
        source, target, gather = map(torch.from_numpy, (placement.source, placement.target, placement.gather))
        scores = scorer(to_device(row, "cpu"), source, target, temperature=0.7, entropy_grad=True)
        self.loss(scores.logprob[gather], scores.entropy[gather], at).backward()
        return scores.logprob[gather].detach(), at

    def separately(self, model: PreTrainedModel) -> Tensor:
        """logprobs of the trained tokens, one forward per context; accumulates gradients."""
        with plain_attention(model):
            scores = [plain_logprobs(model, each, temperature=0.7) for each in self.contexts]
        first = np.cumsum([0] + [len(each) - 1 for each in self.contexts])
        at = first[self.context] + self.position - 1
        logprob, entropy = (torch.cat(parts)[at] for parts in zip(*scores, strict=True))
        self.loss(logprob, entropy).backward()
        return logprob.detach()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], *, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert (found[name] - each).norm() <= tolerance * each.norm(), name


@pytest.mark.usefixtures("norm_in_fp64")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_scores_and_gradients_equal_separate_forwards(
    family: str, checkpointing: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model, case = model_of(family, dtype=dtype), Case(0)
    wanted, wanted_gradients = case.separately(model), gradients(model)
    scorer = Scorer(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    for share in (True, False):
        found, _ = case.packed(scorer, np.arange(len(case.contexts)), share=share)
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
        assert_same(gradients(model), wanted_gradients, tolerance=tolerance)


@pytest.mark.usefixtures("norm_in_fp64")
@pytest.mark.parametrize(("budget", "num_ranks", "seed"), [(1, 1, 1), (150, 2, 2), (400, 3, 3)])
def test_gradient_does_not_depend_on_order_and_split(budget: int, num_ranks: int, seed: int) -> None:
    model, case = model_of(dtype=torch.float64), Case(seed)
    wanted, wanted_gradients = case.separately(model), gradients(model)
    scorer = Scorer(model)
    found = torch.empty_like(wanted)
    parts = split([each[:-1] for each in case.contexts], budget=budget, num_ranks=num_ranks)
    for part in [each for rank in parts for each in rank if len(each)]:
        logprob, at = case.packed(scorer, np.random.default_rng(seed).permutation(part), share=True)
        found[at] = logprob
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert_same(gradients(model), wanted_gradients, tolerance=1e-12)


def test_a_value_is_computed_from_the_hidden_state_before_the_token() -> None:
    model = model_of()
    scorer = Scorer(model, with_value_head=True)
    context = np.arange(12)
    row, source = pack([context]), torch.tensor([3, 7])
    first = scorer(to_device(row, "cpu"), source, source + 1)
    assert first.value is not None
    assert not first.value.any()
    assert scorer.value_head is not None
    torch.nn.init.ones_(scorer.value_head.weight)
    with plain_attention(model):
        hidden = model.get_decoder()(input_ids=torch.from_numpy(context)[None]).last_hidden_state[0]
    value = scorer(to_device(row, "cpu"), source, source + 1).value
    torch.testing.assert_close(value, hidden[source].sum(dim=1), rtol=1e-5, atol=1e-5)


def test_an_empty_pack_gives_every_parameter_a_zero_gradient() -> None:
    scorer, none = Scorer(model_of(), with_value_head=True), torch.zeros(0, dtype=torch.int64)
    scores = scorer(to_device(pack([]), "cpu"), none, none)
    assert scores.value is not None
    (scores.logprob.sum() + scores.value.sum()).backward()
    for name, each in scorer.named_parameters():
        assert each.grad is not None, name
        assert not each.grad.any()


class PeakActivations(TorchDispatchMode):
    """Peak bytes of the tensors created inside, without those of a parameter's size (gradients)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._known = {each.untyped_storage()._cdata for each in model.parameters()}
        self._gradient_bytes = {each.untyped_storage().nbytes() for each in model.parameters()}
        self._alive = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self._follow(each.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known or storage.nbytes() in self._gradient_bytes:
            return
        self._known.add(storage._cdata)
        self._alive += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._alive)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size


def peak_bytes(*, vocab_size: int = 1000, length: int = 500, num_tokens: int = 4000) -> int:
    """Peak of forward and backward of `num_tokens` unique tokens, a quarter scored, in contexts of `length`."""
    model = model_of(vocab_size=vocab_size)
    scorer = Scorer(model)
    rng = np.random.default_rng(0)
    row = pack([rng.integers(0, 40, size=length) for _ in range(num_tokens // length)])
    inputs, source = to_device(row, "cpu"), torch.arange(0, num_tokens, 4)
    with PeakActivations(model) as peak:
        scorer(inputs, source, source % 40).logprob.sum().backward()
    return peak.peak_bytes


def test_peak_memory_is_independent_of_vocabulary_size_and_context_length() -> None:
    usual = peak_bytes()
    assert usual > 4000 * 32 * 4 * 20  # activations are counted
    assert peak_bytes(vocab_size=150_000) <= 1.1 * usual
    assert peak_bytes(length=1000) <= 1.1 * usual
    assert peak_bytes(num_tokens=8000) > 1.5 * usual
