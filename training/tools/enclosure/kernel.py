"""The Linux calls that Python does not offer, each raising OSError with its name.

Numbers are those of the kernel's tables for x86_64 and aarch64 (`arch/x86/entry/syscalls/syscall_64.tbl`,
`include/uapi/asm-generic/unistd.h`); from 424 on they are the same everywhere.
"""

import ctypes
import os

MACHINE = os.uname().machine
ARCHITECTURES = ("x86_64", "aarch64")
_COLUMN = ARCHITECTURES.index(MACHINE) if MACHINE in ARCHITECTURES else 0
_CLONE, _PIVOT_ROOT, _CAPSET = (56, 220)[_COLUMN], (155, 41)[_COLUMN], (126, 91)[_COLUMN]
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x00000080
ALL_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
)

AT_FDCWD, AT_RECURSIVE, AT_EMPTY_PATH = -100, 0x8000, 0x1000
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8  # MOUNT_ATTR_*
_MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x4000, 0x40000, 2
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE, _FSMOUNT_CLOEXEC = 1, 6, 1

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 22, 38, 47
SECCOMP_MODE_FILTER = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(name: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def _syscall(name: str, number: int, *arguments: int | bytes | None) -> int:
    """A raw system call; integers are passed at full width, bytes as pointers."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *passed))


def clone(flags: int) -> int:
    """Fork into new namespaces: 0 in the child, its process id in the parent. Needs a process with one thread."""
    sigchld = 17
    return _syscall("clone into new namespaces", _CLONE, flags | sigchld, 0, 0, 0, 0)


def make_mounts_private() -> None:
    """Nothing that is mounted from here on is seen outside, and nothing mounted outside appears here."""
    _checked("mount private", _libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def open_tree(path: str) -> int:
    """A detached copy of a file or of a whole tree of mounts, to be placed with `move_mount`."""
    flags = _OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC
    return _syscall(f"open_tree {path}", _OPEN_TREE, AT_FDCWD, os.fsencode(path), flags)


def new_filesystem(kind: str, **options: str) -> int:
    """A new detached file system, `tmpfs` or `proc`."""
    context = _syscall(f"fsopen {kind}", _FSOPEN, kind.encode(), 1)
    try:
        for key, value in options.items():
            _syscall(f"{kind} {key}", _FSCONFIG, context, _FSCONFIG_SET_STRING, key.encode(), value.encode(), 0)
        _syscall(f"create {kind}", _FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(f"fsmount {kind}", _FSMOUNT, context, _FSMOUNT_CLOEXEC, NOSUID | NODEV)
    finally:
        os.close(context)


def restrict_mount(fd: int, attributes: int, *, recursive: bool = True) -> None:
    """Add RDONLY, NOSUID, NODEV or NOEXEC to a mount (and to all below it)."""
    fields = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _syscall("mount_setattr", _MOUNT_SETATTR, fd, b"", flags, bytes(fields), ctypes.sizeof(fields))


def move_mount(fd: int, target: str) -> None:
    """Attach a detached mount at `target`."""
    name = f"move_mount {target}"
    _syscall(name, _MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def make_working_directory_the_root() -> None:
    """`pivot_root`, and let go of the old root."""
    _syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    _checked("umount the old root", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def prctl(option: int, *arguments: int) -> int:
    """`prctl` with integer arguments."""
    filled = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(f"prctl {option}", _libc.prctl(option, *filled))


def drop_all_capabilities() -> None:
    """Bounding, ambient, inheritable, permitted and effective: none is left, none can come back."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one this kernel knows, or none to drop
    prctl(PR_CAP_AMBIENT, 4)  # PR_CAP_AMBIENT_CLEAR_ALL
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _syscall("capset", _CAPSET, bytes(header), bytes((ctypes.c_uint32 * 6)()))
