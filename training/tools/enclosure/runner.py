"""Runs one program the way a notebook cell runs: a last expression is shown, figures are saved as PNG files.

Started inside the enclosure as `python -I -S -B runner.py PROGRAM PACKAGES...`; it is nothing but a convenience, no
part of the protection: the program may do to it what it likes.
"""

import ast
import sys
import traceback


def main() -> None:
    """Run the file named first, with the other arguments as folders of packages."""
    path, packages = sys.argv[1], sys.argv[2:]
    sys.path[:] = [p for p in sys.path if p != "/program"] + packages
    sys.argv = [path]
    sys.dont_write_bytecode = True
    with open(path, encoding="utf-8") as file:
        source = file.read()
    sys.exit(run(source))


def run(source: str) -> int:
    """Run a program's text as `__main__`; 0 if it ended by itself without an error."""
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    status = 0
    try:
        body = ast.parse(source, "program.py")
        last = None
        if body.body and isinstance(shown := body.body[-1], ast.Expr):
            body.body.pop()
            last = ast.Expression(shown.value)
        exec(compile(body, "program.py", "exec"), space)
        if last is not None:
            value = eval(compile(last, "program.py", "eval"), space)
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        show(error, source)
        status = 1
    try:
        save_figures()
    except BaseException as error:
        show(error, source)
        status = status or 1
    return status


def show(error: BaseException, source: str) -> None:
    """A traceback without the frames of this file, with the program's lines."""
    import linecache

    linecache.cache["program.py"] = (len(source), None, source.splitlines(keepends=True), "program.py")
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != "program.py":
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace)


def save_figures() -> None:
    """Write figures that matplotlib still has open to figure_1.png, ..."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        for number in pyplot.get_fignums():
            pyplot.figure(number).savefig(f"figure_{number}.png")


if __name__ == "__main__":
    main()
