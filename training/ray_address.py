"""Whether a Ray head answers at an address, asked before anything heavy is loaded."""

import os
import socket
import urllib.parse

import grpc

from vggcore.errors import ClusterError

CONNECT_TIMEOUT_S = 4.0


def check_address(address: str) -> None:
    """ClusterError within seconds when nothing listens at `address` ("host:port", "ray://host:port", or "auto")."""
    if address == "auto":
        return
    parts = urllib.parse.urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise ClusterError(f"--address {address}: wanted host:port of a Ray head, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"--address {address}: no Ray head answers there ({error}); is the cluster up?") from error
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    with grpc.insecure_channel(f"{host}:{port}") as channel:      # Ray itself asks a silent port again for minutes
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise ClusterError(
                f"--address {address}: something listens there, but no Ray head (no answer within {CONNECT_TIMEOUT_S:.0f} s);"
                " wanted the head's own port, 6379 unless it was set"
            ) from error
