"""Compute for ever, deaf to what can be ignored."""

import contextlib
import signal
import time

for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    with contextlib.suppress(OSError):
        signal.signal(number, signal.SIG_IGN)
while time.process_time() < 30:
    pass
print("ESCAPED: computed for 30 s")
