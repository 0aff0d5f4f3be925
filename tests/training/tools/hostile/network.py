"""Reach a server on this machine and addresses outside, over every kind of socket."""

import socket

port = PORT  # noqa: F821  (the test defines it in front)
kinds = [
    ("tcp", socket.AF_INET, socket.SOCK_STREAM),
    ("udp", socket.AF_INET, socket.SOCK_DGRAM),
    ("tcp6", socket.AF_INET6, socket.SOCK_STREAM),
    ("unix", socket.AF_UNIX, socket.SOCK_STREAM),
    ("netlink", socket.AF_NETLINK, socket.SOCK_RAW),
    ("raw", socket.AF_INET, socket.SOCK_RAW),
]
for name, family, kind in kinds:
    try:
        socket.socket(family, kind).close()
    except OSError as error:
        print(name, "refused:", error)
    else:
        print("ESCAPED:", name, "socket made")
for address in (("127.0.0.1", port), ("192.0.2.1", 80)):
    try:
        socket.create_connection(address, timeout=2)
    except OSError as error:
        print(address[0], "refused:", error)
    else:
        print("ESCAPED: connected to", address)
