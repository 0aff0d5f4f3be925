"""Claim terabytes without writing them, and make very many empty files."""

import os

try:
    with open("sparse.bin", "wb") as file:
        file.truncate(1 << 40)
    print("ESCAPED: a file of 1 TiB")
except OSError as error:
    print("refused:", error.strerror)
for number in range(8):
    with open(f"sparse{number}.bin", "wb") as file:
        file.truncate(8 << 20)
made = 0
try:
    for number in range(20000):
        os.close(os.open(f"empty{number}", os.O_CREAT | os.O_WRONLY))
        made += 1
except OSError as error:
    print("refused:", error.strerror, "after", made)
else:
    print("ESCAPED: made", made, "files")
