"""How much an untrusted program may use, and how much of what it leaves is shown to a model."""

from dataclasses import asdict, dataclass

from ...errors import SandboxError

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Bounds of one run of one program; all of them choices of ours.

    The kernel enforces every bound but `total_bytes` exactly. `total_bytes` is looked at every 20 ms and the whole
    tree is killed when it is passed, so the true peak may be larger by what is touched in that time; it can never pass
    (processes + 1) x process_bytes + scratch_bytes.
    """

    wall_seconds: float = 20.0
    cpu_seconds: float = 20.0  # of each process
    process_bytes: int = 2048 * _MIB  # address space of each process
    total_bytes: int = 2048 * _MIB  # memory of all processes and of the writable folder, together
    processes: int = 16  # processes and threads at one time beside the first
    output_bytes: int = 64 * 1024  # of standard output, and as much of standard error
    scratch_bytes: int = 64 * _MIB  # the writable folder, which lives in memory
    scratch_files: int = 1024  # files and folders in it
    file_bytes: int = 64 * _MIB  # one file
    open_files: int = 64  # of each process

    def __post_init__(self) -> None:
        """Raises SandboxError for a bound that is not above zero."""
        for name, value in asdict(self).items():
            if not value > 0:
                raise SandboxError(f"the sandbox limit {name} is {value}. Expected a number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolLimits:
    """Bounds of what one tool call gives back to the model, whatever the tool; choices of ours.

    HDPO's published run allows observations of 8,192 tokens and 400 s for a call.
    """

    seconds: float = 60.0
    text_characters: int = 8192
    images: int = 4
    image_pixels: int = 1024 * 28 * 28  # larger images are scaled down to this area: 1,024 visual tokens
    decoded_pixels: int = 16_000_000  # images that claim more are not opened

    def __post_init__(self) -> None:
        """Raises SandboxError for a bound that is not above zero (no images is a bound that makes sense)."""
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name != "images"):
                raise SandboxError(f"the tool limit {name} is {value}. Expected a number above 0.")
