"""An engine's one weight agent: brings it to the newest publication, all or nothing, and says what it serves.

    Announcement or 1 s ─► report, learn the newest              (a task of its own: never silent while weights move)
                                  │
                                  ▼
    fetch chunks, verify ─► prepare a folder ─► pause ─► update, flush ─► continue ─► committed, report

Until the engine has committed a first publication it serves no lease (`joining`). It goes on serving what it has while
the next one is fetched (`serving`) and put in place (`updating`: requests wait in the engine). A publication is
committed once the engine runs again: whatever fails before that leaves the engine `quarantined`, reported, and brought
again from the start, which an engine that already states the version takes like any other update. An engine that was
restarted states another version than was committed, and joins anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
from pathlib import Path

from actor.sglang_client import PauseMode, SGLangClient
from protocol.errors import EngineError, ProtocolError, RemoteError, WeightsError
from protocol.faults import fault_point
from protocol.messages import (
    Chunk,
    ChunkRequest,
    EngineFields,
    EngineReply,
    EngineReport,
    Manifest,
    ManifestRequest,
)
from protocol.rpc import RequestClient
from protocol.transport import Subscriber
from protocol.types import PolicyTag

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_REQUEST_TIMEOUT_S = 10.0
_RETRY_S = 2.0
# Chunks asked for at once: enough to hide a round trip, few enough to bound memory at 8 MiB each.
_CHUNKS_IN_FLIGHT = 4


class WeightAgent:
    """Runs until cancelled. `folder` is its own, for the weight files that the engine reads; `url` is where actors
    find the engine.

    `pause_mode` says what an update does to requests in flight. `retract` queues them up without their KV, and they go
    on under the new weights: nothing sampled is lost. The embedded engine does it safely. SGLang up to 0.5.20 crashes
    on a cache flush with retracted requests, and without a flush it would mix the KV of old weights into new tokens,
    so a server that is attached to is paused with `abort`: the actors' pools sample the aborted completions again.
    """

    def __init__(
        self,
        *,
        name: str,
        engine: SGLangClient,
        requests: RequestClient,
        announcements: Subscriber,
        base_model: Path,
        folder: Path,
        url: str,
        pause_mode: PauseMode,
    ) -> None:
        self._name = name
        self._url = url
        self._pause_mode: PauseMode = pause_mode
        self._engine = engine
        self._requests = requests
        self._announcements = announcements
        self._base_model = base_model
        self._folder = folder
        self._committed: PolicyTag | None = None
        self._newest: PolicyTag | None = None
        self._updating = False
        self._error = ""
        self._news = asyncio.Event()
        self._learned = asyncio.Event()
        self.num_updates = 0
        self.num_failures = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._reports())
            tasks.create_task(self._updates())

    async def _listen(self) -> None:
        while True:
            await self._announcements.recv()
            self._news.set()

    async def _reports(self) -> None:
        """A report each second and on each change; what it learns wakes `_updates`."""
        while True:
            self._news.clear()
            try:
                self._newest = await self._report()
                self._learned.set()
            except (RemoteError, ProtocolError, TimeoutError) as error:
                self.num_failures += 1
                log.warning("engine %s: %s", self._name, error)
            try:
                async with asyncio.timeout(_REPORT_EVERY_S):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _updates(self) -> None:
        """After each report: look at the engine, and bring it to the newest publication if there is a newer one."""
        while True:
            await self._learned.wait()
            self._learned.clear()
            before = self._committed, self._error
            try:
                await self._check_engine()
                if self._newest is not None and self._newest != self._committed:
                    await self._bring(self._newest)
                    self.num_updates += 1
                self._error = ""
            except (EngineError, RemoteError, WeightsError, ProtocolError, TimeoutError) as error:
                self.num_failures += 1
                if str(error) != self._error:
                    log.warning("engine %s: %s", self._name, error)
                self._error = str(error) or type(error).__name__
                self._news.set()
                await asyncio.sleep(_RETRY_S)
            if before != (self._committed, self._error):
                self._news.set()

    async def _check_engine(self) -> None:
        """An engine that states another version than was committed has been restarted: it joins anew."""
        info = await self._engine.model_info()
        if self._committed is not None and info.weight_version != str(self._committed):
            log.warning("engine %s serves %s, not %s: it joins anew", self._name, info.weight_version, self._committed)
            self._committed = None

    def _state(self) -> str:
        if self._error:
            return "quarantined"
        if self._committed is None:
            return "joining"
        return "updating" if self._updating else "serving"

    async def _report(self) -> PolicyTag | None:
        """The newest publication, None while there is none."""
        tag = self._committed
        fields = EngineFields(
            name=self._name,
            url=self._url,
            version=tag.version if tag else -1,
            publication=tag.publication if tag else -1,
        )
        report = EngineReport.model_validate(
            {
                "request_id": self._requests.next_id(),
                "engine": fields,
                "state": self._state(),
                "error": self._error[:1000],
                "counters": {"updates": float(self.num_updates), "failures": float(self.num_failures)},
            }
        )
        reply, _ = await self._requests.request(report, EngineReply, timeout_s=_REQUEST_TIMEOUT_S)
        if reply.publication < 0:
            return None
        return PolicyTag(reply.run_id, reply.publication, reply.version)

    async def _bring(self, tag: PolicyTag) -> None:
        """The engine serves `tag` when this returns. Where fetching fails it serves what it did; where anything after
        that fails, nothing is committed: it may be paused still, or hold either version."""
        prepared = await self._fetch(tag)
        fault_point("agent.prepared")
        previous = self._committed
        self._updating = True
        self._news.set()
        try:
            try:
                await self._engine.pause(self._pause_mode)
                await self._engine.update_weights_from_disk(str(prepared), weight_version=str(tag), flush_cache=True)
                fault_point("agent.updated")
            finally:
                await self._engine.continue_()
            self._committed = tag
            fault_point("agent.committed")
        except BaseException:
            self._committed = None
            raise
        finally:
            self._updating = False
        await asyncio.to_thread(self._remove_all_but, prepared)
        log.info("engine %s: %s -> %s", self._name, previous or "nothing", tag)

    async def _fetch(self, tag: PolicyTag) -> Path:
        """A model folder with the publication's weights, verified chunk by chunk and as a whole."""
        request = ManifestRequest(request_id=self._requests.next_id(), publication=tag.publication)
        manifest, _ = await self._requests.request(request, Manifest, timeout_s=_REQUEST_TIMEOUT_S)
        if (manifest.run_id, manifest.publication, manifest.version) != (tag.run_id, tag.publication, tag.version):
            raise WeightsError(f"asked for {tag}, got a manifest of publication {manifest.publication}")
        num_chunks = -(-manifest.num_bytes // manifest.chunk_bytes)
        if len(manifest.chunk_sha256) != num_chunks:
            raise WeightsError(f"{tag}: {num_chunks} chunks need as many checksums, got {len(manifest.chunk_sha256)}")
        data = bytearray(manifest.num_bytes)
        slots = asyncio.Semaphore(_CHUNKS_IN_FLIGHT)
        chunks = [asyncio.ensure_future(self._fetch_chunk(manifest, i, data, slots)) for i in range(num_chunks)]
        try:
            await asyncio.gather(*chunks)
        finally:
            for chunk in chunks:
                chunk.cancel()
        return await asyncio.to_thread(self._prepare, tag, data, manifest)

    async def _fetch_chunk(self, manifest: Manifest, index: int, data: bytearray, slots: asyncio.Semaphore) -> None:
        async with slots:
            request = ChunkRequest(request_id=self._requests.next_id(), publication=manifest.publication, index=index)
            _, payload = await self._requests.request(request, Chunk, timeout_s=_REQUEST_TIMEOUT_S)
        start = index * manifest.chunk_bytes
        expected = min(manifest.chunk_bytes, manifest.num_bytes - start)
        if len(payload) != 1 or len(payload[0]) != expected:
            raise WeightsError(f"chunk {index} of publication {manifest.publication} must have {expected} bytes")
        if hashlib.sha256(payload[0]).hexdigest() != manifest.chunk_sha256[index]:
            raise WeightsError(f"chunk {index} of publication {manifest.publication} does not match its checksum")
        data[start : start + expected] = payload[0]

    def _prepare(self, tag: PolicyTag, data: bytearray, manifest: Manifest) -> Path:
        """Checks the whole and writes it, in a thread: seconds for gigabytes. Raises: WeightsError."""
        check_snapshot(data, manifest)
        folder = self._folder / f"publication-{tag.publication}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "model.safetensors").write_bytes(data)
            for path in self._base_model.iterdir():
                if path.is_file() and ".safetensors" not in path.name and path.suffix != ".bin":
                    shutil.copyfile(path, folder / path.name)
        except OSError as error:
            raise WeightsError(f"{folder} cannot be written: {error.strerror or error}") from error
        return folder

    def _remove_all_but(self, prepared: Path) -> None:
        for folder in self._folder.glob("publication-*"):
            if folder != prepared:
                shutil.rmtree(folder, ignore_errors=True)


def check_snapshot(data: bytes | bytearray, manifest: Manifest) -> None:
    """The snapshot's bytes are the manifest's, and its safetensors header lists the manifest's tensors.

    Raises: WeightsError.
    """
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        raise WeightsError(f"publication {manifest.publication} does not match its checksum")
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_bytes])
        found = {
            name: (entry["dtype"], list(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"publication {manifest.publication} is not a safetensors file: {error}") from error
    wanted = {tensor.name: (tensor.dtype, tensor.shape, tensor.offset) for tensor in manifest.tensors}
    if found != wanted:
        raise WeightsError(f"publication {manifest.publication} holds other tensors than its manifest says")
