# SPDX-License-Identifier: Apache-2.0
"""Builds the core and the TensorFlow ops, and packs them with the Python code.

The ops are built against the TensorFlow that this interpreter imports; in an
isolated build, this is the TensorFlow that pyproject.toml names. The package
then requires that minor version, as TensorFlow's C++ interface changes with it.
"""

import functools
import os
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

VERSION = "0.1.0"
ROOT = os.path.dirname(os.path.abspath(__file__))
GLUE_SOURCES = "cc/*.cc"  # as in BUILD

sys.path.insert(0, ROOT)
from cc import build  # noqa: E402

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    import tensorflow as tf
except ImportError as error:
    sys.exit(
        "Expected TensorFlow to be installed to build against it. Received: "
        f"{error}. Run `pip install .` without --no-build-isolation, or "
        "`pip install 'tensorflow==2.21.*'` first."
    )
TF_MINOR = ".".join(tf.__version__.split(".")[:2])
# -isystem suppresses warnings about TensorFlow's headers. Its headers also
# deprecate names that their own macros use.
TENSORFLOW_FLAGS = [
    f"-isystem{flag[2:]}" if flag.startswith("-I") else flag
    for flag in tf.sysconfig.get_compile_flags()
] + ["-Wno-deprecated-declarations"]

TENSORFLOW_INCLUDE = tf.sysconfig.get_include()
# Older TensorFlow has no header for ops inside jit_compile=True.
XLA = os.path.exists(os.path.join(TENSORFLOW_INCLUDE, "xla/ffi/api/c_api.h"))
if XLA:
    TENSORFLOW_FLAGS += [
        f"-isystem{os.path.join(TENSORFLOW_INCLUDE, 'external', folder)}"
        for folder in ("highwayhash", "farmhash_archive/src")
    ]
# `import tensorflow` loads both libraries before the ops.
LINK_FLAGS = tf.sysconfig.get_link_flags()
LINK_FLAGS += ["-l:libtensorflow_cc.so.2"] if XLA else []


@functools.cache
def find_cuda() -> build.Cuda | None:
    """Finds the CUDA compiler, if there is one; prints what will be built."""
    cuda = build.find_cuda()
    print(build.describe(cuda), flush=True)
    return cuda


class BuildExtension(build_ext):
    """Compiles every source once; _core.so is part of _ops.so."""

    def get_ext_filename(self, fullname: str) -> str:
        # The names are plain: the libraries do not depend on Python's version.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        cuda = find_cuda()
        folder = os.path.abspath(self.build_temp)
        # The folder names the version, as the paths of TensorFlow's headers do
        # not.
        glue_folder = os.path.join(folder, f"tensorflow-{tf.__version__}")
        glue = build.cxx_steps(
            GLUE_SOURCES, glue_folder, cuda, TENSORFLOW_FLAGS
        )
        core = build.core_steps(folder, cuda)
        # The glue comes first, as it takes long to compile: at the end, all
        # other processors would wait for it.
        objects = build.compile_all([*glue, *core])
        for name, parts, flags in (
            ("tf_deform._core", objects[len(glue) :], ["-lpthread"]),
            ("tf_deform._ops", objects, LINK_FLAGS),
        ):
            build.link(self.get_ext_fullpath(name), parts, cuda, flags)


class BuildPython(build_py):
    """Adds the module that tells the loader what the ops were built for."""

    def run(self) -> None:
        super().run()
        folder = "tf_deform"
        if not self.editable_mode:
            folder = os.path.join(self.build_lib, folder)
        os.makedirs(folder, exist_ok=True)
        cuda = find_cuda()
        version = f'"{cuda.version}"' if cuda else None
        architectures = f'"{";".join(cuda.architectures)}"' if cuda else None
        with open(os.path.join(folder, "_build_info.py"), "w") as file:
            file.write(
                '"""Written by setup.py."""\n\n'
                f'VERSION = "{VERSION}"\n'
                f'TENSORFLOW_VERSION = "{tf.__version__}"\n'
                f"CUDA_VERSION: str | None = {version}\n"
                f"CUDA_ARCHITECTURES: str | None = {architectures}\n"
                f"XLA = {XLA}\n"
            )


class BuildWheel(bdist_wheel):
    """Tags one wheel for every Python 3 that TensorFlow serves."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


os.chdir(ROOT)
with open("README.md", encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()

setup(
    name="tf-deform",
    version=VERSION,
    description="Deformable convolution and deformable ROI pooling for "
    "TensorFlow and Keras: native ops, gradients, layers.",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["tf_deform", "tf_deform.*"]),
    # The module lies beside the package, as importing the package loads
    # TensorFlow.
    py_modules=["tf_deform_cli"],
    entry_points={"console_scripts": ["tf-deform = tf_deform_cli:main"]},
    ext_modules=[
        Extension("tf_deform._core", []),
        Extension("tf_deform._ops", []),
    ],
    cmdclass={
        "build_ext": BuildExtension,
        "build_py": BuildPython,
        "bdist_wheel": BuildWheel,
    },
    install_requires=[
        f"tensorflow=={TF_MINOR}.*",
        "keras>=3.15,<4",
    ],
    extras_require={
        "onnx": [
            "tf2onnx>=1.17,<2",
            "onnx>=1.19,<2",
            "onnxruntime>=1.27,<2",
        ],
        "litert": [
            "ai-edge-litert>=2.3,<3",
            "ai-edge-quantizer>=0.10,<0.11",  # each is for one ai-edge-litert
        ],
        "examples": [
            "scikit-learn>=1.5,<2",
            "scikit-image>=0.25,<0.27",
            "matplotlib>=3.9,<4",
            "pillow>=11,<13",
            "scipy>=1.13,<2",
            "faster-coco-eval>=1.7,<2",
            "h5py>=3.11,<4",
            "tf-deform[onnx]",
            "tf-deform[litert]",
        ],
        "benchmark": [
            "tf-deform[onnx]",
            "openvino>=2025.0,<2027",
        ],
        "docs": ["pdoc>=16,<17"],
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.8,<4",
            "nvidia-cuda-cuobjdump>=13,<14",  # reads what any nvcc made
            "sybil>=10,<11",
            "tf-deform[docs]",
            "tf-deform[benchmark]",
            "tf-deform[examples]",
        ],
        "lint": ["ruff>=0.17,<0.18", "clang-format>=23,<24"],
    },
    zip_safe=False,
)
