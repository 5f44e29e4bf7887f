# SPDX-License-Identifier: Apache-2.0
"""Turns a model into a function to export, and names its tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tf_deform import _keras
from tf_deform._keras import keras

# The names of this package's ops begin with this prefix.
NAMESPACE = "TfDeform>"


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds the function of tensors to export, and the tensors' names.

    Attributes:
        run: The function, called with one tensor for each of `inputs`.
        inputs: Shape, type and name of its arguments.
        model: The Keras model, or None if a `tf.function` is exported.
    """

    run: Callable[..., Any]
    inputs: list[tf.TensorSpec]
    model: keras.Model | None

    def flat(self, *arguments: Any) -> dict[str, tf.Tensor]:
        """Returns the outputs by name, see `name_outputs`."""
        return name_outputs(self.run(*arguments))

    def trace(self, function: Callable[..., Any], inline: bool) -> Any:
        """Traces a `tf.function` once, with `inputs` as arguments.

        Args:
            function: The function to trace.
            inline: Whether functions inside become part of it, as other
                runtimes need it. The functions inside are then traced anew,
                whatever graphs they hold, and not compiled by XLA (Keras
                compiles convolutions with groups).
        """
        # Uses Autograph for the user's own tf.function; Keras' layers need
        # none.
        traced = tf.function(function, self.inputs, self.model is None)
        if inline:
            before = tf.config.functions_run_eagerly()
            tf.config.run_functions_eagerly(True)
            try:
                traced.get_concrete_function()
                return traced
            except tf.errors.OperatorNotAllowedInGraphError:
                pass  # A function inside needs Autograph: it has to stay.
            finally:
                tf.config.run_functions_eagerly(before)
        try:
            traced.get_concrete_function()
        except tf.errors.OperatorNotAllowedInGraphError:
            _explain_python(traced)
            raise
        return traced

    def layers(self) -> list[keras.layers.Layer]:
        # Includes layers inside of layers, which `keras.Model.layers` leaves
        # out.
        return self.model._flatten_layers() if self.model is not None else []

    def tolerance(self) -> float:
        """Returns the largest difference to expect, over the largest number."""
        sixteen = ("float16", "bfloat16")
        if any(layer.compute_dtype in sixteen for layer in self.layers()):
            return 3e-2  # A few roundings of bfloat16 add up, 2^-8 each.
        return 1e-3  # Float32 sums in another order, through many layers.

    def least_score(self) -> float | None:
        """Returns a detector's `min_score`; a function may have it, too."""
        owner = self.run if self.model is None else self.model
        return getattr(owner, "min_score", None)

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Makes layers of any real type compute in float32 inside of it.

        Their variables stay as they are and are cast when they are read.
        """
        kept = []
        try:
            for layer in self.layers():
                policy = _keras.policy_of(layer)
                if policy is not None and policy.compute_dtype in _OTHER_REALS:
                    kept.append((layer, layer._dtype_policy))
                    _keras.set_policy(layer, _keras.in_float32(policy))
            yield
        finally:
            for layer, policy in kept:
                _keras.set_policy(layer, policy)


# LiteRT and most runtimes of ONNX do not compute in these types.
_OTHER_REALS = ("float16", "bfloat16", "float64")


def _find_layer(error: BaseException | None) -> keras.layers.Layer | None:
    """Returns the innermost layer that was called when an error was raised."""
    layer = None
    while error is not None and layer is None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            found = frame.f_locals.get("self")
            if isinstance(found, keras.layers.Layer):
                layer = found
        error = error.__cause__ or error.__context__  # Autograph wraps errors.
    return layer


def _explain_python(traced: Any) -> None:
    """Raises a ValueError if a layer prevents a function from being traced.

    Such a layer needs values while a graph is made. A second trace finds the
    layer, with Keras' filter of frames off: the filter removes the frames of
    layers.
    """
    try:
        with _keras.whole_tracebacks():
            traced.get_concrete_function()
        return
    except tf.errors.OperatorNotAllowedInGraphError as error:
        layer = _find_layer(error)
    if layer is None:
        return
    way = (
        "If sizes are what it lacks, give them in `input_signature` or in "
        "keras.Input; else write its `if` with tf.cond, its `for` with "
        "tf.while_loop"
    )
    if isinstance(layer, keras.layers.UpSampling2D):
        way = (
            "Keras' UpSampling2D needs the sizes of its inputs unless its "
            'interpolation is "nearest": give them in `input_signature` or in '
            "keras.Input, or replace the layer with a subclass whose `call` "
            "returns tf.image.resize(inputs, tf.shape(inputs)[1:3] * "
            "self.size, self.interpolation)"
        )
    raise ValueError(
        "Expected layers that need no values while a graph is made. Received: "
        f"layer {layer.name!r} ({type(layer).__name__}), which takes a tensor "
        f"for a Python bool or list. {way}"
    )


def explain_stale(op: str, node: str) -> ValueError:
    """Returns the error for a native op that tracing anew did not reach."""
    return ValueError(
        "Expected a model of which all functions can be traced anew. Received: "
        f"one with {op} in {node!r}, inside a tf.function that was traced "
        "before with native ops. Export before it is called, or load the model "
        "anew"
    )


def name_outputs(outputs: Any) -> dict[str, Any]:
    """Returns outputs by name: keys joined by "_", or "output_0" for one.

    Raises:
        ValueError: There are no outputs, or outputs have no name or the same
            name.
    """
    structure = outputs
    if not isinstance(outputs, Mapping):
        several = isinstance(outputs, (list, tuple))
        outputs = {"output": outputs if several else [outputs]}
    named = {}
    for name, value in _flatten(outputs):
        if value is None or name in named:
            raise ValueError(
                "Expected outputs that are tensors with a name each. Received: "
                f"{name!r} {'twice' if name in named else 'is None'} in "
                f"{structure!r}"
            )
        # Makes a tensor of its own, also if the output is one of the inputs.
        named[name] = tf.identity(value)
    if not named:
        raise ValueError(
            f"Expected at least one output. Received: {structure!r}"
        )
    return named


def _flatten(structure: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of a structure with their paths, joined by "_"."""
    if isinstance(structure, Mapping):
        items = sorted(structure.items())
    elif isinstance(structure, (list, tuple)):
        items = enumerate(structure)
    else:
        yield name, structure
        return
    for key, value in items:
        yield from _flatten(value, f"{name}_{key}" if name else str(key))


