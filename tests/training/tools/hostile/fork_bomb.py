"""Fork until it fails; capped far above the limit, and harmless should nothing stop it."""

import os
import sys
import time

started = 0
for _ in range(200):
    try:
        pid = os.fork()
    except OSError:
        print("refused after", started)
        sys.exit(0)
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    started += 1
print("ESCAPED: started", started)
