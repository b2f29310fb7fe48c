"""Sampled tokens, their log-probs, and the ends of sequences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from actor.engine.sampler import sample, uniforms
from actor.engine.sequence import Sampling, Sequence
from tests.engine.conftest import Client, reference_logprobs, sampled_logprobs

PLAIN = Sampling(
    temperature=1.0,
    greedy=False,
    top_p=1.0,
    top_k=None,
    max_new_tokens=10,
    min_new_tokens=0,
    stop_token_ids=frozenset(),
    stop_strings=(),
    skip_special_tokens=True,
    no_stop_trim=False,
    seed=0,
)


def sequence(sampling: Sampling, *, num_output: int = 0) -> Sequence:
    return Sequence("rid", [1], sampling, True, output_ids=[0] * num_output)


def test_sampled_tokens_follow_the_distribution() -> None:
    """With 40,000 seeds, the count of every token is within 4.5 standard deviations of its expectation."""
    num = 40_000
    probs = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.125])
    token_ids, _ = sample(probs.log().expand(num, -1), [sequence(replace(PLAIN, seed=seed)) for seed in range(num)])
    counts = np.bincount(token_ids, minlength=5)
    expected = probs.numpy() * num
    assert counts[2] == 0
    assert (np.abs(counts - expected) <= 4.5 * np.sqrt(expected * (1 - probs.numpy()))).all()


def test_uniforms_are_independent_over_seeds_and_positions() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    draws = uniforms(seeds.ravel(), positions.ravel()).reshape(200, 200)
    assert len(np.unique(draws)) == 200 * 200
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.03


def test_top_k_and_top_p_restrict_the_tokens_and_not_the_logprobs() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    full = probs.log()
    for limited, allowed in (
        (replace(PLAIN, top_k=2), {1, 3}),
        (replace(PLAIN, top_p=0.6), {1, 3}),
        (replace(PLAIN, top_p=0.3), {1}),
    ):
        sequences = [sequence(replace(limited, seed=seed)) for seed in range(300)]
        token_ids, logprobs = sample(full.expand(300, -1), sequences)
        assert set(token_ids) == allowed
        torch.testing.assert_close(torch.tensor(logprobs), full[token_ids])


def test_logprobs_over_a_large_vocabulary_are_exact() -> None:
    """One probable token and 49,151 improbable ones: the importance ratio at age 0 must be 1."""
    logits = torch.full((8, 49_152), -11.0)
    logits[:, 7] = 0.0
    token_ids, logprobs = sample(logits, [sequence(replace(PLAIN, seed=seed)) for seed in range(8)])
    exact = logits[0].double().log_softmax(-1)[token_ids]
    torch.testing.assert_close(torch.tensor(logprobs).double(), exact, rtol=0, atol=1e-6)


def test_min_new_tokens_excludes_stop_tokens() -> None:
    probs = torch.tensor([0.98, 0.01, 0.01])
    seeded = [replace(PLAIN, seed=s, stop_token_ids=frozenset({0}), min_new_tokens=2) for s in range(200)]
    early, _ = sample(probs.log().expand(200, -1), [sequence(s, num_output=1) for s in seeded])
    late, _ = sample(probs.log().expand(200, -1), [sequence(s, num_output=2) for s in seeded])
    assert 0 not in early
    assert 0 in late


async def test_a_seed_gives_the_same_tokens_in_any_batch(client: Client) -> None:
    prompts = [[i, 2 * i % 50, 3] for i in range(24)]
    solo = [await client.generate(p, max_new_tokens=12, sampling_seed=i) for i, p in enumerate(prompts)]
    crowd = await asyncio.gather(
        *(client.generate(p, max_new_tokens=12, sampling_seed=i) for i, p in enumerate(prompts))
    )
    assert [a["output_ids"] for a in crowd] == [a["output_ids"] for a in solo]
    torch.testing.assert_close(
        torch.stack([sampled_logprobs(a) for a in crowd]), torch.stack([sampled_logprobs(a) for a in solo])
    )
    unseeded = await asyncio.gather(*(client.generate([1, 2], max_new_tokens=12) for _ in range(4)))
    assert len({tuple(a["output_ids"]) for a in unseeded}) == 4


async def test_greedy_sampling_is_deterministic_with_logprobs_at_temperature_one(client: Client, folder: Path) -> None:
    one, two = [await client.generate([5, 6, 7], max_new_tokens=8, temperature=0) for _ in range(2)]
    assert one["output_ids"] == two["output_ids"]
    expected = reference_logprobs(folder, [5, 6, 7], one["output_ids"])
    torch.testing.assert_close(sampled_logprobs(one), expected, atol=1e-4, rtol=0)


async def test_finish_reasons(client: Client) -> None:
    free = await client.generate([5, 6, 7], max_new_tokens=12, sampling_seed=1)
    output = free["output_ids"]
    assert free["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    assert free["text"] == " ".join(f"w{token}" for token in output)
    assert (free["meta_info"]["prompt_tokens"], free["meta_info"]["completion_tokens"]) == (3, 12)

    stop = output[4]
    first = output.index(stop)
    same = {"max_new_tokens": 12, "sampling_seed": 1, "stop_token_ids": [stop]}
    stopped = await client.generate([5, 6, 7], **same)
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert stopped["output_ids"] == output[: first + 1]
    assert stopped["text"] == " ".join(f"w{token}" for token in output[:first])
    ignored = await client.generate([5, 6, 7], ignore_eos=True, **same)
    assert ignored["output_ids"] == output
    # As in SGLang, the length is checked before the stop tokens.
    both = await client.generate([5, 6, 7], **(same | {"max_new_tokens": first + 1}))
    assert both["meta_info"]["finish_reason"]["type"] == "length"

    by_text = await client.generate([5, 6, 7], max_new_tokens=12, sampling_seed=1, stop=[f"w{output[3]} w{output[4]}"])
    assert by_text["meta_info"]["finish_reason"] == {"type": "stop", "matched": f"w{output[3]} w{output[4]}"}
    assert by_text["output_ids"] == output[:5]
    assert by_text["text"].strip() == " ".join(f"w{token}" for token in output[:3])

    nothing = await client.generate([5], max_new_tokens=0)
    assert (nothing["output_ids"], nothing["meta_info"]["finish_reason"]["type"]) == ([], "length")


async def test_the_models_eos_token_ends_a_sequence(serve: Callable, make_folder: Callable[..., Path]) -> None:
    model_path = make_folder(seed=0)
    free = await (await serve(model_path)).generate([5, 6, 7], max_new_tokens=12, sampling_seed=1)
    eos = free["output_ids"][2]
    config = (model_path / "config.json").read_text()
    (model_path / "config.json").write_text(config.replace('"eos_token_id": null', f'"eos_token_id": {eos}'))
    answer = await (await serve(model_path)).generate([5, 6, 7], max_new_tokens=12, sampling_seed=1)
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}