def find_source(
    model: Any, input_signature: Sequence[tf.TensorSpec] | None
) -> Source:
    """Returns the function of a model.

    Raises:
        TypeError: `model` is neither a Keras model nor a `tf.function`.
        ValueError: The shapes of its arguments are not known.
    """
    if isinstance(model, tf.types.experimental.PolymorphicFunction):
        function = model.python_function
        signature = input_signature or model.input_signature
        if signature is None:
            raise ValueError(
                "Expected `input_signature`, or a tf.function with one. "
                f"Received: {model!r} without"
            )
        parameters = inspect.signature(function)
        inputs = _name_inputs(signature, list(parameters.parameters))
        try:
            parameters.bind(*inputs)
        except TypeError as error:
            raise ValueError(
                "Expected `input_signature` to hold one tf.TensorSpec for each "
                f"argument of the function, {parameters}. Received: {inputs}"
            ) from error
        own = model.input_signature or ()
        if own and all(isinstance(spec, tf.TensorSpec) for spec in own):
            _check_signature(inputs, own, 0)
        return Source(function, inputs, None)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "Expected `model` to be a keras.Model or a tf.function. Received: "
            f"{model!r}"
        )
    known = getattr(model, "inputs", None)
    sequential = isinstance(model, keras.Sequential)
    if known is None and input_signature is None:
        raise ValueError(
            "Expected `input_signature` for a model that is not made of layers "
            f"between keras.Inputs. Received: {type(model).__name__} without"
        )
    names = [tensor.name for tensor in known or []]
    if input_signature is None:
        input_signature = [
            tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in known
        ]
        if sequential:
            # The known batch is the batch of the first call, so it is left out.
            spec = input_signature[0]
            shape = [None, *spec.shape[1:]]
            input_signature = [tf.TensorSpec(shape, spec.dtype)]

    inputs = _name_inputs(input_signature, names)
    if known is not None:
        # Keras' models take any batch, so only the other dimensions are
        # checked.
        _check_signature(inputs, known, 1)

    def run(*arguments: tf.Tensor) -> Any:
        if known is not None and not sequential:
            arguments = [_keras.tree.pack_sequence_as(model.input, arguments)]
        return model(*arguments, training=False)

    return Source(run, inputs, model)


def _check_signature(
    signature: Sequence[tf.TensorSpec], known: Sequence[Any], first: int
) -> None:
    """Checks a signature against the inputs that the model itself declares.

    Args:
        signature: The user's signature.
        known: The model's own inputs, with shapes and types.
        first: The first dimension that has to fit.

    Raises:
        ValueError: The signature describes inputs that the model does not take.
    """
    fits = len(signature) == len(known)
    for spec, other in zip(signature, known):
        shape, own = spec.shape, tf.TensorShape(other.shape)
        fits &= (spec.dtype == tf.string) == (
            other.dtype in (tf.string, "string")
        )
        if own.rank is None:
            continue
        # Keras adds or removes a last dimension of 1.
        if shape.rank is not None and shape.rank - own.rank in (-1, 1):
            longer = max(shape, own, key=len)
            if longer[-1] == 1:
                shape, own = (x[: len(longer) - 1] for x in (shape, own))
        fits &= shape.rank == own.rank and all(
            size in (None, given)
            for given, size in zip(shape[first:], own[first:])
        )
    if not fits:
        wanted, received = (
            ", ".join(
                f"{tf.TensorShape(x.shape)} {tf.as_dtype(x.dtype).name}"
                for x in specs
            )
            for specs in (known, signature)
        )
        raise ValueError(
            "Expected `input_signature` to describe inputs that the model "
            f"takes: {wanted}. Received: {received}"
        )


def _name_inputs(
    signature: Sequence[Any], names: Sequence[str]
) -> list[tf.TensorSpec]:
    """Returns the signature with distinct names that can be argument names."""
    if not isinstance(signature, (list, tuple)) or not signature:
        raise TypeError(
            "Expected `input_signature` to be a list of tf.TensorSpec. "
            f"Received: {signature!r}"
        )
    specs, taken = [], {"self"}
    for index, spec in enumerate(signature):
        if not isinstance(spec, tf.TensorSpec):
            raise TypeError(
                "Expected `input_signature` to be a flat list of "
                f"tf.TensorSpec. Received: {spec!r}"
            )
        known = names[index] if index < len(names) else f"input_{index}"
        name = re.sub(r"[^A-Za-z0-9_]", "_", spec.name or known)
        while name in taken:
            name += f"_{index}"
        taken.add(name)
        specs.append(tf.TensorSpec(spec.shape, spec.dtype, name))
    return specs
