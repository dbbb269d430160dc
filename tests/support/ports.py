"""Ports for processes that tests start."""

import contextlib
import socket


def free_ports(count: int) -> list[int]:
    """Return distinct free ports of the loopback address."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
