"""Fork twice, leave the session, close everything, and go on after the program has ended."""

import os
import time

if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        end = time.monotonic() + 25
        while time.monotonic() < end:
            time.sleep(0.05)
        os._exit(0)
    os._exit(0)
os.wait()  # the one in between, which ends once the daemon runs
print("the program ends, its daemon does not")
