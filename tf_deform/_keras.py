# SPDX-License-Identifier: Apache-2.0
"""Finds the Keras that `tf.keras` is, and holds what only one Keras has.

The layers are made of one Keras: of Keras 2 with TensorFlow 2.15, or where
TF_USE_LEGACY_KERAS=1 makes `tf.keras` the package tf_keras; else of Keras 3.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

import tensorflow as tf

_LEGACY = "TF_USE_LEGACY_KERAS"
_SET_BACKEND = (
    "Set the environment variable KERAS_BACKEND=tensorflow before Keras is "
    "imported"
)
# Keras 3 before 3.5 casts a given offset to 16 bits.
_OLDEST = {2: (2, 15), 3: (3, 5)}


def _find() -> ModuleType:
    """Imports the Keras of `tf.keras`, which TensorFlow imports when asked.

    Raises:
        ImportError: There is none, it is too old, or does not run on
            TensorFlow.
    """
    try:
        name = tf.keras.layers.Layer.__module__.split(".")[0]
    except (AttributeError, ImportError) as error:
        way = "Run `pip install keras`"
        if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
            way = _SET_BACKEND
        if os.environ.get(_LEGACY) in ("1", "true", "True"):
            minor = ".".join(tf.__version__.split(".")[:2])
            way = (
                f"Run `pip install 'tf-keras=={minor}.*'`, or unset the "
                f"environment variable {_LEGACY}"
            )
        text = str(error).rstrip(".")
        raise ImportError(
            "Expected a Keras for TensorFlow, from which tf_deform makes its "
            f"layers. Received: {text}. {way}"
        ) from error
    found = importlib.import_module(name)
    version = tuple(map(int, found.__version__.split(".")[:2]))
    if version < _OLDEST.get(version[0], _OLDEST[3]):
        raise ImportError(
            "Expected Keras 2.15, or 3.5 or newer. Received: "
            f"{_describe(found)}. Run `pip install --upgrade keras`"
        )
    if found.backend.backend() != "tensorflow":
        raise ImportError(
            "Expected Keras to run on TensorFlow. Received: the backend "
            f"{found.backend.backend()!r}. {_SET_BACKEND}"
        )
    return found


def _describe(package: ModuleType) -> str:
    return f"{package.__name__} {package.__version__}"


keras = _find()
KERAS_2 = keras.__version__.startswith("2.")
KerasTensor = keras.__internal__.KerasTensor if KERAS_2 else keras.KerasTensor
# The package whose layers and tensors our layers cannot be used with.
_OTHER = {"keras": "tf_keras", "tf_keras": "keras"}[keras.__name__]


# Calls.


def check_caller(layer: str, values: Sequence[Any]) -> None:
    """Checks that a layer is not used in a model of another Keras.

    Such a model would leave the layer out of its weights, or fail later with an
    error that says nothing of Keras.

    Args:
        layer: The layer's name.
        values: The arguments of its call.

    Raises:
        TypeError: The layer is called with the other Keras' symbolic tensor, or
            by one of its layers.
    """
    other = sys.modules.get(_OTHER)
    if other is None:
        return
    found = None
    if _is_calling(other):
        found = "a call by a layer or model"
    for value in values:
        kind = type(value)
        if kind.__module__.startswith(f"{_OTHER}.") and (
            "KerasTensor" in kind.__name__
        ):
            found = f"a call with {value!r}"
    if found:
        raise TypeError(
            f"Expected layer {layer!r} to be used with {_describe(keras)}, of "
            "which tf_deform's layers are made because TensorFlow's `tf.keras` "
            f"is. Received: {found} of {_describe(other)}. Make the model with "
            f"`import {keras.__name__}`, or let the environment variable "
            f"{_LEGACY} (1: tf_keras) choose the other Keras before TensorFlow "
            "is imported"
        )


def _is_calling(other: ModuleType) -> bool:
    """Tells whether a layer of the other Keras is being called."""
    if other.__version__.startswith("2."):
        module = sys.modules.get(f"{_OTHER}.src.engine.base_layer_utils")
        return module is not None and module.call_context().in_call
    module = sys.modules.get("keras.src.backend.common.global_state")
    return module is not None and (
        module.get_global_attribute("current_call_ctx") is not None
    )


def is_dense(tensor: Any) -> bool:
    """Tells whether a KerasTensor is neither sparse nor ragged."""
    if KERAS_2:
        other = ("SparseKerasTensor", "RaggedKerasTensor")
        return type(tensor).__name__ not in other
    return not (tensor.sparse or getattr(tensor, "ragged", False))


def as_shape(shape: tuple[int | None, ...]) -> Any:
    """Returns the result of `compute_output_shape` as this Keras wants it."""
    return tf.TensorShape(shape) if KERAS_2 else shape


def is_trainable(layer: Any, weight: Any) -> bool:
    """Tells whether a layer's weight is trained.

    Keras 2 freezes layers, and leaves their variables as they are. Wrappers
    may put a tensor in a weight's place.
    """
    trainable = getattr(weight, "trainable", True)
    return trainable and layer.trainable if KERAS_2 else trainable


# Layers.


def register(layer: type) -> type:
    """Registers a layer, so that files with it are loaded."""
    name = layer.__name__
    if KERAS_2:  # A wrapper's file names the layer inside without a package.
        keras.utils.get_custom_objects()[name] = layer
    return keras.saving.register_keras_serializable("tf_deform", name)(layer)


class _Layer2:
    """Adds to a layer of Keras 2 what Keras 3's layers do by themselves."""

    _given: Mapping[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Keras 2 tells `build` the shape of the first argument alone.
        if not self.built:
            call = inspect.signature(self.call)
            known = {k: v for k, v in kwargs.items() if k in call.parameters}
            _, *others = call.bind(*args, **known).arguments.items()
            given = {
                f"{name}_shape": value.shape
                for name, value in others
                if hasattr(value, "shape")
            }
            # No checkpoint contains an attribute that is set in this way.
            object.__setattr__(self, "_given", given)
        return super().__call__(*args, **kwargs)

    def _autographed_call(self) -> Callable:
        # Autograph would rewrite all functions of this package, none of which
        # needs it: tracing would take five times as long.
        return self.call

    @property
    def _build_input_shape(self) -> Any:
        """Returns what a file tells `build`: a shape, or shapes by name."""
        if self._built_for is None:
            return self._first_shape
        shapes = dict(self._built_for)
        return shapes if len(shapes) > 1 else shapes["inputs_shape"]

    @_build_input_shape.setter
    def _build_input_shape(self, shape: Any) -> None:
        object.__setattr__(self, "_first_shape", shape)

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        with tf.name_scope(self.name):  # as in a call, which names variables
            self.build(config.get("shapes_dict") or config["input_shape"])


class _Layer3:
    """Adds nothing to a layer of Keras 3."""


LayerMixin = _Layer2 if KERAS_2 else _Layer3


def takes_all_shapes(build: Callable[..., None]) -> Callable[..., None]:
    """Hands a layer's `build` the shapes of all arguments on Keras 2."""
    if not KERAS_2:
        return build

    @functools.wraps(build)
    def build_2(self: Any, shape: Any = None, *others: Any, **named: Any):
        if isinstance(shape, Mapping):  # from a file
            build(self, **shape)
        elif shape is None or others or named:
            first = [] if shape is None else [shape]
            build(self, *first, *others, **named)
        else:
            known = inspect.signature(build).parameters
            given = {k: v for k, v in self._given.items() if k in known}
            build(self, shape, **given)
        self.built = True

    return build_2


class _Conv2D2(keras.layers.Conv2D):
    """Stores the weights of `_branch` by name, as the layer does on Keras 3.

    Keras 2 would store them by number, behind kernel and bias; and with a file
    of Keras 2, Keras 3 would set kernel and bias alone.
    """

    lora_rank = None
    lora_enabled = False

    @property
    def _kernel(self) -> Any:
        return self.kernel

    # Keras 2 freezes whole layers; `freeze_kernel` freezes a part of one.

    @property
    def weights(self) -> list[Any]:
        # Keras 2 would put frozen weights last.
        return self._trainable_weights + self._non_trainable_weights

    @property
    def trainable_weights(self) -> list[Any]:
        return self._not_frozen(super().trainable_weights)

    @property
    def non_trainable_weights(self) -> list[Any]:
        trained = {id(weight) for weight in self.trainable_weights}
        return [x for x in self.weights if id(x) not in trained]

    def _not_frozen(self, weights: list[Any]) -> list[Any]:
        frozen = self._frozen_alone() if self.freeze_kernel else []
        return [x for x in weights if not any(x is y for y in frozen)]

    def _numbered(self) -> dict[str, tf.Variable]:
        branch = {id(weight) for weight in self._branch().values()}
        others = [v for v in own_variables(self) if id(v) not in branch]
        return {str(index): v for index, v in enumerate(others)}

    def save_own_variables(self, store: Any) -> None:
        for key, weight in self._numbered().items():
            store[key] = stored(weight)

    def load_own_variables(self, store: Any) -> None:
        self._check_load_own_variables(store)
        weights = self._numbered()
        for key in store.keys():
            weights[key].assign(store[key])

    def _check_load_own_variables(self, store: Any) -> None:
        raise ValueError(
            f"Expected layer {self.name!r} to be built before its weights are "
            f"loaded. Received: weights {sorted(store.keys())}"
        )


class _Conv2D3(keras.layers.Conv2D):
    """Keeps `freeze_kernel` where Keras 3 sets all weights of a layer."""

    @property
    def trainable(self) -> bool:
        return super().trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        super(_Conv2D3, type(self)).trainable.fset(self, value)
        if self.freeze_kernel and self.built:
            self._apply_freeze()


Conv2D = _Conv2D2 if KERAS_2 else _Conv2D3


# Models.

Functional = importlib.import_module(
    f"{keras.__name__}.src.{'engine' if KERAS_2 else 'models'}.functional"
).Functional


def sublayers(layer: Any) -> list[Any]:
    """Returns the layers that a layer or model holds itself."""
    if KERAS_2:
        return list(layer._flatten_layers(recursive=False, include_self=False))
    return list(layer._layers)


def flatten_layers(model: Any) -> list[Any]:
    """Returns all layers within a model, each once, in a fixed order."""
    layers = model._flatten_layers(include_self=False)
    return list({id(layer): layer for layer in layers}.values())


def path_of(layer: Any) -> str:
    """Returns a layer's path; on Keras 2 its name stands for it."""
    return getattr(layer, "path", None) or layer.name


def nodes_of(model: Any) -> list[tuple[list[Any], list[Any]]]:
    """Returns inputs and outputs of each call in a functional model of Keras 3.

    A call comes after those that it depends on.
    """
    by_depth = model._nodes_by_depth
    return [
        (node.input_tensors, node.output_tensors)
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
    ]


def shape_of_build(model: Any) -> Any:
    """Returns the one shape by which a model was built, or None."""
    shapes = getattr(model, "_build_shapes_dict", None) or {}
    shape = getattr(model, "_build_input_shape", None)
    if len(shapes) == 1:
        (shape,) = shapes.values()
    try:
        return tf.TensorShape(shape) if shape is not None else None
    except TypeError:  # several shapes
        return None


def clear_losses(model: Any) -> None:
    """Takes back what the latest call has added to a model's losses."""
    model._clear_losses()


def forget_functions(model: Any) -> None:
    """Makes a compiled model trace its functions anew."""
    for name in ("train_function", "test_function", "predict_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    if not KERAS_2 and model.compiled and model.jit_compile:
        model.jit_compile = True  # Keras looks again whether it can.


def is_optimizer_built(model: Any) -> bool:
    """Tells whether a model's optimizer has state for its variables."""
    optimizer = getattr(model, "optimizer", None)
    inner = getattr(optimizer, "inner_optimizer", None)
    for one in filter(None, (optimizer, inner)):
        if getattr(one, "built", getattr(one, "_built", False)) is True:
            return True
        if len(getattr(one, "_weights", ())) > 1:  # legacy, beside its counter
            return True
    return False


# A layer that changes its class, as Keras' own `enable_lora` changes a layer.


def change_class(layer: Any, kind: type, twin: Any) -> None:
    """Makes a built layer one of another class.

    Args:
        layer: The layer.
        kind: The class.
        twin: A layer of the class, of which the layer takes what Keras notes
            about `call`.
    """
    object.__setattr__(layer, "__class__", kind)
    for name in vars(twin):
        if re.search("^_?call_(signature|spec|has)", name):
            object.__setattr__(layer, name, getattr(twin, name))
    # No checkpoint contains attributes that are set in this way.
    object.__setattr__(layer, "_autocast" if KERAS_2 else "autocast", False)
    for name in ("offset_kernel", "offset_bias"):
        object.__setattr__(layer, name, None)


@contextlib.contextmanager
def unlocked(layer: Any) -> Iterator[None]:
    """Lets a built layer make weights, named as its kernel is."""
    if KERAS_2:
        scope = layer.kernel.name.rpartition("/")[0]
        with tf.name_scope(f"{scope}/") if scope else contextlib.nullcontext():
            yield
        return
    before = set(map(id, layer.variables))
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()
    scope = layer.kernel.path.rpartition("/")[0]
    for variable in layer.variables:
        if id(variable) not in before:
            variable._path = f"{scope}/{variable.name}"


def set_trainable(weight: Any, trainable: bool) -> None:
    """Sets a weight's own flag, which Keras 2 does not have."""
    if not KERAS_2:
        weight.trainable = trainable


# Weights.


def own_variables(layer: Any) -> list[Any]:
    """Returns a layer's variables in the order in which files number them."""
    if KERAS_2:
        return layer._trainable_weights + layer._non_trainable_weights
    return layer._trainable_variables + layer._non_trainable_variables


def stored(weight: Any) -> Any:
    """Returns what `save_own_variables` puts in a store for a weight."""
    return weight.numpy() if KERAS_2 else weight


def track(layer: Any, weight: Any, name: str) -> None:
    """Makes TensorFlow's checkpoints hold a weight of a layer by this name.

    Keras 2 tracks weights by their own names, Keras 3 by the layer's
    attributes, among which it sees no lists.
    """
    layer._track_trackable(weight, name, overwrite=True)


def tf_variable(weight: Any) -> tf.Variable:
    """Returns the variable of TensorFlow that holds a weight."""
    if KERAS_2:  # With mixed precision a variable stands around another.
        return getattr(weight, "_variable", weight)
    return weight.value


def name_of(weight: Any) -> str:
    """Returns a weight's own name, without its layer's."""
    return weight.name.split("/")[-1].split(":")[0]


def stored_weights(layer: Any) -> dict[str, Any]:
    """Returns a layer's weights by the keys of files.

    Values are arrays where a layer stores what is no weight.
    """
    weights: dict[str, Any] = {}
    layer.save_own_variables(weights)
    if KERAS_2:  # which stores arrays
        own = own_variables(layer)
        known = {str(index): weight for index, weight in enumerate(own)}
        if isinstance(layer, Conv2D):
            known = {**layer._numbered(), **layer._branch()}
        weights = {key: known.get(key, weights[key]) for key in weights}
    return weights


# Files of weights, whose paths follow Keras' walk through a model.


def children(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yields a layer's attributes in the order in which files hold them."""
    saving = importlib.import_module(f"{keras.__name__}.src.saving.saving_lib")
    return (saving._walk_trackable if KERAS_2 else saving._walk_saveable)(layer)


def kind_in_file(item: Any, visited: set[int]) -> str | None:
    """Returns the word by which files number a container's item, or None.

    Args:
        item: The item.
        visited: The ids of the layers before it. Keras 2 numbers no layer
            twice, and leaves out containers in containers.
    """
    saving = f"{keras.__name__}.src.saving."
    if KERAS_2:
        saving = importlib.import_module(f"{saving}saving_lib")
        if id(item) in visited or not saving._is_keras_trackable(item):
            return None
        return snake_case(type(item))
    saving = importlib.import_module(f"{saving}keras_saveable")
    if isinstance(item, saving.KerasSaveable):
        return snake_case(type(item))
    return "container" if isinstance(item, (list, dict, tuple)) else None


def snake_case(kind: type) -> str:
    """Returns a class' name as files write it."""
    module = "generic_utils" if KERAS_2 else "naming"
    utils = importlib.import_module(f"{keras.__name__}.src.utils.{module}")
    return utils.to_snake_case(kind.__name__)


@contextlib.contextmanager
def downloads() -> Iterator[list[tuple[str, str, str, str]]]:
    """Yields a list that grows by the files that Keras 3 asks for.

    They are name, address, the folder that keeps it, and hash.
    """
    utils = importlib.import_module("keras.src.utils.file_utils")
    original, asked = utils.get_file, []

    def get_file(name: str, url: str, **options: Any) -> str:
        folder = os.path.join(
            utils.config.keras_home(), options["cache_subdir"]
        )
        asked.append((name, url, folder, options["file_hash"]))
        return original(name, url, **options)

    with mock.patch.object(utils, "get_file", get_file):
        yield asked


# Tools of export.


def policy_of(layer: Any) -> Any:
    """Returns a layer's policy if `in_float32` can take its place, or None.

    A quantized layer has another kind of policy. The weights of Keras 2 are
    cast if they are in float32, and used as they are otherwise.
    """
    policy = layer._dtype_policy
    if KERAS_2:
        return policy if policy.variable_dtype == "float32" else None
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    known = ("DTypePolicy", "FloatDTypePolicy")
    return policy if type(policy).__name__ in known else None


def in_float32(policy: Any) -> Any:
    """Returns a policy to compute in float32, with the same variables."""
    kind = keras.mixed_precision.Policy if KERAS_2 else keras.DTypePolicy
    result = kind("float32")
    result._variable_dtype = policy.variable_dtype
    return result


def set_policy(layer: Any, policy: Any) -> None:
    if KERAS_2:
        layer._set_dtype_policy(policy)
    else:  # The setter would leave an entry in a map.
        layer._dtype_policy = policy


# Puts a model's inputs in order, which differs for an OrderedDict.
tree = tf.nest if KERAS_2 else keras.tree


@contextlib.contextmanager
def whole_tracebacks() -> Iterator[None]:
    """Leaves the frames of layers in the tracebacks of errors."""
    config = tf.debugging if KERAS_2 else keras.config
    filtering = config.is_traceback_filtering_enabled()
    config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filtering:
            config.enable_traceback_filtering()
