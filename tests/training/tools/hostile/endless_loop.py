"""Compute for ever, deaf to what can be ignored."""

import contextlib
import signal
import time

for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    with contextlib.suppress(OSError):
        signal.signal(number, signal.SIG_IGN)
end = time.monotonic() + 30
while time.monotonic() < end:
    pass
print("ESCAPED: ran for 30 s")
