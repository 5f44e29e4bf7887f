# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model in a process that knows nothing else of it.

python examples/serve.py runs/segmentation/saved_model images.npy logits.npy
"""

import argparse

import numpy as np
import tensorflow as tf

import tf_deform  # noqa: F401  Registers the ops that the model calls.


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run a SavedModel on an array of images."
    )
    parser.add_argument("saved_model", help="folder of the exported model")
    parser.add_argument("images", help=".npy file, (batch, 64, 64, 1) uint8")
    parser.add_argument("logits", help=".npy file to write")
    args = parser.parse_args()
    model = tf.saved_model.load(args.saved_model)
    np.save(args.logits, model.serve(np.load(args.images)).numpy())


if __name__ == "__main__":
    main()
