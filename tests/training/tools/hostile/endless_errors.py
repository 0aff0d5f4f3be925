"""Write to standard error for 30 s."""

import os
import time

end = time.monotonic() + 30
while time.monotonic() < end:
    os.write(2, b"error " * 1000)
print("ESCAPED: all was taken")
