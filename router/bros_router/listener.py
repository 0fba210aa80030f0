"""The one socket that faces the world."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Final

from bros_router.startup_error import UsageError

#: Connections that wait while the event loop is busy; the kernel caps it at net.core.somaxconn.
_BACKLOG: Final = 1024


def bind(hostname: str, port: int) -> socket.socket:
    """Listen on an IP address, before anything slow is done: a taken port should not cost a model's load.

    It listens at once, since two sockets that merely bind (with SO_REUSEADDR) may share a port. Port 0 picks
    a free one.

    Raises:
        UsageError: the port or the address cannot be had.
    """
    address = ipaddress.ip_address(hostname)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((hostname, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise UsageError(_explain(error, hostname, port)) from None
    return listener


def _explain(error: OSError, hostname: str, port: int) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return f"Port {port} is taken: choose another with --port."
        case errno.EACCES:
            return (
                f"Port {port} needs a privilege: choose one above 1023 with --port,"
                " or lower net.ipv4.ip_unprivileged_port_start."
            )
        case errno.EADDRNOTAVAIL:
            return f"{hostname} is not an address of this machine: choose another with --hostname."
    return f"Cannot listen on {hostname}, port {port}: {error.strerror}."
