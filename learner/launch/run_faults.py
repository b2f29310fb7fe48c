"""Faults of `palimpsest chaos` in a run's folder and at its learner's address."""

from __future__ import annotations

import asyncio
import random

from learner.store.run_folder import RunFolder
from protocol.config import Config
from protocol.fault_injection import CLOCK_FILE
from protocol.transport import Transport

CLOCK_SHIFT_S = -3600.0
_NUM_FLIPPED_BYTES = 4000
_JUNK_SIZES = (0, 1, 7, 200, 70_000)


def damage_newest_checkpoint(folder: RunFolder, rng: random.Random) -> str:
    """Flips bytes of, cuts or deletes one file of the newest checkpoint. Returns what it did; "" without one."""
    from learner.training.checkpoint import latest_checkpoint  # slow (torch)

    newest = latest_checkpoint(folder.checkpoints)
    if newest is None:
        return ""
    path = rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    how = rng.choice(("flipped bytes of", "cut", "deleted"))
    try:
        data = bytearray(path.read_bytes())
        if how == "deleted":
            path.unlink()
        elif how == "cut":
            path.write_bytes(data[: len(data) // 2])
        else:
            start = rng.randrange(max(1, len(data) - _NUM_FLIPPED_BYTES))
            data[start : start + _NUM_FLIPPED_BYTES] = bytes(
                byte ^ 0xFF for byte in data[start : start + _NUM_FLIPPED_BYTES]
            )
            path.write_bytes(data)
    except FileNotFoundError:  # the learner has just replaced this checkpoint
        return ""
    return f"{how} {newest.name}/{path.relative_to(newest)}"


def set_clock_back(folder: RunFolder) -> None:
    """The roles that this launcher starts from now on have a clock that is an hour behind, where they use its shift."""
    (folder.temporary / CLOCK_FILE).write_text(str(CLOCK_SHIFT_S))


async def flood(config: Config, *, for_s: float, rng: random.Random) -> int:
    """Sends junk messages to the learner's control address for `for_s` seconds. Returns their number."""
    transport, num_sent = Transport(keys=config.network.keys), 0
    try:
        peer = transport.dealer(config.network.control_address)
        async with asyncio.timeout(for_s):
            while True:
                frames = [rng.randbytes(rng.choice(_JUNK_SIZES)) for _ in range(rng.choice((1, 1, 4)))]
                await peer.send(frames, timeout_s=for_s)
                num_sent += 1
                if num_sent % 16 == 0:
                    await asyncio.sleep(0)
    except TimeoutError:
        return num_sent
    finally:
        transport.close()
