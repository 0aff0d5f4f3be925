"""One process takes memory in steps of 16 MiB, at most 1.5 GiB."""

held = []
try:
    for _ in range(96):
        held.append(b"x" * (16 << 20))
except MemoryError:
    print("refused after", len(held) * 16, "MiB")
else:
    print("ESCAPED: took", len(held) * 16, "MiB")
