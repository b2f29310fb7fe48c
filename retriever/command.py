"""`palimpsest index` and `palimpsest retriever`."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from protocol.config_base import ExtensionSection
    from retriever.collection import Collection
    from retriever.service import ServiceLimits

_Flags = dict[str, str | int | None]


@click.command("index", context_settings={"show_default": True})
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the index to.")
@click.option(
    "--encoder", default="minilm", help="minilm, bow, a Hugging Face model folder, or your own package.module:Name."
)
@click.option("--encoder-option", multiple=True, metavar="KEY=VALUE", help="An option of the encoder; repeatable.")
@click.option("--preset", help="Prefixes, pooling and length from a model card: e5, bge or minilm.")
@click.option("--query-prefix", help="Text put before every query.  [default: the preset's, else none]")
@click.option("--passage-prefix", help="Text put before every passage.  [default: the preset's, else none]")
@click.option("--pooling", type=click.Choice(["mean", "cls"]), help="[default: the preset's, else mean]")
@click.option("--max-tokens", type=int, help="Tokens kept of a text.  [default: the preset's, else 512]")
@click.option(
    "--vectors", type=click.Path(path_type=Path), help="Precomputed vectors: an .npz with `ids` and `vectors`."
)
@click.option(
    "--structure",
    default="auto",
    help="hnsw (searches a graph), flat (compares with every vector), auto (flat for bow, else hnsw), or your own "
    "package.module:Name.",
)
@click.option("--structure-option", multiple=True, metavar="KEY=VALUE", help="An option of the structure; repeatable.")
@click.option("--m", type=click.IntRange(2, 256), help="hnsw: links per node.  [default: 32]")
@click.option(
    "--ef-construction", type=click.IntRange(8, 4096), help="hnsw: candidates when a node is added.  [default: 200]"
)
@click.option("--ef-search", type=click.IntRange(1, 65536), help="hnsw: candidates of a search.  [default: 128]")
@click.option("--batch-size", type=click.IntRange(1), default=32, help="Texts encoded together.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of the encoder and of the structure.")
@click.option("--device", default="cpu", help="Device of the encoder's model: cpu, cuda, cuda:1 …")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="The encoder's precision.")
@click.option("--force", is_flag=True, help="Replace the index in the folder.")
def index(
    corpus: Path,
    out: Path,
    encoder: str,
    encoder_option: Sequence[str],
    preset: str | None,
    query_prefix: str | None,
    passage_prefix: str | None,
    pooling: str | None,
    max_tokens: int | None,
    vectors: Path | None,
    structure: str,
    structure_option: Sequence[str],
    m: int | None,
    ef_construction: int | None,
    ef_search: int | None,
    batch_size: int,
    threads: int,
    device: str,
    dtype: Literal["float32", "bfloat16"],
    force: bool,
) -> None:
    """Indexes CORPUS: a .jsonl or .jsonl.gz file with `id`, `text` and optionally `title` per line."""
    from protocol.role_startup import end_with_launcher
    from retriever.build_index import build_index
    from retriever.encoders.base import Compute
    from retriever.extensions import ENCODERS, STRUCTURES, with_all_options

    end_with_launcher()
    text_flags: _Flags = {
        "query_prefix": query_prefix,
        "passage_prefix": passage_prefix,
        "pooling": pooling,
        "max_tokens": max_tokens,
    }
    graph_flags: _Flags = {"m": m, "ef_construction": ef_construction, "ef_search": ef_search}
    chosen = _encoder(encoder, encoder_option, preset=preset, flags=text_flags, has_vectors=vectors is not None)
    chosen_structure = _structure(structure, structure_option, encoder=chosen.use, flags=graph_flags)
    chosen, chosen_structure = with_all_options(ENCODERS, chosen), with_all_options(STRUCTURES, chosen_structure)
    with _progress(corpus.name) as progress:
        manifest = build_index(
            corpus=corpus,
            out=out,
            encoder=chosen,
            structure=chosen_structure,
            vectors=vectors,
            compute=Compute(device=device, dtype=dtype, num_threads=threads, batch_size=batch_size),
            force=force,
            progress=progress,
        )
    click.echo(
        f"index: {manifest.num_passages} passages in {out} (encoder {encoder}, "
        f"{manifest.encoder.dimension} dimensions, {_described(manifest.structure.use, manifest.structure.options)})"
    )


@click.command("retriever", context_settings={"show_default": True})
@click.argument("indexes", metavar="INDEX...", nargs=-1, required=True)
@click.option("--address", default="tcp://127.0.0.1:7310", help="Address to listen on; port 0 takes a free port.")
@click.option("--keys", type=click.Path(path_type=Path), help="CURVE keys; required for an address beyond loopback.")
@click.option("--encoder", help="Refuse an index that was made with another encoder.  [default: the index's]")
@click.option(
    "--ef-search", type=click.IntRange(1, 65536), help="hnsw: candidates of a search.  [default: the index's]"
)
@click.option("--max-batch", type=click.IntRange(1), default=64, help="Queries encoded and searched together.")
@click.option(
    "--max-pending", type=click.IntRange(1), default=4096, help="Queries that may wait; further ones are refused."
)
@click.option("--cache-size", type=click.IntRange(0), default=16384, help="Queries whose results are cached.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of the encoder and of the structure.")
@click.option("--device", default="cpu", help="Device of the encoder's model: cpu, cuda, cuda:1 …")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="The encoder's precision.")
def retriever(
    indexes: Sequence[str],
    address: str,
    keys: Path | None,
    encoder: str | None,
    ef_search: int | None,
    max_batch: int,
    max_pending: int,
    cache_size: int,
    threads: int,
    device: str,
    dtype: Literal["float32", "bfloat16"],
) -> None:
    """Serves one or more indexes over ZeroMQ until it is stopped.

    INDEX is a folder made by `palimpsest index`, or NAME=FOLDER. A client names the collection that it searches;
    without NAME= it has the folder's name. The first one is the default.
    """
    from functools import partial

    from protocol.role_startup import run_async, start_role
    from retriever.collection import open_collections
    from retriever.encoders.base import Compute
    from retriever.service import ServiceLimits

    start_role("retriever")
    open_all = partial(
        open_collections,
        indexes,
        encoder=encoder,
        ef_search=ef_search,
        compute=Compute(device=device, dtype=dtype, num_threads=threads),
    )
    limits = ServiceLimits(max_batch=max_batch, max_pending=max_pending)
    run_async(_serve(open_all, address=address, keys=keys, limits=limits, cache_size=cache_size))


async def _serve(
    open_all: Callable[[], Sequence[Collection]],
    *,
    address: str,
    keys: Path | None,
    limits: ServiceLimits,
    cache_size: int,
) -> None:
    """Serves until SIGTERM, SIGHUP or Ctrl-C. It binds the address before the indexes load, so early clients wait.

    A signal while it serves is not a failure: it prints its statistics and the exit status is 0. A signal before that
    interrupts it, as `run_async` does for every role.
    """
    import asyncio
    import signal

    from protocol.framing import MAX_HEADER_BYTES
    from protocol.transport import Transport
    from retriever.search import Searcher
    from retriever.service import RetrieverService

    transport = Transport(keys=keys)
    try:
        router = transport.router(address, max_frame_bytes=MAX_HEADER_BYTES)
        collections = open_all()
        searcher = Searcher(collections, cache_size=cache_size)
        service = RetrieverService(router=router, searcher=searcher, limits=limits)
        serving = asyncio.create_task(service.run(), name="retriever-service")
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
        num_passages = sum(collection.index.manifest.num_passages for collection in collections)
        encoders = ", ".join(dict.fromkeys(collection.index.manifest.encoder.source for collection in collections))
        click.echo(f"retriever: ready at {router.address} ({num_passages} passages, encoder {encoders})")
        await asyncio.wait([serving])
        click.echo(f"retriever: stopped; {service.stats.summary()}, {searcher.num_cache_hits} from the cache")
        if not serving.cancelled():
            serving.result()
    finally:
        transport.close()


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (passages done, passages in all): it draws a bar on a terminal, else prints progress lines."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from protocol.step_progress import StepProgress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: click.echo(StepProgress(done, total, f"passages of {name}"))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"indexing {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _encoder(
    name: str, arguments: Sequence[str], *, preset: str | None, flags: _Flags, has_vectors: bool
) -> ExtensionSection:
    """Returns the encoder given by the flags. `flags` are options of Hugging Face encoders; None means not given.

    Raises: ConfigError if the encoder does not take a flag; DataError if there is no such encoder or preset.
    """
    from protocol.errors import ConfigError, DataError
    from retriever.encoders.huggingface import PRESETS
    from retriever.extensions import BOW, MODEL_ENCODERS, encoder_section, parse_options

    options = parse_options(arguments, flag="--encoder-option")
    given = {key: value for key, value in flags.items() if value is not None}
    section = encoder_section(name, options)
    if section.use in MODEL_ENCODERS:
        if preset is not None and preset not in PRESETS:
            raise DataError(f"there is no encoder preset {preset!r}; the presets are {', '.join(PRESETS)}")
        return encoder_section(name, {**(PRESETS[preset] if preset else {}), **given, **options})
    if section.use == BOW and (preset is not None or given or has_vectors):
        raise ConfigError(
            "--encoder bow takes no --preset, --query-prefix, --passage-prefix, --pooling, --max-tokens or "
            "--vectors; omit them or give another --encoder"
        )
    if preset is not None or given:
        raise ConfigError(
            f"--encoder {name} takes no --preset, --query-prefix, --passage-prefix, --pooling or --max-tokens; give "
            "its options with --encoder-option key=value"
        )
    return section


def _structure(name: str, arguments: Sequence[str], *, encoder: str, flags: _Flags) -> ExtensionSection:
    """Returns the structure given by the flags. `flags` are options of hnsw, ignored for flat; None: not given.

    Raises: ConfigError if there is no such structure, or the user's own structure is given a flag of hnsw.
    """
    from protocol.errors import ConfigError
    from retriever.extensions import BOW, FLAT, HNSW, parse_options, structure_section

    options = parse_options(arguments, flag="--structure-option")
    given = {key: value for key, value in flags.items() if value is not None}
    use = name if name != "auto" else FLAT if encoder == BOW else HNSW
    if use == HNSW:
        return structure_section(use, {**given, **options})
    section = structure_section(use, options)
    if use != FLAT and given:
        raise ConfigError(
            f"--structure {name} takes no --m, --ef-construction or --ef-search; give its options with "
            "--structure-option key=value"
        )
    return section


def _described(use: str, options: Mapping[str, object]) -> str:
    from retriever.extensions import HNSW

    if use != HNSW:
        return use
    return f"HNSW M={options['m']} ef_construction={options['ef_construction']} ef_search={options['ef_search']}"
