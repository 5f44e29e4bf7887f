# SPDX-License-Identifier: Apache-2.0
"""Runs an exported model in a process that reads nothing else of it.

    python examples/serve.py model.onnx images.npy outputs.npz

The model is a SavedModel (a folder), an ONNX file or a LiteRT file. Only a
SavedModel with native ops needs tf_deform: name it with --native.
"""

import argparse
import pathlib

import numpy as np


def run_saved_model(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    import tensorflow as tf

    serve = tf.saved_model.load(path).signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    outputs = serve(**{name: tf.constant(images)})
    return {name: value.numpy() for name, value in outputs.items()}


def run_onnx(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    (image,) = session.get_inputs()
    values = session.run(names, {image.name: images})
    return dict(zip(names, values, strict=True))


def run_litert(path: str, images: np.ndarray) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(path).get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    return runner(**{name: images})


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run an exported model on an array of images."
    )
    parser.add_argument("model", help="SavedModel, .onnx file or .tflite file")
    parser.add_argument("images", help=".npy file, the model's one input")
    parser.add_argument("outputs", help=".npz file to write, by name")
    parser.add_argument(
        "--native",
        action="store_true",
        help="import tf_deform first: the SavedModel has native ops",
    )
    args = parser.parse_args()
    if args.native:
        import tf_deform  # noqa: F401  It registers the ops.
    run = {".onnx": run_onnx, ".tflite": run_litert}.get(
        pathlib.Path(args.model).suffix, run_saved_model
    )
    np.savez(args.outputs, **run(args.model, np.load(args.images)))


if __name__ == "__main__":
    main()
