"""Hold locks on files of the host, which whoever needs them there would wait for; databases of one's own still work."""

import fcntl
import sqlite3

attempts = {
    "exclusive lock": lambda file: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "shared lock": lambda file: fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB),
    "lease": lambda file: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    "exclusive record lock": lambda file: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB),
}
open("/scratch/own", "w").close()
for path in (sqlite3.__file__, "/scratch/own"):
    with open(path, "rb") as file:
        for name, attempt in attempts.items():
            try:
                attempt(file)
                print("ESCAPED:", name, path)
            except OSError as error:
                print(f"refused: {name}: {error.strerror}")

with sqlite3.connect("/scratch/data.sqlite") as database:
    database.execute("CREATE TABLE numbers (n)")
    database.execute("INSERT INTO numbers VALUES (4)")
print("own database:", database.execute("SELECT n FROM numbers").fetchone())
