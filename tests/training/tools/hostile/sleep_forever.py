"""Wait, using nothing."""

import time

time.sleep(30)
print("ESCAPED: slept for 30 s")
