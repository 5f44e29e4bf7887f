# SPDX-License-Identifier: Apache-2.0
"""Writes models as SavedModels, with native ops or stock TensorFlow's alone."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from tf_deform import _image_files, _implementation, _keras
from tf_deform.export import _common, _source


def saved_model(
    model: Any,
    path: str | os.PathLike,
    implementation: str = "native",
    *,
    input_signature: Sequence[tf.TensorSpec] | None = None,
    image_bytes: bool | Callable[[tf.Tensor], tf.Tensor] | None = None,
    sample: Any = None,
    tolerance: float | None = None,
    verbose: bool = True,
) -> _common.Report:
    """Writes a model as a SavedModel, and compares it with the model.

    Its endpoints are "serve", which returns the model's outputs; the signature
    "serving_default", which takes and returns tensors by name; and, for a model
    of one image, "serve_image_bytes", which takes a `(batch,)` string tensor of
    JPEG, PNG, GIF or BMP files and turns photographs upright as their EXIF
    orientation says.

    A program that loads a native SavedModel needs the ops: `import tf_deform`;
    or, where the package is not installed, `tf.load_op_library` (in C,
    `TF_LoadLibrary`) with the path that `tf-deform library` prints; a copy of
    this file needs a copy of the core beside it, `tf-deform library --core`.
    Without the ops TensorFlow's error names the op
    `TfDeform>ImportTfDeformOrLoadItsOpLibrary`. A portable SavedModel needs
    nothing but TensorFlow; it is slower and takes more memory. OpenVINO also
    reads a portable SavedModel, and rounds positions unless its option
    `INFERENCE_PRECISION_HINT` is "f32".

    Args:
        model: A Keras model, or a `tf.function` of tensors.
        path: Folder to write. An existing SavedModel is replaced at the end; no
            other folder or file is.
        implementation: "native" or "portable", for all layers and functions in
            the model, whatever their own arguments say.
        input_signature: Shape, type and name of the model's inputs. None: the
            model's own inputs; a subclassed model does not declare them.
        image_bytes: How an image becomes the model's input: a function from
            `(height, width, channels)` uint8 to one element of its batch. True
            (or None, for a model with one input `(batch, height, width, 1 or
            3)`): the image is resized to the model's size if it has one
            (bilinear, antialiased), else all images of a batch must have one
            size; its numbers range from 0 to 255. False: no such endpoint.
        sample: Values for the inputs, an array, list or dictionary, or an
            iterator of several such, with which the SavedModel is compared with
            the model. None: random values, from 0 to 1 or, for uint8, to 255;
            of two sizes where sizes are unknown.
        tolerance: Largest difference allowed, relative to the largest number
            of an output. None: 1e-3, or .03 for a model in 16 bits. Detections
            are compared with their counterparts, whatever their order.
        verbose: Whether to print each step, and the report.

    Returns:
        The report: path, size in bytes, differences by output.

    Raises:
        TypeError, ValueError: The model cannot be exported, or an argument does
            not fit.
        OSError: `path` cannot be written.
        RuntimeError: The exported model differs from the model.
    """
    _implementation.check_implementation(implementation)

    def write_all(
        source: _source.Source, folder: pathlib.Path, stage: _common.Stage
    ) -> None:
        with (
            stage("Tracing and writing"),
            _implementation.implementation(implementation),
            _implementation.explaining(),
        ):
            fit = _find_fit(source, image_bytes)
            write(source, folder, fit, inline=implementation == "portable")
        if implementation == "portable":
            check_portable(folder)

    def load(
        source: _source.Source, folder: pathlib.Path
    ) -> Callable[[_common.Arrays], Any]:
        loaded = tf.saved_model.load(folder)
        serve = loaded.signatures["serving_default"]
        fit = _find_fit(source, image_bytes)

        def run(given: _common.Arrays) -> dict[str, tf.Tensor]:
            if fit is not None:
                (images,) = given.values()
                _check_image_bytes(loaded, fit, images.shape, source)
            return serve(**tf.nest.map_structure(tf.constant, given))

        return run

    return _common.export(
        model,
        path,
        write_all,
        load,
        folder=True,
        in_tensorflow=True,
        input_signature=input_signature,
        sample=sample,
        tolerance=tolerance,
        verbose=verbose,
    )


def _find_fit(
    source: _source.Source, image_bytes: bool | Callable | None
) -> Callable[[tf.Tensor], tf.Tensor] | None:
    """Returns a function from an image's pixels to an element of the batch."""
    if image_bytes is False:
        return None
    if not (image_bytes in (None, True) or callable(image_bytes)):
        raise TypeError(
            "Expected `image_bytes` to be a function, True, False or None. "
            f"Received: {image_bytes!r}"
        )
    spec = source.inputs[0]
    one_image = (
        len(source.inputs) == 1
        and spec.shape.rank == 4
        and spec.shape[3] in (1, 3, 4)
        and spec.dtype != tf.string
    )
    if image_bytes is None and (not one_image or spec.shape[3] == 4):
        return None
    if not one_image:
        raise ValueError(
            "Expected a model of one image, (batch, height, width, 1, 3 or 4), "
            f"for `image_bytes`. Received: {source.inputs}"
        )
    size = spec.shape[1:3]

    def fit(pixels: tf.Tensor) -> tf.Tensor:
        if size.is_fully_defined():
            pixels = tf.image.resize(pixels, size, antialias=True)
            pixels = tf.clip_by_value(tf.round(pixels), 0, 255)
        return tf.ensure_shape(tf.cast(pixels, spec.dtype), spec.shape[1:])

    return image_bytes if callable(image_bytes) else fit


