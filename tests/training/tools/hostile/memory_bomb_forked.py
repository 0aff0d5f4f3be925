"""Six processes take 200 MiB each: every one within its own limit, together far above the total."""

import os
import time

for _ in range(6):
    if os.fork() == 0:
        held = [b"x" * (8 << 20) for _ in range(25)]
        time.sleep(20)
        os._exit(0)
time.sleep(5)
print("ESCAPED: all six have it")
