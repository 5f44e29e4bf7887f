# SPDX-License-Identifier: Apache-2.0
"""Builds the core and the TensorFlow ops, and packs them with the Python code.

The ops are built against the TensorFlow that this interpreter imports (in an
isolated build: the one that pyproject.toml names), and the package then
requires that minor version: TensorFlow's C++ interface changes with it.
"""

import concurrent.futures
import glob
import os
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

VERSION = "0.1.0"
ROOT = os.path.dirname(os.path.abspath(__file__))
# The same globs as in BUILD: a new op edits no build file.
CORE_SOURCES = "cc/core/*.cc"
OPS_SOURCES = "cc/tf/*.cc"
HEADERS = "cc/*/*.h"
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-g0", "-Wall", "-Wno-psabi"]

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
# The headers themselves use what they declare deprecated.
TENSORFLOW_FLAGS = [
    *tf.sysconfig.get_compile_flags(),
    "-Wno-deprecated-declarations",
]


class BuildExtension(build_ext):
    """Compiles every source once; _core.so is part of _ops.so."""

    def get_ext_filename(self, fullname: str) -> str:
        # Plain names: the libraries do not depend on Python's version.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extensions(self) -> None:
        core = self._compile(CORE_SOURCES, ["-std=c++17"])
        ops = self._compile(OPS_SOURCES, TENSORFLOW_FLAGS)
        tensorflow = tf.sysconfig.get_link_flags()
        self._link("tf_deform._core", core, ["-lpthread"])
        self._link("tf_deform._ops", core + ops, tensorflow)

    def _compile(self, pattern: str, flags: list[str]) -> list[str]:
        sources = sorted(glob.glob(pattern, root_dir=ROOT))

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=["."],
                extra_postargs=FLAGS + flags,
                depends=glob.glob(HEADERS, root_dir=ROOT),
            )

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return [
                path
                for paths in pool.map(compile_one, sources)
                for path in paths
            ]

    def _link(self, name: str, objects: list[str], flags: list[str]) -> None:
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(name),
            extra_postargs=flags,
            target_lang="c++",
        )


class BuildPython(build_py):
    """Adds the module that tells the loader what the ops were built for."""

    def run(self) -> None:
        super().run()
        folder = "tf_deform"
        if not self.editable_mode:
            folder = os.path.join(self.build_lib, folder)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "_build_info.py"), "w") as file:
            file.write(
                '"""Written by setup.py."""\n\n'
                f'VERSION = "{VERSION}"\n'
                f'TENSORFLOW_VERSION = "{tf.__version__}"\n'
            )


class BuildWheel(bdist_wheel):
    """One wheel serves every Python 3 that TensorFlow serves."""

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
        "examples": [
            "scikit-learn>=1.5,<2",
            "scikit-image>=0.25,<0.27",
            "matplotlib>=3.9,<4",
            "pillow>=11,<13",
            "scipy>=1.13,<2",
            "faster-coco-eval>=1.7,<2",
            "h5py>=3.11,<4",
        ],
        "benchmark": [
            "onnx>=1.19,<2",
            "onnxruntime>=1.27,<2",
            "openvino>=2025.0,<2027",
        ],
        "test": [
            "pytest>=8,<10",
            "tf-deform[benchmark]",
            "tf-deform[examples]",
        ],
        "lint": ["ruff>=0.17,<0.18", "clang-format>=23,<24"],
    },
    zip_safe=False,
)
