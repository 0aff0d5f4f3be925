"""Close every descriptor, write to all numbers, and keep running for a moment."""

import os
import time

for number in range(3, 64):
    try:
        os.write(number, b"forged report")
        print("ESCAPED: descriptor", number, "can be written")
    except OSError:
        pass
print("before", flush=True)
os.closerange(0, 4096)
time.sleep(0.3)
