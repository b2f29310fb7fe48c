"""Times forward and backward of sum(A log pi) over the same contexts: padded, packed, and packed with shared prefixes.

    python benchmarks/learner.py [--quick] [--rounds 3] [--shapes memsearcher,react]
    python benchmarks/learner.py --device cuda --model 0.5b --dtype bfloat16 --groups 8

padded   rows right-padded to the longest of the batch, the same number of rows per micro-batch, logits at every
         position: the usual GRPO learner. In its fastest form: causal attention without a mask.
packed   contexts concatenated in one row, logits only of trained tokens, in tiles; no shared prefixes
ours     the same, with every common prefix computed once if that is cheaper (learner/batch/packing.py decides)

All use one model with random weights, one dtype and one token budget; planning is included in the time. On a CPU: one
thread, fp32, a Qwen2 with one layer of width 256, in which MLP and output embedding have the same share of the
parameters as in Qwen2.5-0.5B (embedding 28 %; in the 3B model 10 %, so logits at every position cost less there).
Rounds are interleaved and the median is reported: on a CPU of the processor time, which excludes other processes.
`max_rel_error` is the error of ours against padded: log-probs relative to the largest one, each gradient relative to
its norm.
All groups have the same system prompt, each group has its own question; token ids are random. tokens/s counts the
tokens of all contexts, MFU only computed tokens without padding. The CUDA options have not been run on a GPU.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else `import learner` would find this file

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common.shapes import SHAPES, Context, Writer
from learner.batch.packing import Share, pack, split
from learner.model.attention import to_device
from learner.model.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Qwen2 model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


MODELS = {
    "small": Shape(2048, 256, 1408, 1, 4, 2),
    "0.5b": Shape(151936, 896, 4864, 24, 14, 2),
    "3b": Shape(151936, 2048, 11008, 36, 16, 2),
}


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One forward and backward.

    logprobs      float64 [N]  of all trained tokens, by context and position
    gradients     by parameter name
    num_computed  tokens that went through the model, without padding
    """

    logprobs: NDArray[np.float64]
    gradients: dict[str, Tensor]
    num_computed: int
    seconds: float


Computed = tuple[NDArray[np.float64], int]
Method = Callable[[Scorer, list[Context], int], Computed]


