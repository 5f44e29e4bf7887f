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


def stream(allow_tf32=False, deterministic=False) -> CudaStream:
    handle = None
    if ON_GPU:
        import torch

        handle = torch.cuda.current_stream().cuda_stream
    return CudaStream(handle, allow_tf32, deterministic)


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
        yield folder, {**os.environ, "TF_DEFORM_NVCC": nvcc, "CXXFLAGS": "-O1"}


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
    folder = tempfile.TemporaryDirectory()
    library.folder = folder  # removed when the process ends
    path = os.path.join(folder.name, "emulated.so")
    build_emulated(path)
    return ctypes.CDLL(path)


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


def call(name: str, arguments) -> None:
    """Calls an entry point; raises its error message."""
    message = ctypes.create_string_buffer(512)
    code = getattr(library(), name)(
        *arguments, message, ctypes.c_int64(len(message))
    )
    if code != 0:
        raise core.CoreError(message.value.decode())


class Tensors:
    """Makes the tensors of one call, all aligned, or only to an element."""

    def __init__(self, misaligned: bool = False):
        self.misaligned = misaligned

    def of(self, array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        offset = self.misaligned * array.dtype.itemsize
        return Tensor(array, offset=offset)

    def made(self, shape: tuple, dtype: str) -> Tensor:
        """Returns a tensor that a kernel writes, in its stored type."""
        kept = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        offset = self.misaligned * kept.itemsize
        return Tensor(shape=shape, dtype=kept, offset=offset)


def pointers(kind: type[ctypes.Structure], tensors) -> ctypes.Structure:
    return kind(*(None if t is None else t.pointer for t in tensors))


def values(tensor: Tensor, dtype: str) -> np.ndarray:
    """Returns the values of a tensor, bfloat16 widened."""
    array = tensor.numpy()
    return core.from_bfloat16(array) if dtype == "bfloat16" else array


def workspace_bytes(name: str, *arguments) -> int:
    function = getattr(library(), name)
    function.restype = ctypes.c_int64
    return function(*arguments)


def workspace(num_bytes: int) -> Tensor:
    return Tensor(shape=(num_bytes,), dtype=np.uint8, alignment=GUARD)


def forward(op: str, params, dtype: str, operands, outputs, **options) -> int:
    """Runs an op's kernels; returns their bytes of scratch.

    `operands` is the op's structure of pointers, `outputs` the tensors to be
    written, or None.
    """
    name = f"TfDeform{op}Cuda"
    common = (ctypes.byref(params), core.DTYPES[dtype])
    num_bytes = workspace_bytes(f"{name}WorkspaceBytes", *common)
    scratch = workspace(num_bytes)
    call(
        f"{name}Forward",
        [
            *(*common, ctypes.byref(operands)),
            ctypes.c_void_p(scratch.pointer),
            *(ctypes.c_void_p(x.pointer if x else None) for x in outputs),
            ctypes.byref(stream(**options)),
        ],
    )
    scratch.numpy()
    return num_bytes


def backward(
    op: str, params, dtype: str, operands, output_grad, gradients, **options
) -> int:
    """Runs the gradient's kernels; returns their bytes of scratch."""
    name = f"TfDeform{op}CudaBackward"
    on = ctypes.byref(stream(**options))
    common = (ctypes.byref(params), core.DTYPES[dtype])
    num_bytes = workspace_bytes(
        f"{name}WorkspaceBytes", *common, ctypes.byref(gradients), on
    )
    scratch = workspace(num_bytes)
    call(
        name,
        [
            *(*common, ctypes.byref(operands)),
            ctypes.c_void_p(output_grad.pointer),
            ctypes.c_void_p(scratch.pointer),
            *(ctypes.byref(gradients), on),
        ],
    )
    scratch.numpy()
    return num_bytes
