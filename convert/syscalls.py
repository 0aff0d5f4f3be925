"""Three Linux system calls that Python's `os` lacks. Each says whether the file system can do it.

Where they do not exist (another system, an old file system) the caller has another way that is slower, never wrong.
"""

import ctypes
import errno
import os
from functools import cache

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_CANNOT = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> bool:
    """Call the function `name`; False if there is none or the file system refuses it, OSError for any other failure."""
    function = getattr(_libc(), name, None)
    if function is None:
        return False
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in _CANNOT:
            return False
        raise OSError(code, os.strerror(code))
    return True


def allocate(fd: int, size: int) -> bool:
    """Reserve `size` bytes of disk for the file and set its size.

    `os.posix_fallocate` would write a byte into every block where the file system cannot reserve.

    Raises:
        OSError: ENOSPC, EFBIG, EDQUOT ...: the space is not there.
    """
    return _call("fallocate64", fd, 0, ctypes.c_int64(0), ctypes.c_int64(size))


def exchange(first: str, second: str) -> bool:
    """Swap two directory entries in one step."""
    return _call(
        "renameat2", _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)
    )


def start_writeback(fd: int, offset: int, size: int) -> bool:
    """Ask the kernel to begin writing this range to disk now; does not wait and promises nothing."""
    return _call(
        "sync_file_range", fd, ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
    )
