"""Memory that an iteration gives back is kept for the next one: the C library's allocator, told so once a process."""

import ctypes
import platform

# <malloc.h> of glibc: parameters of mallopt, and their values as a process starts
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER_TRIM, NO_MMAP = -1, 0
USUAL_TRIM, USUAL_MMAPS = 128 * 1024, 65536


def keep_memory(keep: bool = True) -> bool:
    """Lets the process keep what it frees, so that tensors of every iteration lie where those of the last one lay.

    glibc hands large blocks back to the system at once and takes them again as zeroed pages, a page fault each: 2,162
    faults and a quarter of the CPU time of an iteration of net A at an eighth of its width (measured,
    docs/benchmarks/training.md). No number changes. keep False: as a process starts. Gives whether the C library has
    taken it: only glibc knows the words.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mmaps, trim = (NO_MMAP, NEVER_TRIM) if keep else (USUAL_MMAPS, USUAL_TRIM)
    return bool(mallopt(M_MMAP_MAX, mmaps)) and bool(mallopt(M_TRIM_THRESHOLD, trim))
