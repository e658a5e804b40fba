"""The C library's allocator, for processes that allocate and free the same large tensors at every step."""

import ctypes
import sys
from collections.abc import Mapping

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_BYTES = 1 << 30
# Read by glibc (2.35 or later) at the start of a process only; others ignore it.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for later allocations of up to 1 GiB; return whether it does.

    By default it returns freed tensors to the kernel, which fills new ones with zeros again, page by page.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, _BYTES) for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)])


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a new process whose glibc asks the kernel for pages of 2 MB; settings in `environment` prevail.

    With pages of 4 KB a step of a small model spends a twelfth of its time on the processor's address translation (LOG.md).
    """
    own = environment.get("GLIBC_TUNABLES")
    # Of two settings of one name glibc takes the last.
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, [_HUGE_PAGES, own]))}
