"""Lets the kernel drop the packets of new connections of a listening socket. Linux.

A client's kernel repeats the packet after 1, 3 and 7 s, so a short pause delays its connection and does not fail it.
"""

from __future__ import annotations

import ctypes
import socket
import struct

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
# One BPF instruction, "return 0 bytes of the packet", and struct sock_fprog (length, address), which names it.
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
_PROGRAM = struct.pack("HL", 1, ctypes.addressof(_DROP_ALL))


def set_accepting(listener: socket.socket, accepting: bool) -> None:
    """Starts or ends the pause. Raises: OSError (the kernel does not support it, or the socket is closed)."""
    if accepting:
        listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
    else:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM)
