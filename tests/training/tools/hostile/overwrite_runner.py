"""Change the code that runs this program, on disk and in memory, and forge what it says."""

import builtins
import os
import sys

for path in ("/program/runner.py", "/program/program.py", "runner.py"):
    try:
        with open(path, "w") as file:
            file.write("print('ESCAPED: my runner')")
        print("wrote" if path == "runner.py" else "ESCAPED: wrote", path)
    except OSError as error:
        print("refused:", path, error.strerror)
runner = sys.modules["__main__"]
runner.save_figures = lambda: os._exit(7)
builtins.repr = lambda value: "forged"
sys.stdout.flush()
