"""Hold memory that belongs to no address space: pairs of sockets filled to the brim, then pipes."""

import os
import socket

held, total = [], 0
try:
    while total < 512 << 20:
        pair = socket.socketpair()
        held.append(pair)
        pair[0].setblocking(False)
        try:
            while total < 512 << 20:
                total += pair[0].send(b"x" * 65536)
        except BlockingIOError:
            pass
    print("ESCAPED: holds", total >> 20, "MiB")
except OSError as error:
    print("refused:", error.strerror, "after", len(held), "pairs and", total >> 10, "KiB")
try:
    pipes = [os.pipe() for _ in range(1000)]
    print("ESCAPED: 1000 pipes")
except OSError as error:
    print("refused:", error.strerror)
