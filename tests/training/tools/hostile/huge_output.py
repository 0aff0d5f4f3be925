"""Print 200 MB."""

import sys

for _ in range(200):
    sys.stdout.write("x" * 1_000_000)
sys.stdout.flush()
sys.stderr.write("ESCAPED: all was taken")
