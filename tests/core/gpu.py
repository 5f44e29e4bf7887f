# SPDX-License-Identifier: Apache-2.0
"""Where the tests of the CUDA kernels run: on a GPU, or emulated.

With the environment variable TF_DEFORM_TEST_GPU=1 the kernels run on the
machine's GPU: the library is the core (see core.py), built with nvcc, and its
memory comes from PyTorch. Otherwise the same sources, compiled for the host,
run thread by thread on emulated blocks (emulated_cuda.h).
"""

import ctypes
import functools
import glob
import os
import pathlib
import shutil
import subprocess
import tempfile

import core
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
ON_GPU = os.environ.get("TF_DEFORM_TEST_GPU") == "1"
GUARD = 256  # bytes before and behind every tensor


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


def build_emulated(path: str) -> None:
    """Compiles the kernels for the host into a shared object."""
    sources = sorted(glob.glob("cc/core/*_cuda.cu", root_dir=ROOT))
    sources.remove("cc/core/device_cuda.cu")
    for name in ("*_c", "common", "checks", "rois", "threads"):
        sources += glob.glob(f"cc/core/{name}.cc", root_dir=ROOT)
    for name in ("conv2d", "psroi_pool", "roi_align"):
        sources.append(f"cc/core/deformable_{name}.cc")
    sources.append("tests/core/emulated_cuda.cc")
    compiler = os.environ.get("CXX") or shutil.which("c++")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-I."]
    flags += ["-Wno-attributes", "-Wno-unknown-pragmas", "-DTF_DEFORM_CUDA"]
    flags += ["-ffp-contract=off", "-include", "tests/core/emulated_cuda.h"]
    with tempfile.TemporaryDirectory() as folder:
        jobs, objects = [], []
        for i, source in enumerate(sources):
            objects.append(os.path.join(folder, f"{i}.o"))
            command = [compiler, *flags, "-x", "c++", "-c", source]
            jobs.append(
                subprocess.Popen([*command, "-o", objects[-1]], cwd=ROOT)
            )
            while sum(job.poll() is None for job in jobs) >= (
                os.cpu_count() or 1
            ):
                next(job for job in jobs if job.poll() is None).wait()
        assert all(job.wait() == 0 for job in jobs), "see above"
        subprocess.run(
            [compiler, "-shared", *objects, "-lpthread", "-o", path],
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


class Tensor:
    """Device memory with the bytes of an array, or none: all NaN (0xFF)."""

    def __init__(self, array=None, *, shape=(), dtype=None, offset=0):
        self.shape = array.shape if array is not None else shape
        self.dtype = np.dtype(array.dtype if array is not None else dtype)
        count = int(np.prod(self.shape, dtype=np.int64))
        self.num_bytes = count * self.dtype.itemsize
        host = np.full(self.num_bytes + 3 * GUARD, 0xFF, np.uint8)
        self.start = GUARD + offset  # an offset makes it less aligned
        if not ON_GPU:
            self.start += -(host.ctypes.data + GUARD) % GUARD
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
        """The values; fails if something was written around them."""
        host = self._memory
        if ON_GPU:
            host = host.cpu().numpy()
        end = self.start + self.num_bytes
        assert (host[: self.start] == 0xFF).all(), "written before a tensor"
        assert (host[end:] == 0xFF).all(), "written behind a tensor"
        return host[self.start : end].view(self.dtype).reshape(self.shape)


def call(name: str, arguments) -> None:
    """Calls an entry point, which reports what is wrong in a message."""
    message = ctypes.create_string_buffer(512)
    code = getattr(library(), name)(
        *arguments, message, ctypes.c_int64(len(message))
    )
    if code != 0:
        raise core.CoreError(message.value.decode())


def workspace_bytes(name: str, *arguments) -> int:
    function = getattr(library(), name)
    function.restype = ctypes.c_int64
    return function(*arguments)


def workspace(num_bytes: int) -> Tensor:
    return Tensor(shape=(num_bytes,), dtype=np.uint8)
