"""How a process of the command line is set up."""

import ctypes
import gc
import logging
import os
import sys
import warnings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have torch ask for huge pages, and glibc, where it is, keep what this process frees: before torch allocates.

    By default it hands maps of 32 MiB and more back to the kernel, which clears them page by page when the next step
    asks for them again: 6 % of a step on the CPU.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def collect_garbage_rarely() -> None:
    """Have Python look for cycles after 10,000 new objects instead of 700.

    What torch imports makes hundreds of thousands, none of them garbage, and looking at them takes a sixth of the time
    until a run's first step.
    """
    gc.set_threshold(10_000)


def hush_torch() -> None:
    """Leave out torch's warnings of what is as it should be."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler tells when it begins and ends
    # wherever there is CUDA's toolkit and no GPU, such as on a cluster's login node
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # convolutions use it; projections to logits are small, and exact
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
