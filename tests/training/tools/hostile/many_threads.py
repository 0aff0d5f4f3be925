"""Start threads until it fails; capped well above the limit."""

import threading
import time

started = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        started += 1
except (RuntimeError, MemoryError) as error:
    print("refused after", started, error)
else:
    print("ESCAPED: started", started)
