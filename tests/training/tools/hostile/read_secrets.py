"""Read what a thief would look for: keys, password hashes, the environment, other processes, a file of the host."""

import glob
import os
import pwd

paths = ["/etc/shadow", "/etc/hosts", "/etc/hostname", "/proc/1/environ", "/proc/self/environ", "/proc/1/maps"]
paths += ["/proc/cpuinfo", "/sys/kernel/notes", "/dev/kmsg", "/dev/mem", "/dev/sda", "/dev/vda", "/var/log/syslog"]
paths += [SECRET_FILE, os.path.dirname(SECRET_FILE)]  # noqa: F821  (the test defines it in front)
for path in paths:
    try:
        if os.path.isdir(path):
            found = os.listdir(path)
        else:
            with open(path, "rb") as file:
                found = file.read(64)
    except OSError as error:
        print("refused:", path, error.strerror)
    else:
        print("ESCAPED: read", path, found)
for home in {os.path.expanduser("~root"), "/home", *(entry.pw_dir for entry in pwd.getpwall()), HOME}:  # noqa: F821
    for pattern in ("*", ".*"):
        for found in glob.glob(f"{home}/{pattern}"):
            if home != "/scratch" and found not in READABLE_PARENTS:  # noqa: F821
                print("ESCAPED: home holds", found)
if any("SECRET" in name or "SECRET" in value for name, value in os.environ.items()):
    print("ESCAPED: environment", dict(os.environ))
print("users:", [entry.pw_name for entry in pwd.getpwall()])
