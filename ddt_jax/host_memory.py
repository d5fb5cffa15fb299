"""Has the C library take large blocks in huge pages.

XLA's CPU backend allocates the temporaries of a program anew for every execution, in threads whose blocks glibc takes
straight from the kernel and returns when freed. So every step faults in all of its temporaries, page by page of 4 KB:
a sixth of a small model's step, or a quarter. In pages of 2 MB it is hundreds of faults in place of tens of thousands.
"""

import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_OPTION = "glibc.malloc.hugetlb"  # 1: glibc calls madvise(MADV_HUGEPAGE), from 2.35 on
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never", the choice in brackets


def use_huge_pages() -> None:
    """Starts this process anew with the option that glibc reads at its start, where that would change anything.

    To be called first of all, by a program and not by a library: what was done before is done again. The process keeps
    its number, arguments and files. A choice made outside, by the environment or the kernel, stands.
    """
    already = os.environ.get(_TUNABLES, "")
    if _OPTION in already or not _helps():
        return
    os.environ[_TUNABLES] = ":".join(filter(None, (already, f"{_OPTION}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _helps() -> bool:
    try:
        name, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
        recent = name == "glibc" and tuple(int(n) for n in version.split(".")[:2]) >= (2, 35)
        return recent and "[madvise]" in _KERNEL.read_text()
    except (OSError, ValueError, AttributeError):  # another system, or another C library
        return False
