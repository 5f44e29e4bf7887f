# SPDX-License-Identifier: Apache-2.0
"""Tells where the op library is, for programs that load it themselves.

python -m tf_deform
"""

import argparse
import os
import sys

from tf_deform._loader import LIBRARY


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m tf_deform",
        description="Prints the path of tf_deform's op library. With it, a "
        "program that does not import tf_deform runs SavedModels that were "
        "exported with native ops: tf.load_op_library(path) in Python, "
        "TF_LoadLibrary(path, status) of TensorFlow's C API, before the model "
        "is loaded.",
    ).parse_args()
    if not os.path.exists(LIBRARY):
        sys.exit(
            f"Expected the op library of tf_deform at {LIBRARY}. Received: no "
            "such file. Run `pip install .` in the project's folder."
        )
    print(LIBRARY)


if __name__ == "__main__":
    main()
