"""Run by stalled_learner.py: a peer that sends messages when a line arrives on its standard input, then waits.

Its ZMTP heartbeats are on, as in peers of earlier versions. Arguments: the address, and the number of messages.
"""

from __future__ import annotations

import sys

import zmq

from protocol.framing import encode
from protocol.messages import Goodbye


def main(address: str, num_messages: int) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.HEARTBEAT_IVL, 1_000)
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(address)
    monitor.recv_multipart()
    print("connected", flush=True)
    sys.stdin.readline()
    for _ in range(num_messages):
        dealer.send(encode(Goodbye(actor="a", incarnation="1")))
    print("sent", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
