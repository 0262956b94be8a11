"""A connection from every process to process 0, and how what is sent over it is taken apart."""

import socket


def listener() -> socket.socket:
    """On a free port, of either kind of address where the system has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def connected(host: str, port: int, seconds: float) -> socket.socket:
    """A connection that waits for ever from here on, and for no further bytes to send what there is."""
    line = socket.create_connection((host, port), seconds)
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def received(line: socket.socket, size: int) -> bytes:
    """So many bytes, or none when the connection ends before."""
    parts: list[bytes] = []
    while size > 0:
        part = line.recv(min(size, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
