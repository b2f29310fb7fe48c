"""Run by test_stalled_commit.py: a learner whose commit stalls while peers send messages and then disappear.

Arguments: a folder, and the seconds for which the commit stalls after the peers have gone. Prints `survived`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

from learner.store.run_folder import RunFolder
from tests.network.peers import Setting, open_network, report_engine

NUM_MESSAGES = 300


def main(folder: Path, stall_s: float) -> None:
    with open_network(Setting(folder)) as network:
        peers = [Peer(address) for address in (network.control_address, network.weights_address)]
        lock = sqlite3.connect(RunFolder(folder).store, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        committing = threading.Thread(target=lambda: network.run(network.coordinator.new_publication(1)))
        committing.start()  # stalls: the lock is held
        for peer in peers:
            peer.send_and_die()
        assert committing.is_alive()
        threading.Event().wait(stall_s)  # a clock of libzmq, not a condition that could be waited for
        lock.execute("ROLLBACK")
        committing.join()
        asyncio.run(report_engine(network, version=0, publication=0))  # a reply arrives: the thread serves
    print("survived")


class Peer:
    """A process that connects, sends NUM_MESSAGES messages on request, and is killed."""

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.network.stalled_sender", address, str(NUM_MESSAGES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("connected")

    def send_and_die(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("send\n")
        self._process.stdin.flush()
        self._expect("sent")
        self._process.kill()
        self._process.wait()

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{line}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
