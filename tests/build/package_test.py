# SPDX-License-Identifier: Apache-2.0
"""Tests what is built and installed, and that old saved models load."""

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tf_deform
from tf_deform import _build_info

PACKAGE = pathlib.Path(tf_deform.__file__).parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parents[2]


def test_metadata_of_a_build_from_source(metadata):
    """Tests that it requires the TensorFlow that it was built against.

    TensorFlow brings its own Keras.
    """
    (folder,) = metadata.glob("*.dist-info")
    distribution = importlib.metadata.PathDistribution(folder)
    assert distribution.version == tf_deform.__version__
    required = [x for x in distribution.requires if "extra ==" not in x]
    minor = ".".join(tf.__version__.split(".")[:2])
    assert required == [f"tensorflow=={minor}.*"]
    assert distribution.metadata["Requires-Python"] == ">=3.9"
    licenses = distribution.metadata.get_all("License-File")
    assert sorted(licenses) == ["LICENSE", "NOTICE"]
    for name in licenses:
        assert (folder / "licenses" / name).read_text() == (
            ROOT / name
        ).read_text()


def test_a_build_packs_no_library_of_an_earlier_one(tmp_path):
    """Tests that a build, which goes on in the same folder, begins clean."""
    package = tmp_path / "tf_deform"
    package.mkdir()
    for name in ("_ops.so", "_ops_2.4.so", "libtf_deform_core-0.0.1.so"):
        (package / name).touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib"]
    subprocess.run([*command, tmp_path], cwd=ROOT, timeout=300, check=True)
    assert not list(package.glob("*.so"))
    assert (package / "py.typed").exists()
    assert (package / "visualization/explorer.html").exists()
    assert (package / "_build_info.py").exists()
    assert (tmp_path / "tf_deform_cli.py").exists()


def test_both_builds_take_the_same_sources():
    setup = (ROOT / "setup.py").read_text() + (ROOT / "cc/build.py").read_text()
    bazel = (ROOT / "BUILD").read_text()
    for glob in ("cc/core/**/*.cc", "cc/*.cc"):
        assert f'"{glob}"' in setup
        assert f'"{glob}"' in bazel


def test_both_builds_compile_with_the_same_flags():
    """Tests that setup.py and Bazel use the same flags.

    A flag that one build lacks changes its code, and so its results.
    """
    spec = importlib.util.spec_from_file_location("build", ROOT / "cc/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    text = (ROOT / ".bazelrc").read_text()
    bazel = re.findall(r"^build .*", text, re.MULTILINE)
    flags = re.findall(r"--(?:copt|cxxopt)=(\S+)", " ".join(bazel))
    assert "build --compilation_mode=opt" in bazel
    # Bazel adds these flags itself.
    own = {"-DNDEBUG", "-fPIC", "-g0", "-I."}
    assert own < set(build.FLAGS)
    # setup.py compiles the core as C++17, and the sources that include
    # TensorFlow's headers without warnings about their macros; Bazel has one
    # set of flags for both.
    others = {"-std=c++17", "-Wno-deprecated-declarations"}
    setup = (ROOT / "setup.py").read_text()
    setup += (ROOT / "cc/build.py").read_text()
    assert all(f'"{flag}"' in setup for flag in others)
    assert set(flags) == set(build.FLAGS) - own | others


def test_no_flag_ties_the_binary_to_this_processor():
    for name in ("setup.py", "cc/build.py", "BUILD", ".bazelrc", "Makefile"):
        assert "-march" not in (ROOT / name).read_text()


def best_instruction_set() -> str:
    """Applies the rules of cc/core/cpu/isa.cc to what the system says."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    flags = {*re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)[1].split()}
    if not {"avx", "avx2", "fma", "f16c"} <= flags:
        return "baseline"
    if not {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "avx2"
    if {"amx_tile", "amx_bf16", "avx512_bf16"} <= flags:
        # Asks for the registers, which a system may refuse.
        arch_prctl, request, tiles = 158, 0x1023, 18
        if ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0:
            return "amx"
    # Intel's instructions for bfloat16 without AMX are slow.
    if "avx512_bf16" in flags and "GenuineIntel" not in text:
        return "avx512_bf16"
    return "avx512"


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="elsewhere there is one set"
)
def test_the_installed_core_uses_all_of_this_processor(run_python):
    """Tests the core by its answer.

    A library may seem sound, and run its slowest code without a word.
    """
    script = "import ctypes, sys; core = ctypes.CDLL(sys.argv[1])\n"
    script += "name = core.TfDeformInstructionSet\n"
    script += "name.restype = ctypes.c_char_p; print(name().decode())"
    core = PACKAGE / _build_info.CORE
    printed = run_python(script, core, TF_DEFORM_MAX_ISA="amx")
    assert printed == f"{best_instruction_set()}\n"


@pytest.mark.parametrize(
    "name",
    [
        "deformable_conv2d_1",
        "deformable_conv2d_2",
        "deformable_psroi_pool_1",
        "deformable_roi_align_1",
        "exported_1",
    ],
)
def test_golden_saved_models_load(name):
    """Tests models of earlier versions, which every later version must load.

    Four return an op's output and gradients, and have no attribute at its
    default; the second convolution is of a layer's fields, one of which is NaN.
    They are differentiated again, which takes defaults for attributes that the
    file does not know. One is a layer that `export` wrote.
    """
    with np.load(GOLDEN / name / "expected.npz") as file:
        arrays = [file[key] for key in file.files]
    model = tf.saved_model.load(GOLDEN / name)
    if name.startswith("exported"):
        received, expected = [model.serve(arrays[0])], arrays[1:]
    else:
        operands, expected = [tf.constant(x) for x in arrays[:3]], arrays[3:]
        with tf.GradientTape() as tape:
            tape.watch(operands)
            received = model(*operands)
        gradients = tape.gradient(received[1:], operands)
        assert gradients[0] is not None
        for gradient in filter(tf.is_tensor, gradients):
            assert np.isfinite(gradient).all()
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
