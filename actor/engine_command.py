"""`palimpsest engine`: starts an embedded engine with its weight agent, or the weight agent of an SGLang server."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from actor.engines.sglang_client import UpdateMode
    from protocol.config import Config


@click.command()
@click.argument("config", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", help="Unique among the run's engines.  [default: engine-HOSTNAME-PID]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where the HTTP server listens.")
@click.option("--port", default=0, show_default=True, help="0: a free port.")
@click.option("--attach", metavar="URL", help="Start no server: keep the weights of the SGLang server at URL current.")
@click.option(
    "--frozen",
    metavar="VERSION",
    help="Serve model.path unchanged, as weight version VERSION: no weight agent is started.",
)
@click.option("--advertise", metavar="URL", help="The engine's address for actors.  [default: the server's own URL]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of the config.")
def engine(
    config: Path,
    name: str | None,
    host: str,
    port: int,
    attach: str | None,
    frozen: str | None,
    advertise: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Serve the policy over SGLang's HTTP API and keep its weights current.

    CONFIG is the run's TOML or saved config.json. The engine serves leases after it has committed a first publication.
    Weight files are written under the run's folder; with --attach, the server must be able to read them there.
    """
    from protocol.config_file import load_config
    from protocol.role_name import role_name
    from protocol.role_startup import run_async, start_role

    if attach is not None and frozen is not None:
        raise click.UsageError("--frozen serves model.path here, and --attach starts no server: give one of them")
    name = role_name("engine", name)
    start_role(name)
    loaded = load_config(config, overrides)
    if attach is not None:
        run_async(run_weight_agent(loaded, name=name, url=attach, advertise=advertise, pause_mode=None))
    else:
        run_async(serve_engine(loaded, name=name, host=host, port=port, advertise=advertise, frozen=frozen))


async def serve_engine(
    config: Config, *, name: str, host: str, port: int, advertise: str | None, frozen: str | None = None
) -> None:
    """Runs an embedded engine and its weight agent until one of them ends or fails, or until cancelled.

    `frozen`: run no weight agent, and serve model.path as this weight version.
    """
    from protocol.config_file import require_ports
    from protocol.errors import ConfigError

    if frozen is None:
        try:
            require_ports(config, "network.weights_port", "network.announce_port")
        except ConfigError as error:
            raise ConfigError(f"{error}; to serve model.path alone, without a learner, use --frozen") from error

    from actor.engine.server import EngineServer  # slow (torch), so only after the config is checked
    from actor.engine.update_source import UpdateSource

    server = EngineServer(
        model_path=config.model.path,
        host=host,
        port=port,
        api_key=config.network.api_key(),
        max_running_requests=config.engine.max_running_requests,
        max_total_tokens=config.engine.max_total_tokens,
        context_length=config.workflow.context_tokens,
        torch_threads=config.engine.torch_threads,
        seed=random_engine_seed(config.run.seed, name),
        weight_version=frozen or "default",
        advertised=advertise,
        update_source=UpdateSource(_update_folder(config, name), config.run.name),
    )
    await server.start()
    try:
        click.echo(f"engine: ready at {server.url} ({name})")
        if frozen is not None:
            await server.wait()
            return
        await _run_until_first_ends(
            server.wait(),
            run_weight_agent(config, name=name, url=server.url, advertise=advertise, pause_mode="retract"),
        )
    finally:
        await server.stop()


def _update_folder(config: Config, name: str) -> Path:
    """Where the weight agent of engine `name` writes publications, and the only place that its engine reads them."""
    return config.run.dir / "engines" / name


def random_engine_seed(run_seed: int, name: str) -> int:
    """Returns a seed of 64 bits for requests that have no `sampling_seed`.

    It differs between engines and between restarts of one engine: with equal seeds, equal prompts of a group would get
    equal completions.
    """
    text = f"{run_seed}/{name}/{secrets.token_hex(16)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


async def run_weight_agent(
    config: Config, *, name: str, url: str, advertise: str | None, pause_mode: UpdateMode | None
) -> None:
    """Runs the weight agent of the engine at `url` until cancelled. Its weight files are in the run's folder.

    `pause_mode` None: chosen by `update_mode` from the server's release.

    Raises: UserError (no engine responds at `url`, or actors cannot reach it, or its address needs an API key).
    """
    import shutil

    from actor.engine.advertised_address import check_advertised
    from actor.engines.sglang_client import SGLangClient, check_url, update_mode
    from actor.weights.agent import WeightAgent
    from protocol.config_file import require_ports
    from protocol.errors import EngineError, UnreachableError
    from protocol.request_client import RequestClient
    from protocol.transport import Transport

    api_key = config.network.api_key()
    check_url(advertise or url, api_key=api_key)
    check_advertised(advertise or url, network_host=config.network.host)
    folder = _update_folder(config, name)
    shutil.rmtree(folder, ignore_errors=True)
    transport = Transport(keys=config.network.keys)
    try:
        async with (
            SGLangClient(url, api_key=api_key) as client,
            RequestClient(transport.dealer(config.network.weights_address)) as requests,
        ):
            try:
                release = (await client.server_info()).version
            except EngineError as error:
                raise UnreachableError(
                    f"engine {name} cannot be used: {error}; start it, or correct its address"
                ) from error
            require_ports(config, "network.weights_port", "network.announce_port")
            agent = WeightAgent(
                name=name,
                engine=client,
                requests=requests,
                announcements=transport.subscriber(config.network.announce_address),
                base_model=config.model.path,
                folder=folder,
                url=advertise or client.base_url,
                pause_mode=pause_mode or update_mode(release),
                canary_tolerance=config.engine.canary_tolerance,
            )
            await agent.run()
    finally:
        transport.close()
        shutil.rmtree(folder, ignore_errors=True)


async def _run_until_first_ends(*coroutines: Coroutine[object, object, None]) -> None:
    """Runs coroutines until one ends, then cancels the others. Raises the error of the one that ended."""
    import asyncio

    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
