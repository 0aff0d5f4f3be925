"""Hold memory that belongs to no address space: pairs of sockets and pipes, made as large as they go, filled to the brim."""

import fcntl
import os
import socket

F_SETPIPE_SZ = 1031
ENOUGH = 64 << 20


def filled(write) -> int:
    """Bytes that go in before nobody takes more."""
    total = 0
    try:
        while total < ENOUGH:
            total += write(b"x" * 4096)
    except BlockingIOError:
        pass
    return total


def enlarged(change) -> str:
    try:
        change()
    except OSError as error:
        return f"refused: {error.strerror}"
    return "done"


held, total, answers = [], 0, set()
try:
    while total < ENOUGH:
        pair = socket.socketpair()
        held.append(pair)
        for end in pair:
            end.setblocking(False)
            for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                answers.add(enlarged(lambda: end.setsockopt(socket.SOL_SOCKET, size, 1 << 30)))  # noqa: B023
            total += filled(end.send)
    print("ESCAPED: holds", total >> 20, "MiB")
except OSError as error:
    print("refused:", error.strerror, "after", len(held), "pairs and", total >> 10, "KiB")
print("larger sockets", *answers)
for first, second in held:
    first.close()
    second.close()
pipes, total, answers = [], 0, set()
try:
    while total < ENOUGH:
        _, end = pair = os.pipe()
        pipes.append(pair)
        os.set_blocking(end, False)
        answers.add(enlarged(lambda: fcntl.fcntl(end, F_SETPIPE_SZ, 1 << 20)))  # noqa: B023
        total += filled(lambda data: os.write(end, data))  # noqa: B023
    print("ESCAPED: pipes hold", total >> 20, "MiB")
except OSError as error:
    print("refused:", error.strerror, "after", len(pipes), "pipes and", total >> 10, "KiB")
print("larger pipes", *answers)
if total > 4 << 20:
    print("ESCAPED: larger pipes")
