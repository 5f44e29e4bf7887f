# SPDX-License-Identifier: Apache-2.0
"""Builds the core and the TensorFlow ops, and packs them with the Python code.

From source, the ops are built against the TensorFlow that this interpreter
imports; in an isolated build, this is the TensorFlow that pyproject.toml names.
The package then requires that minor version, as TensorFlow's C++ interface
changes with it.

`make wheel` (cc/wheel.py) builds libraries for every supported TensorFlow, and
names their folder in the environment variable TF_DEFORM_LIBRARIES: then this
file compiles nothing.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import shutil
import sys
from types import ModuleType

from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

VERSION = "0.1.0"
ROOT = os.path.dirname(os.path.abspath(__file__))
# The TensorFlow versions of a release, and of this version's Python code.
TENSORFLOW = ">=2.15,<2.22"
# The folder of a release's libraries.
LIBRARIES = os.environ.get("TF_DEFORM_LIBRARIES")
# What follows the version of a release's wheel, such as "+cpu".
LOCAL = os.environ.get("TF_DEFORM_LOCAL_VERSION", "") if LIBRARIES else ""

sys.path.insert(0, ROOT)
from cc import build  # noqa: E402


@functools.cache
def tensorflow() -> ModuleType:
    """Imports TensorFlow, to build against it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow
    except ImportError as error:
        sys.exit(
            "Expected TensorFlow to be installed to build against it. "
            f"Received: {error}. Run `pip install .` without "
            "--no-build-isolation, or `pip install 'tensorflow==2.21.*'` first."
        )
    return tensorflow


@functools.cache
def find_cuda() -> build.Cuda | None:
    """Finds the CUDA compiler, if there is one; prints what will be built."""
    cuda = build.find_cuda()
    print(build.describe(cuda), flush=True)
    print(
        f"tf_deform: building for TensorFlow "
        f"{build.minor(tensorflow().__version__)}, which is "
        f"{tensorflow().__version__} here. For another, install it first and "
        "add --no-build-isolation.",
        flush=True,
    )
    return cuda


def write_build_info(folder: str) -> None:
    """Writes the module that tells the loader what was built."""
    version = tensorflow().__version__
    xla = build.has_xla(tensorflow().sysconfig.get_include())
    with open(os.path.join(folder, "_build_info.py"), "w") as file:
        file.write(build.build_info(VERSION, find_cuda(), {version: xla}))


def remove_libraries(folder: str) -> None:
    for path in glob.glob(os.path.join(folder, "*.so")):
        os.remove(path)


class BuildExtension(build_ext):
    """Compiles the core, and the ops that are linked to it."""

    def get_ext_filename(self, fullname: str) -> str:
        # The names are plain: the libraries do not depend on Python's version.
        *packages, name = fullname.split(".")
        if name == "core":
            return os.path.join(*packages, build.core_name(VERSION))
        return os.path.join(*packages, build.ops_name(tensorflow().__version__))

    def build_extensions(self) -> None:
        tf = tensorflow()
        cuda = find_cuda()
        folder = os.path.abspath(self.build_temp)
        include = tf.sysconfig.get_include()
        glue = build.glue_steps(include, tf.__version__, folder, cuda)
        core = build.core_steps(folder, cuda)
        # The glue comes first, as it takes long to compile: at the end, all
        # other processors would wait for it.
        objects = build.compile_all([*glue, *core])
        core_path = self.get_ext_fullpath("tf_deform.core")
        build.link_core(core_path, objects[len(glue) :], cuda)
        # `import tensorflow` loads both libraries before the ops.
        flags = tf.sysconfig.get_link_flags() + ["-l:libtensorflow_cc.so.2"]
        build.link_ops(
            self.get_ext_fullpath("tf_deform.ops"),
            objects[: len(glue)],
            core_path,
            flags,
        )

    def copy_extensions_to_source(self) -> None:
        remove_libraries("tf_deform")
        super().copy_extensions_to_source()
        write_build_info("tf_deform")


