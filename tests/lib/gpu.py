# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels for their tests: on a GPU, or emulated.

With the environment variable TF_DEFORM_TEST_GPU=1 the kernels run on the
machine's GPU: the library is the core (see core.py), built with nvcc, and its
memory comes from PyTorch. Otherwise the same sources, compiled for the host,
run thread by thread on emulated blocks (emulated_cuda.h).
"""

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import core
import emulated_nvcc
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
ON_GPU = os.environ.get("TF_DEFORM_TEST_GPU") == "1"
GUARD = 256  # bytes before and after every tensor


class CudaStream(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("allow_tf32", ctypes.c_bool),
        ("deterministic", ctypes.c_bool),
    ]


@contextlib.contextmanager
def emulated_build() -> Iterator[tuple[pathlib.Path, dict[str, str]]]:
    """Yields a folder for builds with emulated kernels, and their environment.

    Objects that are compiled there are kept: see cc/build.py.
    """
    folder = ROOT / "build" / "emulated"
    nvcc = emulated_nvcc.install(folder)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The CPU's kernels are not tested, so they are compiled quickly.
        yield folder, {**os.environ, "TF_DEFORM_NVCC": nvcc, "CXXFLAGS": "-O0"}


def build_emulated(path: str) -> None:
    """Makes the core with emulated kernels as a shared object."""
    with emulated_build() as (folder, environment):
        subprocess.run(
            [
                *(sys.executable, "cc/build.py", "--output", path),
                *("--objects", folder / "temp"),
            ],
            cwd=ROOT,
            env=environment,
            check=True,
        )


@functools.cache
def library() -> ctypes.CDLL:
    if ON_GPU:
        return core.library()
    path = os.environ.get("TF_DEFORM_EMULATED_CORE")
    if path:
        return ctypes.CDLL(path)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "emulated.so")
        build_emulated(path)
        return ctypes.CDLL(path)


@contextlib.contextmanager
def opposite_order() -> Iterator[None]:
    """Runs the threads of emulated blocks in the opposite order."""
    library().TfDeformEmulatedOrder(1)
    try:
        yield
    finally:
        library().TfDeformEmulatedOrder(0)


def _before_a_wall(
    num_bytes: int, alignment: int, offset: int
) -> tuple[np.ndarray, int]:
    """Returns memory that ends where reading must end, and the start to use.

    A read 16 bytes or more past the end stops the process.
    """
    page = mmap.PAGESIZE
    occupied = -(-(num_bytes + offset) // alignment) * alignment
    size = -(-(GUARD + occupied) // page) * page
    memory = mmap.mmap(-1, size + page)
    host = np.frombuffer(memory, np.uint8, size)
    libc = ctypes.CDLL(None, use_errno=True)
    wall = ctypes.c_void_p(host.ctypes.data + size)
    none = 0  # PROT_NONE
    if libc.mprotect(wall, ctypes.c_size_t(page), none) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    return host, size - occupied + offset


class Tensor:
    """Holds device memory: the bytes of an array, or only NaN (0xFF)."""

    def __init__(
        self, array=None, *, shape=(), dtype=None, alignment=16, offset=0
    ):
        """Begins `offset` bytes after a multiple of `alignment`."""
        self.shape = array.shape if array is not None else shape
        self.dtype = np.dtype(array.dtype if array is not None else dtype)
        count = int(np.prod(self.shape, dtype=np.int64))
        self.num_bytes = count * self.dtype.itemsize
        if ON_GPU:
            host = np.empty(self.num_bytes + 3 * GUARD, np.uint8)
            self.start = GUARD + offset
        else:
            host, self.start = _before_a_wall(self.num_bytes, alignment, offset)
        host[:] = 0xFF
        if array is not None:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            host[self.start : self.start + self.num_bytes] = data
        if ON_GPU:
            import torch

            self._memory = torch.from_numpy(host).cuda()
            base = self._memory.data_ptr()
            assert base % GUARD == 0
        else:
            self._memory = host
            base = host.ctypes.data
        self.pointer = base + self.start

    def numpy(self) -> np.ndarray:
        """Returns the values; fails if memory around the tensor was written."""
        host = self._memory
        if ON_GPU:
            host = host.cpu().numpy()
        end = self.start + self.num_bytes
        assert (host[: self.start] == 0xFF).all(), "written before a tensor"
        assert (host[end:] == 0xFF).all(), "written behind a tensor"
        return host[self.start : end].view(self.dtype).reshape(self.shape)


class Gpu(core.Cpu):
    """Runs the ops' CUDA kernels, with tensors aligned to 16 bytes.

    If `misaligned`, tensors are aligned to an element only.
    """

    name = "Cuda"
    alignment = GUARD

    def __init__(self, library=library, *, misaligned=False, **options: bool):
        super().__init__(library)
        self.misaligned, self.options = misaligned, options

    def memory(self, array=None, *, shape=(), dtype=None, alignment=16):
        if self.misaligned and alignment < GUARD:
            offset = np.dtype(dtype or array.dtype).itemsize
            return Tensor(array, shape=shape, dtype=dtype, offset=offset)
        return Tensor(array, shape=shape, dtype=dtype, alignment=alignment)

    def lend(self, array):
        return Tensor(array) if ON_GPU else core.Array(array)

    def executor(self, threads: int = 1):
        """Returns the stream of the kernels, with `options`."""
        handle = None
        if ON_GPU:
            import torch

            handle = torch.cuda.current_stream().cuda_stream
        return ctypes.byref(CudaStream(handle, **self.options))
