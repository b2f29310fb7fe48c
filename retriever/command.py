"""`palimpsest index` and `palimpsest retriever`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.progress import Progress

    from retriever.corpus import PassageTable
    from retriever.encoders.base import Compute, Encoder, Pooling
    from retriever.encoders.catalogue import SettingsOverride
    from retriever.search import Collection
    from retriever.service import ServiceLimits


@click.command("index", context_settings={"show_default": True})
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the index to.")
@click.option("--encoder", default="minilm", help="minilm, bow, or a Hugging Face model folder.")
@click.option("--preset", help="Prefixes, pooling and length as in a model card: e5, bge or minilm.")
@click.option("--query-prefix", help="Put before every query.  [default: the preset's, else none]")
@click.option("--passage-prefix", help="Put before every passage.  [default: the preset's, else none]")
@click.option("--pooling", type=click.Choice(["mean", "cls"]), help="[default: the preset's, else mean]")
@click.option("--max-tokens", type=int, help="Tokens kept of a text.  [default: the preset's, else 512]")
@click.option("--vectors", type=click.Path(path_type=Path), help="Ready vectors: an .npz with `ids` and `vectors`.")
@click.option(
    "--structure",
    type=click.Choice(["auto", "hnsw", "flat"]),
    default="auto",
    help="hnsw walks a graph; flat compares with every vector; auto is flat for bow and hnsw otherwise.",
)
@click.option("--m", type=click.IntRange(2, 256), default=32, help="Links of a node in the graph.")
@click.option("--ef-construction", type=click.IntRange(8, 4096), default=200, help="Candidates when adding a node.")
@click.option("--ef-search", type=click.IntRange(1, 65536), default=128, help="Candidates when searching.")
@click.option("--batch-size", type=click.IntRange(1), default=32, help="Texts encoded together.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of the encoder and of the graph.")
@click.option("--device", default="cpu", help="Where the encoder's model runs: cpu, cuda, cuda:1 …")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", help="The encoder's precision.")
@click.option("--force", is_flag=True, help="Replace an index that is in the folder.")
def index(
    corpus: Path,
    out: Path,
    encoder: str,
    preset: str | None,
    query_prefix: str | None,
    passage_prefix: str | None,
    pooling: Pooling | None,
    max_tokens: int | None,
    vectors: Path | None,
    structure: str,
    m: int,
    ef_construction: int,
    ef_search: int,
    batch_size: int,
    threads: int,
    device: str,
    dtype: Literal["float32", "bfloat16"],
    force: bool,
) -> None:
    """Indexes CORPUS: a .jsonl or .jsonl.gz file with `id`, `text` and perhaps `title` a line."""
    from retriever.build import build_index
    from retriever.encoders.base import Compute
    from retriever.encoders.catalogue import BOW, SettingsOverride
    from retriever.manifest import HnswSettings

    override = SettingsOverride(
        query_prefix=query_prefix, passage_prefix=passage_prefix, pooling=pooling, max_tokens=max_tokens
    )
    make_encoder = _encoder_maker(
        encoder,
        preset=preset,
        override=override,
        compute=Compute(device=device, dtype=dtype, num_threads=threads, batch_size=batch_size),
        has_vectors=vectors is not None,
    )
    flat = structure == "flat" or (structure == "auto" and encoder == BOW)
    hnsw = None if flat else HnswSettings(m=m, ef_construction=ef_construction, ef_search=ef_search)
    with _progress_bar() as bar:
        task = bar.add_task(f"indexing {corpus.name}", total=None)
        manifest = build_index(
            corpus=corpus,
            out=out,
            make_encoder=make_encoder,
            hnsw=hnsw,
            vectors=vectors,
            num_threads=threads,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    how = f"HNSW M={m} ef_construction={ef_construction} ef_search={ef_search}" if hnsw else "flat"
    click.echo(
        f"index: {manifest.num_passages} passages in {out} "
        f"(encoder {encoder}, {manifest.encoder.dimension} dimensions, {how})"
    )


@click.command("retriever", context_settings={"show_default": True})
@click.argument("indexes", metavar="INDEX...", nargs=-1, required=True)
@click.option("--address", default="tcp://127.0.0.1:7310", help="Where to listen; port 0 takes a free one.")
@click.option("--keys", type=click.Path(path_type=Path), help="CURVE keys, needed beyond loopback.")
@click.option("--encoder", help="Refuse an index made with another one.  [default: the one it was made with]")
@click.option("--ef-search", type=click.IntRange(1, 65536), help="Candidates when searching.  [default: the index's]")
@click.option("--max-batch", type=click.IntRange(1), default=64, help="Queries encoded and searched together.")
@click.option("--max-pending", type=click.IntRange(1), default=4096, help="Queries that may wait; more are refused.")
@click.option("--cache-size", type=click.IntRange(0), default=16384, help="Queries whose results are kept.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of the encoder and of the graph.")
@click.option("--device", default="cpu", help="Where the encoder's model runs: cpu, cuda, cuda:1 …")
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

    INDEX is a folder made by `palimpsest index`, or NAME=FOLDER. A client asks for a collection by its name (the
    folder's where none is given); the first is the default.
    """
    from functools import partial

    from protocol.role_startup import run_async, start_role
    from retriever.encoders.base import Compute
    from retriever.open import open_collections
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
    """Until SIGTERM, SIGHUP or Ctrl-C. The address is taken first: clients that come early wait while indexes load.

    While it serves, a signal is the way in which a service ends and no failure: it says its statistics, and its exit
    status is 0. Before that a signal interrupts it, as `run_async` does with every role.
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
        encoders = ", ".join(dict.fromkeys(collection.encoder.spec.source for collection in collections))
        click.echo(f"retriever: ready at {router.address} ({num_passages} passages, encoder {encoders})")
        await asyncio.wait([serving])
        click.echo(f"retriever: stopped; {service.stats.summary()}, {searcher.num_cache_hits} from the cache")
        if not serving.cancelled():
            serving.result()
    finally:
        transport.close()


def _progress_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _encoder_maker(
    source: str,
    *,
    preset: str | None,
    override: SettingsOverride,
    compute: Compute,
    has_vectors: bool,
) -> Callable[[PassageTable], Encoder]:
    """What makes the encoder once the passages are known; a model is opened at once, so that it fails early."""
    from protocol.errors import ConfigError
    from retriever.encoders.bow import BagOfWordsEncoder
    from retriever.encoders.catalogue import BOW, open_model_encoder

    if source == BOW:
        if preset is not None or not override.is_empty or has_vectors:
            raise ConfigError(
                "--encoder bow takes no --preset, --query-prefix, --passage-prefix, --pooling, --max-tokens or "
                "--vectors; leave them out or give another --encoder"
            )
        return BagOfWordsEncoder.fit
    encoder = open_model_encoder(source, preset=preset, override=override, compute=compute)
    return lambda passages: encoder