def padded(scorer: Scorer, contexts: list[Context], budget: int) -> Computed:
    """Returns (logprobs, number of tokens). Every micro-batch has the same number of rows; `budget` counts padding."""
    device = scorer.model.device
    longest = max(len(each.token_ids) for each in contexts)
    num_rows = max(1, budget // longest)
    logprobs = []
    for start in range(0, len(contexts), num_rows):
        rows = contexts[start : start + num_rows]
        token_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        weight = torch.zeros(token_ids.shape)
        for number, each in enumerate(rows):
            token_ids[number, : len(each.token_ids)] = torch.from_numpy(each.token_ids)
            weight[number, each.trained] = each.advantage
        token_ids, weight = token_ids.to(device), weight.to(device)[:, 1:]
        logits = scorer.model(input_ids=token_ids[:, :-1], use_cache=False).logits.float()
        found = logits.gather(2, token_ids[:, 1:, None]).squeeze(2) - logits.logsumexp(dim=2)
        (found * weight).sum().backward()
        found = found.detach().cpu().double().numpy()
        logprobs += [found[number, each.trained - 1] for number, each in enumerate(rows)]
    return np.concatenate(logprobs), sum(len(each.token_ids) - 1 for each in contexts)


def in_packs(share: Share) -> Method:
    """Returns the method with packed rows, with or without shared prefixes."""

    def run(scorer: Scorer, contexts: list[Context], budget: int) -> Computed:
        device = scorer.model.device
        inputs = [each.token_ids[: each.trained[-1]] for each in contexts]
        logprobs: list[NDArray[np.float64]] = [np.zeros(0)] * len(contexts)
        num_computed = 0
        for chosen in split(inputs, budget=budget, share=share)[0]:
            row = pack([inputs[c] for c in chosen], share=share)
            num_computed += row.num_unique_tokens
            counts = [len(contexts[c].trained) for c in chosen]
            position = np.concatenate([contexts[c].trained for c in chosen])
            targets = np.concatenate([contexts[c].token_ids[contexts[c].trained] for c in chosen])
            placement = row.place(np.repeat(np.arange(len(chosen)), counts), position, targets)
            source, target, gather = (
                torch.from_numpy(each).to(device) for each in (placement.source, placement.target, placement.gather)
            )
            advantages = torch.tensor(np.repeat([contexts[c].advantage for c in chosen], counts), dtype=torch.float32)
            found = scorer(to_device(row, device), source, target).logprob[gather]
            (found * advantages.to(device)).sum().backward()
            parts = np.split(found.detach().cpu().double().numpy(), np.cumsum(counts)[:-1])
            for c, part in zip(chosen, parts, strict=True):
                logprobs[c] = part
        return np.concatenate(logprobs), num_computed

    return run


METHODS: dict[str, Method] = {"padded": padded, "packed": in_packs(False), "ours": in_packs("auto")}


def measure(method: Method, scorer: Scorer, contexts: list[Context], budget: int) -> Pass:
    scorer.zero_grad(set_to_none=True)
    _wait(scorer)
    clock = time.process_time if scorer.model.device.type == "cpu" else time.perf_counter
    start = clock()
    logprobs, num_computed = method(scorer, contexts, budget)
    _wait(scorer)
    seconds = clock() - start
    gradients = {name: each.grad.clone() for name, each in scorer.named_parameters() if each.grad is not None}
    return Pass(logprobs, gradients, num_computed, seconds)


def _wait(scorer: Scorer) -> None:
    if scorer.model.device.type == "cuda":
        torch.cuda.synchronize()


def rel_error(found: Pass, wanted: Pass) -> float:
    """Returns the maximum of: log-prob error / largest log-prob, gradient error norm / gradient norm."""
    of_logprobs = np.abs(found.logprobs - wanted.logprobs).max() / np.abs(wanted.logprobs).max()
    of_gradients = [
        float((found.gradients[name] - each).float().norm() / each.float().norm())
        for name, each in wanted.gradients.items()
    ]
    return max(float(of_logprobs), *of_gradients)


def flops_per_token(scorer: Scorer) -> float:
    """FLOPs per token of forward and backward, without attention and output embedding."""
    embedding = sum(each.numel() for each in scorer.model.get_input_embeddings().parameters())
    return 6.0 * (sum(each.numel() for each in scorer.parameters()) - embedding)


def benchmark(name: str, scorer: Scorer, contexts: list[Context], arguments: argparse.Namespace) -> dict[str, float]:
    """Measures all methods on one shape; prints a line and returns its ratios."""
    passes: dict[str, list[Pass]] = {method: [] for method in METHODS}
    names = list(METHODS)
    for number in range(arguments.rounds):
        for method in names[number % 3 :] + names[: number % 3]:  # rotates the order
            passes[method].append(measure(METHODS[method], scorer, contexts, arguments.budget))
    seconds = {method: statistics.median(each.seconds for each in found) for method, found in passes.items()}
    last = {method: found[-1] for method, found in passes.items()}
    num_tokens = sum(len(each.token_ids) for each in contexts)
    result = {
        "vs_padded": round(seconds["padded"] / seconds["ours"], 2),
        "vs_packed": round(seconds["packed"] / seconds["ours"], 2),
        "max_rel_error": float(f"{rel_error(last['ours'], last['padded']):.1e}"),
        "unique_fraction": round(last["ours"].num_computed / last["packed"].num_computed, 3),
        "tokens_per_s": round(num_tokens / seconds["ours"]),
    }
    if arguments.peak_tflops:
        done = last["ours"].num_computed * flops_per_token(scorer) / seconds["ours"]
        result["mfu"] = round(done / (arguments.peak_tflops * 1e12), 3)
    times = "  ".join(f"{method} {value:7.2f} s" for method, value in seconds.items())
    print(f"{name:12} {len(contexts):4} contexts {num_tokens:7} tokens  {times}  {json.dumps(result)}", flush=True)
    return result


def build(arguments: argparse.Namespace) -> Scorer:
    torch.manual_seed(0)
    config = Qwen2Config(
        **asdict(MODELS[arguments.model]),  # pyright: ignore[reportArgumentType]
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    torch.nn.Module.to(model, arguments.device, getattr(torch, arguments.dtype))
    if arguments.checkpointing:
        model.gradient_checkpointing_enable()
    return Scorer(model.train())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the lengths, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--budget", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, for MFU")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 1
    torch.set_num_threads(1)
    scorer = build(arguments)
    results = {}
    for name in arguments.shapes.split(","):
        rng = np.random.default_rng(arguments.seed)
        writer = Writer(rng, MODELS[arguments.model].vocab_size, divisor=2 if arguments.quick else 1)
        system = writer.text(450)
        contexts = [each for _ in range(arguments.groups) for each in SHAPES[name](writer, system)]
        results[name] = benchmark(name, scorer, contexts, arguments)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
