"""Write, create, delete and change files in every folder that can be seen, and in some that should not exist."""

import os
import sys

targets = ["/", "/usr/lib", "/etc", "/program", "/dev", "/var/tmp", "/home", os.path.dirname(os.__file__)]
targets += [os.path.dirname(sys.executable), *sys.path]
for folder in dict.fromkeys(targets):
    path = os.path.join(folder, "written-from-the-sandbox")
    try:
        with open(path, "w") as file:
            file.write("x")
    except OSError as error:
        print("refused:", folder, error.strerror)
    else:
        print("ESCAPED: wrote", path)
for path in (os.__file__, "/etc/passwd", "/program/runner.py", sys.executable):
    for name, change in (
        ("open", lambda p: os.open(p, os.O_WRONLY)),
        ("chmod", lambda p: os.chmod(p, 0o777)),
        ("rm", os.remove),
    ):
        try:
            change(path)
        except OSError as error:
            print("refused:", name, path, error.strerror)
        else:
            print("ESCAPED:", name, path)
