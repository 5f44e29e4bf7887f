# SPDX-License-Identifier: Apache-2.0
"""Tests builds with and without nvcc by reading their outputs; needs no GPU."""

import collections
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess

import cuda_resources
import pytest
from tensorflow.python.framework import kernels

import tf_deform
from tf_deform import _build_info

ROOT = pathlib.Path(__file__).parents[2]
CORE = pathlib.Path(tf_deform.__file__).parent / _build_info.CORE
OPS = ("DeformableConv2D", "DeformablePSROIPool", "DeformableROIAlign")

_spec = importlib.util.spec_from_file_location("build", ROOT / "cc/build.py")
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

needs_cuda = pytest.mark.skipif(
    not tf_deform.is_built_with_cuda(),
    reason="this tf_deform was built without nvcc",
)
needs_cuobjdump = pytest.mark.skipif(
    cuda_resources.find_cuobjdump() is None,
    reason="needs cuobjdump, from PyPI's nvidia-cuda-cuobjdump",
)
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="needs a C++ compiler"
)


# Contents of the package.


@pytest.mark.parametrize("suffix", ["", "Grad"])
@pytest.mark.parametrize("op", OPS)
def test_gpu_kernels_are_registered_for_every_type(op, suffix):
    types = collections.defaultdict(set)
    registered = kernels.get_registered_kernels_for_op(f"TfDeform>{op}{suffix}")
    for kernel in registered.kernel:
        types[kernel.device_type].add(
            frozenset(
                (constraint.name, *constraint.allowed_values.list.type)
                for constraint in kernel.constraint
            )
        )
    assert len(types["CPU"]) == 4
    assert types["GPU"] == (
        types["CPU"] if tf_deform.is_built_with_cuda() else set()
    )


@needs_cuda
@needs_cuobjdump
def test_machine_code_of_every_architecture_and_ptx():
    listing = cuda_resources.run_cuobjdump("-lelf", "-lptx", CORE)
    machine = collections.Counter(re.findall(r"(sm_\w+)\.cubin", listing))
    portable = collections.Counter(re.findall(r"(sm_\w+)\.ptx", listing))
    names = _build_info.CUDA_ARCHITECTURES.split(";")
    assert set(machine) == {f"sm_{name}" for name in names}
    assert len(portable) == 1
    # Every source was compiled for every architecture.
    assert len(set(machine.values()) | set(portable.values())) == 1


@needs_cuda
@needs_cuobjdump
def test_no_kernel_uses_local_memory_by_surprise():
    table = json.loads(cuda_resources.TABLE.read_text())
    if table["cuda_version"] != _build_info.CUDA_VERSION:
        pytest.skip(f"recorded with CUDA {table['cuda_version']}")
    measured = cuda_resources.measure(CORE)
    assert measured
    surprises = cuda_resources.compare(measured, table["kernels"])
    assert not surprises, (
        "If it is meant to be so: `python tests/lib/cuda_resources.py "
        "--record`. " + "; ".join(surprises)
    )


