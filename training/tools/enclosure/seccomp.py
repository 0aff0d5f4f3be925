"""A filter of system calls: what a calculation never needs and an escape does.

A classic BPF program over `struct seccomp_data` {nr, arch, instruction_pointer, args[6]}. Everything is allowed but the
calls below, which answer EPERM, EACCES (sockets) or ENOSYS (clone3, so that libc takes clone, whose flags can be read).
"""

import ctypes
import errno
import struct

from . import kernel

# name: (x86_64, aarch64); None where the architecture has no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "perf_event_open": (298, 241),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # file systems and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "flock": (73, 32),  # a file that can only be read can be locked, and a program outside may wait for it
    # memory that no address space or folder accounts for
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "setsockopt": (54, 208),  # a pair of sockets takes megabytes where the system lets one ask for larger buffers
    # wide parts of the kernel
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "personality": (135, 92),
    "acct": (163, 89),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "uselib": (134, None),
    # the machine
    "reboot": (169, 142),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
}
SOCKET, CLONE, CLONE3, PRLIMIT = (41, 198), (56, 220), (435, 435), (302, 261)
SCHED_SETAFFINITY, IOCTL, FCNTL = (203, 122), (16, 29), (72, 25)
# More memory for a pipe; a lease, for which whoever opens the file outside would wait.
_FCNTL_DENIED = (1031, 1024)  # F_SETPIPE_SZ, F_SETLEASE
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_NAMESPACE_FLAGS = kernel.ALL_NAMESPACES | kernel.CLONE_NEWTIME

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARGS = 0, 4, 16
_X32 = 0x40000000


def build_filter(machine: str) -> bytes:
    """The BPF program for `machine` (x86_64, aarch64), as an array of `struct sock_filter`.

    Raises:
        KeyError: there is no table for this machine.
    """
    column = kernel.ARCHITECTURES.index(machine)
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    program += [(_EQUAL, 0, 1, SOCKET[column]), (_RETURN, 0, 0, _ERRNO | errno.EACCES)]
    program += [(_EQUAL, 0, 1, CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    program += _unless(CLONE[column], 0, _ANY_BIT, _NAMESPACE_FLAGS, refuse_when=True)
    program += _unless(PRLIMIT[column], 0, _EQUAL, 0, refuse_when=False)  # 0: the calling process itself
    program += _unless(SCHED_SETAFFINITY[column], 0, _EQUAL, 0, refuse_when=False)
    for request in _TERMINAL_INPUT:
        program += _unless(IOCTL[column], 1, _EQUAL, request, refuse_when=True)
    for command in _FCNTL_DENIED:
        program += _unless(FCNTL[column], 1, _EQUAL, command, refuse_when=True)
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def apply_filter() -> None:
    """Install the filter on this process and all it will start; needs no-new-privileges."""
    code = build_filter(kernel.MACHINE)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))
    kernel.prctl(kernel.PR_SET_SECCOMP, kernel.SECCOMP_MODE_FILTER, ctypes.addressof(holder))


def _unless(number: int, argument: int, test: int, value: int, *, refuse_when: bool) -> list[tuple[int, int, int, int]]:
    """Refuse call `number` when the test of the low half of one argument comes out as `refuse_when`."""
    refuse, allow = (0, 1) if refuse_when else (1, 0)
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGS + 8 * argument),
        (test, refuse, allow, value),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
        (_LOAD, 0, 0, _NR),
    ]
