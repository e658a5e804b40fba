"""The C library's allocator, for processes that allocate and free the same large tensors at every step."""

import ctypes
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for later allocations of up to 1 GiB; return whether it does.

    By default it returns freed tensors to the kernel, which fills new ones with zeros again, page by page.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, _BYTES) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])