@needs_cuda
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_the_cuda_runtime_is_inside_and_hidden():
    """Tests that the core hides the symbols of its CUDA runtime.

    TensorFlow's CUDA runtime has the same symbols, in another version.
    """

    def symbols(*flags):
        listing = subprocess.run(
            ["nm", *flags, CORE],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return {line.split()[-1] for line in listing.splitlines()}

    inside = symbols("--defined-only")
    if not inside:
        pytest.skip("the library is stripped")
    assert "cudaDriverGetVersion" in inside
    # The library neither exports these symbols nor imports them.
    visible = [n for n in symbols("-D") if re.match(r"_*(cu[A-Zd]|fatbin)", n)]
    assert not visible


def test_parsing_of_resources():
    name = "_ZN9tf_deform4cuda4e_cu1KILi1EEEvv"
    listing = f"""
arch = sm_80
 Function {name}:
  REG:22 STACK:32 SHARED:0 LOCAL:8 CONSTANT[0]:376 TEXTURE:0 SURFACE:0
 Function _ZN9tf_deform4cuda4OpenIfEEvPT_:
  REG:20 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0
arch = sm_90
 Function {name}:
  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0
"""
    resources = cuda_resources.parse(listing)
    assert resources == {
        "e: K<1>": {"sm_80": [22, 32, 8], "sm_90": [24, 0, 0]},
        "Open<float>": {"sm_80": [20, 0, 0]},
    }
    assert not cuda_resources.compare(resources, resources)
    (surprise,) = cuda_resources.compare(resources, {})
    assert "e: K<1> (sm_80)" in surprise and "[22, 32, 8]" in surprise
    less = {"e: K<1>": {"sm_80": [22, 31, 8]}}
    (surprise,) = cuda_resources.compare(resources, less)
    assert "recorded [22, 31, 8]" in surprise


# The build itself.


def fake_nvcc(folder: pathlib.Path) -> str:
    """Makes an `nvcc` that wraps a CUDA 12.4 elsewhere, as on some systems."""
    home = folder / "cuda 12"
    (home / "lib64").mkdir(parents=True)
    (home / "lib64" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '--version) echo "Cuda compilation tools, release 12.4, V12.4.99";;\n'
        f"--dryrun*) echo '#$ TOP={home}/bin/..' >&2\n"
        "  echo '#$ LIBRARIES=  \"-L/nowhere\"' >&2;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    # TOP is written with a step up from a folder that must exist.
    (home / "bin").mkdir()
    return str(nvcc)


@pytest.mark.parametrize("value", ["", "0"])
def test_without_nvcc_by_choice(tmp_path, value):
    path = os.path.dirname(fake_nvcc(tmp_path))
    environ = {"TF_DEFORM_NVCC": value, "CUDA_HOME": "/", "PATH": path}
    assert build.find_nvcc(environ) is None
    assert build.find_cuda(environ=environ) is None
    text = build.describe(None)
    assert "CPU only" in text and "TF_DEFORM_NVCC" in text
    assert "\n" not in text


def test_where_nvcc_is_looked_for(tmp_path):
    nvcc = {x: fake_nvcc(tmp_path / x) for x in ("named", "home", "path")}
    environ = {
        "PATH": os.path.dirname(nvcc["path"]),
        "CUDA_HOME": str(tmp_path),
    }
    assert build.find_nvcc(environ) == nvcc["path"]
    environ["CUDA_HOME"] = str(tmp_path / "home")
    assert build.find_nvcc(environ) == nvcc["home"]
    environ["TF_DEFORM_NVCC"] = nvcc["named"]
    assert build.find_nvcc(environ) == nvcc["named"]
    found = build.find_nvcc({"PATH": str(tmp_path)})
    assert found in (None, "/usr/local/cuda/bin/nvcc")


def test_a_wrong_name_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="Expected TF_DEFORM_NVCC.*no program"):
        build.find_nvcc({"TF_DEFORM_NVCC": str(tmp_path / "nvcc")})


def test_the_runtime_is_found_through_a_wrapper(tmp_path):
    nvcc = fake_nvcc(tmp_path)
    assert build.ARCHITECTURES == "80;89;90"
    cuda = build.find_cuda("80;89;90a", {"TF_DEFORM_NVCC": nvcc})
    assert cuda.version == "12.4"
    assert cuda.runtime == str(
        tmp_path / "cuda 12" / "lib64" / "libcudart_static.a"
    )
    assert "12.4" in build.describe(cuda) and "80, 89, 90a" in build.describe(
        cuda
    )
    steps = build.core_steps(str(tmp_path), cuda)
    commands = {os.path.basename(s.source): s.command for s in steps}
    device = commands["device.cu"]
    assert device[0] == nvcc
    assert [f for f in device if "gencode" in f] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_89",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert "-DTF_DEFORM_CUDA" in commands["cuda_c.cc"]


def test_a_cpu_build_has_no_trace_of_cuda(tmp_path):
    for step in build.core_steps(str(tmp_path), None):
        assert step.source.endswith(".cc")
        assert "-DTF_DEFORM_CUDA" not in step.command


def test_an_installation_without_the_runtime_is_an_error(tmp_path):
    nvcc = fake_nvcc(tmp_path)
    (tmp_path / "cuda 12" / "lib64" / "libcudart_static.a").unlink()
    with pytest.raises(SystemExit, match="libcudart_static.a.*TF_DEFORM_NVCC"):
        build.find_cuda(environ={"TF_DEFORM_NVCC": nvcc})


@needs_compiler
def test_what_did_not_change_is_not_compiled_anew(tmp_path):
    source, header = tmp_path / "a b.cc", tmp_path / "a b.h"
    source.write_text('#include "a b.h"\nint F() { return kOne; }\n')
    header.write_text("constexpr int kOne = 1;\n")

    def compiled(*flags) -> int:
        """Returns the time at which the object was written."""
        command = ["c++", *flags]
        step = build.Step(str(source), str(tmp_path / "o" / "a.o"), command)
        (path,) = build.compile_all([step])
        return os.stat(path).st_mtime_ns

    first = compiled()
    os.utime(header)
    assert compiled() == first
    header.write_text("constexpr int kOne = 2;\n")
    second = compiled()
    assert second > first
    third = compiled("-O1")
    assert third > second
    header.write_text("constexpr int kOne = two;\n")
    with pytest.raises(SystemExit, match="a b.cc to compile"):
        compiled("-O1")
    header.write_text("constexpr int kOne = 2;\n")
    assert compiled("-O1") > third
