"""Builds an actor from a config and runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import click

from actor.chat.check_model import check_model
from actor.chat.tokenizer import Tokenizer
from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Timeouts
from actor.extensions import Extensions, make_extensions
from actor.rollout import Episodes, GroupRollout
from actor.runner import Runner
from actor.tasks.task import Split, Task
from actor.tools.search_client import SearchClient
from actor.tools.tool import Services
from protocol.addresses import tcp_address
from protocol.config import Config
from protocol.config_file import require_ports
from protocol.messages import EngineFields
from protocol.resident_memory import resident_mb
from protocol.run_identity import actor_identity
from protocol.transport import Transport

# Only the most frequent kinds of failures are sent: a heartbeat has at most 64 counters.
_MAX_FAILURE_KINDS = 16


@dataclass(frozen=True, slots=True)
class Parts:
    """The objects that roll out trajectories, in training and in evaluation."""

    transport: Transport
    pool: EnginePool
    task: Task
    episodes: Episodes


async def open_parts(
    config: Config,
    stack: AsyncExitStack,
    *,
    split: Split,
    sampling: SamplingParams,
    run_id: str | None,
    max_trajectories: int,
) -> Parts:
    """Creates and starts the extensions, the transport and the pool; `stack` closes them. Raises: UserError."""
    tokenizer = Tokenizer.load(config.model.path)
    check_model(config.model.path, tokenizer=tokenizer, context_tokens=config.workflow.context_tokens)
    transport = Transport(keys=config.network.keys)
    stack.callback(transport.close)
    services = Services(searcher=await _open_searcher(config, transport, stack))
    extensions = make_extensions(config, split=split, services=services)
    extensions.workflow.check(tokenizer)
    await _start(extensions, stack)
    pool = await stack.enter_async_context(
        EnginePool(
            run_id=run_id,
            api_key=config.network.api_key(),
            timeouts=Timeouts(generate_s=config.actor.request_timeout_s),
        )
    )
    episodes = Episodes(
        workflow=extensions.workflow,
        reward=extensions.reward,
        pool=pool,
        tokenizer=tokenizer,
        sampling=sampling,
        run_id=run_id,
        max_context_tokens=config.workflow.context_tokens,
        max_trajectories=max_trajectories,
    )
    return Parts(transport, pool, extensions.task, episodes)


async def _open_searcher(config: Config, transport: Transport, stack: AsyncExitStack) -> SearchClient | None:
    """Opens a client of the run's retriever. Returns None if the run has no retriever."""
    if not config.retriever.indexes and not config.retriever.port:
        return None
    client = SearchClient(
        transport=transport,
        address=tcp_address(host=config.network.host, port=config.retriever.port),
        timeout_s=config.actor.search_timeout_s,
    )
    return await stack.enter_async_context(client)


async def _start(extensions: Extensions, stack: AsyncExitStack) -> None:
    for extension in (*extensions.tools.values(), extensions.reward):
        await extension.start()
        stack.push_async_callback(extension.stop)


async def run_actor(config: Config, *, name: str, drain: asyncio.Event | None = None) -> None:
    """Runs until the learner ends the run, or until the actor has drained after `drain` was set.

    Raises: UserError (bad config, task files, tokenizer, keys, extensions).
    """
    async with AsyncExitStack() as stack:
        sampling = SamplingParams(temperature=config.sampling.temperature)
        limit = config.actor.max_trajectories
        ports = ["network.control_port", *(["retriever.port"] if config.retriever.indexes else [])]
        require_ports(config, *ports)
        parts = await open_parts(
            config, stack, split="train", sampling=sampling, run_id=config.run.name, max_trajectories=limit
        )

        def on_engines(engines: Sequence[EngineFields]) -> None:
            parts.pool.set_engines([EngineInfo(url=engine.url, version=engine.version) for engine in engines])

        runner = Runner(
            name=name,
            capacity=limit,
            dealer=parts.transport.dealer(config.network.control_address),
            rollout=GroupRollout(task=parts.task, episodes=parts.episodes),
            on_engines=on_engines,
            counters=lambda: _counters(parts),
            failures=lambda: parts.episodes.reasons.most_common(),
            heartbeat_s=config.actor.heartbeat_s,
            drain=drain,
            drain_s=config.actor.drain_s,
            identity=actor_identity(config),
        )
        click.echo(f"{name}: ready, connecting to the learner at {config.network.control_address}")
        reason = await runner.run()
        click.echo(f"{name}: stopped: {reason}")


def _counters(parts: Parts) -> dict[str, float]:
    """Returns the counters of a heartbeat. TensorBoard shows their sums over actors as `actor/NAME`."""
    kinds = parts.episodes.failures.most_common(_MAX_FAILURE_KINDS)
    return {
        "trajectories_running": float(parts.episodes.num_running),
        "trajectories_done": float(parts.episodes.num_done),
        "trajectories_failed": float(parts.episodes.failures.total()),
        **{f"failed_{kind}": float(count) for kind, count in kinds},
        "engine_requests": float(parts.pool.num_in_flight),
        "engine_retries": float(parts.pool.num_retries),
        "resident_mb": resident_mb(),
    }