class BuildPython(build_py):
    """Adds what the extension command does not know."""

    def run(self) -> None:
        # The extension command comes afterwards. The names of libraries tell
        # versions, so a library of an earlier build would stay and be packed.
        remove_libraries(os.path.join(self.build_lib, "tf_deform"))
        super().run()
        folder = "tf_deform"
        if not self.editable_mode:
            folder = os.path.join(self.build_lib, folder)
        os.makedirs(folder, exist_ok=True)
        if LIBRARIES:
            for name in sorted(os.listdir(LIBRARIES)):
                shutil.copy(os.path.join(LIBRARIES, name), folder)
        else:
            write_build_info(folder)


class Binary(Distribution):
    """Says that a release's wheel has libraries, unless it has none."""

    def has_ext_modules(self) -> bool:
        if LIBRARIES:
            return any(name.endswith(".so") for name in os.listdir(LIBRARIES))
        return super().has_ext_modules()


class BuildWheel(bdist_wheel):
    """Tags one wheel for every Python 3 that TensorFlow serves."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if LIBRARIES:
    LIBRARIES = os.path.abspath(LIBRARIES)
    REQUIRED = TENSORFLOW
else:
    REQUIRED = f"=={build.minor(tensorflow().__version__)}.*"
os.chdir(ROOT)
with open("README.md", encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()
# A package index shows the text alone, without the project's files: takes out
# its pictures, and keeps the texts of links to it.
LONG_DESCRIPTION = re.sub(
    r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", LONG_DESCRIPTION
)
LONG_DESCRIPTION = re.sub(
    r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", LONG_DESCRIPTION
)

setup(
    name="tf-deform",
    version=VERSION + LOCAL,
    description="Deformable convolution and deformable ROI pooling for "
    "TensorFlow and Keras: native ops, gradients, layers.",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.9",
    packages=find_packages(include=["tf_deform", "tf_deform.*"]),
    # The module lies beside the package, as importing the package loads
    # TensorFlow.
    py_modules=["tf_deform_cli"],
    entry_points={"console_scripts": ["tf-deform = tf_deform_cli:main"]},
    package_data={
        "tf_deform": ["py.typed"],
        "tf_deform.visualization": ["explorer.html"],
    },
    ext_modules=[]
    if LIBRARIES
    else [Extension("tf_deform.core", []), Extension("tf_deform.ops", [])],
    distclass=Binary,
    cmdclass={
        "build_ext": BuildExtension,
        "build_py": BuildPython,
        "bdist_wheel": BuildWheel,
    },
    # TensorFlow brings its Keras; tf_deform._keras says which fit.
    install_requires=[f"tensorflow{REQUIRED}"],
    extras_require={
        # It needs Python 3.11, as onnxruntime before 1.25 has no DeformConv.
        # TensorFlow 2.15 to 2.17 hold onnx back at 1.18, as newer ones need a
        # newer ml_dtypes; 1.19.0 does not say so.
        "onnx": [
            "tf2onnx>=1.17,<2",
            "onnx>=1.18,!=1.19.0,<2",
            "onnxruntime>=1.25,<2",
        ],
        "litert": [  # needs Python 3.10
            "ai-edge-litert>=2.3,<3",
            "ai-edge-quantizer>=0.10,<0.11",  # each is for one ai-edge-litert
        ],
        "hub": ["keras-hub>=0.32,<0.34", "scipy>=1.13,<2"],
        "plots": ["matplotlib>=3.9,<4"],
        # Reads photographs and judges detections.
        "train": [
            "pillow>=11,<13",
            "pyyaml>=6,<7",
            "faster-coco-eval>=1.7,<2",
        ],
        # It is for TensorFlow 2.15 alone, which is for Python 3.9 to 3.11.
        "addons": ["tensorflow==2.15.*", "tensorflow-addons==0.23.*"],
        "examples": [
            "scikit-learn>=1.5,<2",
            "scikit-image>=0.25,<0.27",
            "scipy>=1.13,<2",
            "tf-deform[train]",
            "tf-deform[plots]",
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
            "selenium>=4.20,<5",  # the browser is Debian's, see .ci/run
            "tf-deform[docs]",
            "tf-deform[benchmark]",
            "tf-deform[examples]",
            "tf-deform[hub]",
            "pycocotools>=2.0.11,<3",  # the oracle of the evaluation
        ],
        # zig links for an old glibc, see cc/wheel.py.
        "release": ["ziglang>=0.13,<0.18", "auditwheel>=6.4,<7"],
        "lint": ["ruff>=0.17,<0.18", "clang-format>=23,<24"],
    },
    zip_safe=False,
)
