"""Six processes take 200 MiB each: every one within its own limit, together far above the total."""

import os
import time

read, write = os.pipe()
for _ in range(6):
    if os.fork() == 0:
        held = [b"x" * (8 << 20) for _ in range(25)]
        os.write(write, b".")
        time.sleep(20)
        os._exit(0)
for _ in range(6):
    os.read(read, 1)
time.sleep(1)  # all is held: the watcher has had its time
print("ESCAPED: all six have it")