def write(
    source: _source.Source,
    folder: pathlib.Path,
    fit: Callable[[tf.Tensor], tf.Tensor] | None = None,
    *,
    inline: bool,
) -> None:
    """Traces the endpoints, and writes the folder; see `Source.trace`."""
    serve = source.trace(source.run, inline)
    # A signature takes no nested outputs, so this endpoint has flat ones.
    flat = source.trace(
        lambda *inputs: _source.name_outputs(serve(*inputs)), inline=False
    )
    # Uses the class that Keras' own export uses: tf.Module has properties of
    # the same names.
    holder = tf.__internal__.tracking.AutoTrackable()
    holder.serve = serve
    endpoint = serve.get_concrete_function()
    # The graph keeps its variables in an unordered set, but their handles in
    # order.
    captures = endpoint.graph.captures
    order = {id(handle): index for index, (handle, _) in enumerate(captures)}
    used = sorted(
        endpoint.variables,
        key=lambda variable: order.get(id(variable.handle), len(order)),
    )
    for name, variables in _list_variables(source, used).items():
        setattr(holder, name, variables)
    signatures = {"serving_default": flat.get_concrete_function()}
    if fit is not None:
        holder.serve_image_bytes = _from_bytes(source, serve, fit)
    try:
        tf.saved_model.save(holder, str(folder), signatures)
    except AssertionError as error:
        raise ValueError(
            "Expected a model of which all resources are variables. Received: "
            f"one with others, such as tables ({str(error).splitlines()[0]})"
        ) from error


def _list_variables(
    source: _source.Source, used: Sequence[tf.Variable]
) -> dict[str, list[tf.Variable]]:
    """Lists a loaded model's variables by the names that Keras' export uses.

    Each list holds a variable once: first the model's own variables in their
    order, then the other variables that the endpoint uses, in functions that
    Keras does not know.
    """
    lists = {
        "weights": [],
        "variables": [],
        "trainable_variables": [],
        "non_trainable_variables": [],
    }
    if source.model is not None:
        lists = {
            name: [
                _keras.tf_variable(weight)
                for weight in getattr(source.model, name)
            ]
            for name in lists
        }
    known = {id(variable) for variable in lists["variables"]}
    for variable in used:
        if id(variable) in known:
            continue
        known.add(id(variable))
        kind = "trainable" if variable.trainable else "non_trainable"
        for name in ("weights", "variables", f"{kind}_variables"):
            lists[name].append(variable)
    return lists


def _from_bytes(
    source: _source.Source, serve: Callable, fit: Callable
) -> Callable[[tf.Tensor], Any]:
    spec = source.inputs[0]

    def decode(data: tf.Tensor) -> tf.Tensor:
        return fit(_image_files.decode(data, spec.shape[3]))

    def serve_image_bytes(image_bytes: tf.Tensor) -> Any:
        element = tf.TensorSpec(spec.shape[1:], spec.dtype)
        return serve(
            tf.map_fn(decode, image_bytes, fn_output_signature=element)
        )

    return tf.function(
        serve_image_bytes,
        [tf.TensorSpec((None,), "string", "image_bytes")],
        autograph=False,
    )


def check_portable(folder: pathlib.Path) -> None:
    """Raises a ValueError if a SavedModel holds ops of this package."""
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    for nodes in (graph.node, *(f.node_def for f in graph.library.function)):
        for node in nodes:
            if node.op.startswith(_source.NAMESPACE):
                raise _source.explain_stale(node.op, node.name)


def _check_image_bytes(
    loaded: Any,
    fit: Callable[[tf.Tensor], tf.Tensor],
    shape: Sequence[int],
    source: _source.Source,
) -> None:
    """Compares the endpoint for files with the endpoint for tensors."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, "uint8")
    files = tf.stack([tf.io.encode_png(image) for image in pixels])
    received = _source.name_outputs(loaded.serve_image_bytes(files))
    images = tf.stack([fit(tf.constant(image)) for image in pixels])
    expected = _source.name_outputs(loaded.serve(images))
    for name, value in expected.items():
        value = np.asarray(value)
        difference = _common.measure_difference(value, received[name])
        if not difference <= source.tolerance():
            raise RuntimeError(
                "Expected `serve_image_bytes` to give what `serve` gives. "
                "Received: "
                f"{_common.describe_difference(value, received[name])} in "
                f"{name!r}"
            )
