"""Ask the kernel directly for what an escape needs."""

import ctypes
import os
import platform

libc = ctypes.CDLL(None, use_errno=True)
NEW_USER, NEW_NS = 0x10000000, 0x00020000
x86 = platform.machine() == "x86_64"
calls = {
    "ptrace the first process": lambda: libc.ptrace(16, 1, None, None),
    "mount": lambda: libc.mount(b"none", b"/scratch", b"tmpfs", 0, None),
    "remount /": lambda: libc.mount(None, b"/", None, 0x1020, None),
    "umount": lambda: libc.umount2(b"/scratch", 2),
    "unshare user": lambda: libc.unshare(NEW_USER),
    "unshare mount": lambda: libc.unshare(NEW_NS),
    "clone into a user namespace": lambda: libc.syscall(56 if x86 else 220, NEW_USER | 17, 0, 0, 0, 0),
    "clone3": lambda: libc.syscall(435, None, 0),
    "setns": lambda: libc.setns(0, 0),
    "chroot": lambda: libc.chroot(b"/scratch"),
    "memfd": lambda: libc.memfd_create(b"x", 0),
    "bpf": lambda: libc.syscall(321 if x86 else 280, 0, None, 0),
    "io_uring": lambda: libc.syscall(425, 8, None),
    "keyctl": lambda: libc.syscall(250 if x86 else 219, 0, -3, 0),
    "perf": lambda: libc.syscall(298 if x86 else 241, None, 0, -1, -1, 0),
    "read memory of the first process": lambda: libc.process_vm_readv(1, None, 0, None, 0, 0),
    "limits of the first process": lambda: libc.prlimit(1, 7, (ctypes.c_ulong * 2)(1, 1), None),
    "become root": lambda: libc.setuid(0),
    "raise a limit": lambda: libc.setrlimit(9, (ctypes.c_ulong * 2)(1 << 40, 1 << 40)),
    "open a process": lambda: libc.syscall(434, 1, 0),
    "shared memory": lambda: libc.shmget(0, 1 << 20, 0o1600),
}
for name, call in calls.items():
    ctypes.set_errno(0)
    result = call()
    print("ESCAPED:" if result >= 0 else "refused:", name, result, os.strerror(ctypes.get_errno()))
