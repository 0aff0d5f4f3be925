"""Names that could confuse whoever writes the files out: control characters, undecodable bytes, very deep and long."""

import os

for name in (b"new\nline.png", b"\xff\xfe.png", b"-rf", b"a" * 250 + b".png", b"\x1b[31mred.png"):
    with open(name, "w") as file:
        file.write("odd")
deep = "/".join(["d"] * 40)
os.makedirs(deep)
with open(deep + "/deep.png", "w") as file:
    file.write("deep")
with open("honest.txt", "w") as file:
    file.write("honest")
