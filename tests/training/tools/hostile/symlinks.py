"""Leave links for whoever collects the folder: to files and folders of the host, out of it, to itself, as images."""

import os

os.symlink(SECRET_FILE, "secret.png")  # noqa: F821  (the test defines it in front)
os.symlink(os.path.dirname(SECRET_FILE), "folder")  # noqa: F821
os.symlink("/etc/shadow", "shadow.txt")
os.symlink("../../../../../../etc/passwd", "climb.txt")
os.symlink("loop", "loop")
os.mkdir("real")
os.symlink("/", "real/root")
os.mkfifo("pipe.png")
try:
    os.link("/etc/passwd", "hard.txt")
    print("ESCAPED: hard link out of the folder")
except OSError as error:
    print("refused: link", error.strerror)
try:
    os.mknod("disk", 0o60666, os.makedev(8, 0))
    print("ESCAPED: made a device")
except OSError as error:
    print("refused: mknod", error.strerror)
with open("honest.txt", "w") as file:
    file.write("honest")
