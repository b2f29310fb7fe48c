"""Puts an actor together from a config and runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import click

from actor.chat.chatml import ChatRendering
from actor.chat.check_model import check_model
from actor.chat.rendering import Rendering
from actor.chat.tokenizer import Tokenizer
from actor.chat.toy import ToyRendering
from actor.engines.pool import EngineInfo, EnginePool
from actor.engines.sampling import SamplingParams
from actor.engines.sglang_client import Timeouts
from actor.rollout import Episodes, GroupRollout
from actor.runner import Runner
from actor.tasks.build import training_task
from actor.tasks.task import Task
from actor.tools.search_client import SearchClient
from actor.workflows.memsearcher import MemSearcher
from protocol.addresses import tcp_address
from protocol.config import Config, WorkflowConfig
from protocol.config_file import require_ports
from protocol.messages import EngineFields
from protocol.resident_memory import resident_mb
from protocol.transport import Transport


@dataclass(frozen=True, slots=True)
class Parts:
    """What rolls out trajectories, in training and in evaluation."""

    transport: Transport
    pool: EnginePool
    episodes: Episodes


async def open_parts(
    config: Config,
    task: Task,
    stack: AsyncExitStack,
    *,
    sampling: SamplingParams,
    run_id: str | None,
    max_trajectories: int,
) -> Parts:
    """Opens tokenizer, sockets and pool; `stack` closes them. Raises: UserError."""
    tokenizer = Tokenizer.load(config.model.path)
    rendering = _rendering(config.workflow)
    check_model(
        config.model.path, tokenizer=tokenizer, rendering=rendering, context_tokens=config.workflow.context_tokens
    )
    transport = Transport(keys=config.network.keys)
    stack.callback(transport.close)
    pool = await stack.enter_async_context(
        EnginePool(
            run_id=run_id,
            api_key=config.network.api_key(),
            timeouts=Timeouts(generate_s=config.actor.request_timeout_s),
        )
    )
    search = await stack.enter_async_context(
        SearchClient(
            transport=transport,
            address=tcp_address(host=config.network.host, port=config.retriever.port),
            timeout_s=config.actor.search_timeout_s,
        )
    )
    episodes = Episodes(
        workflow=MemSearcher(config=config.workflow, rendering=rendering, search=search),
        reward=task.reward,
        pool=pool,
        tokenizer=tokenizer,
        sampling=sampling,
        run_id=run_id,
        max_context_tokens=config.workflow.context_tokens,
        max_trajectories=max_trajectories,
    )
    return Parts(transport, pool, episodes)


def _rendering(config: WorkflowConfig) -> Rendering:
    if config.rendering == "chat":
        return ChatRendering(fidelity=config.fidelity, top_n=config.top_n)
    return ToyRendering()


async def run_actor(config: Config, *, name: str) -> None:
    """Until the run is over. Raises: UserError (bad config, task files, tokenizer, keys)."""
    task = training_task(config.task, seed=config.run.seed)
    async with AsyncExitStack() as stack:
        sampling = SamplingParams(temperature=config.sampling.temperature)
        limit = config.actor.max_trajectories
        parts = await open_parts(config, task, stack, sampling=sampling, run_id=config.run.name, max_trajectories=limit)
        require_ports(config, "network.control_port", "retriever.port")

        def on_engines(engines: Sequence[EngineFields]) -> None:
            parts.pool.set_engines([EngineInfo(url=engine.url, version=engine.version) for engine in engines])

        def counters() -> dict[str, float]:
            return {
                "trajectories_running": float(parts.episodes.num_running),
                "trajectories_done": float(parts.episodes.num_done),
                "engine_requests": float(parts.pool.num_in_flight),
                "engine_retries": float(parts.pool.num_retries),
                "resident_mb": resident_mb(),
            }

        runner = Runner(
            name=name,
            capacity=max(1, limit // config.learner.group_size),
            dealer=parts.transport.dealer(config.network.control_address),
            rollout=GroupRollout(task=task, episodes=parts.episodes),
            on_engines=on_engines,
            counters=counters,
            heartbeat_s=config.actor.heartbeat_s,
        )
        click.echo(f"{name}: ready, for the learner at {config.network.control_address}")
        reason = await runner.run()
        click.echo(f"{name}: leaves: {reason}")
        await asyncio.sleep(0)
