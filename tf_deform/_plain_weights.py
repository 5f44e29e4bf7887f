# SPDX-License-Identifier: Apache-2.0
"""Loads the weights of a plain model into its deformable twin."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _files, _keras
from tf_deform._keras import keras
from tf_deform._weight_files import (
    TOP,
    Entry,
    index_of,
    is_bfloat16,
    open_file,
)
from tf_deform.layers._roi_layer import DisplacedROILayer
from tf_deform.layers.deformable_conv2d import DeformableConv2D
from tf_deform.layers.deformable_psroi_pool import DeformablePSROIPooling

_MOST_PROBLEMS = 5


@dataclasses.dataclass(frozen=True)
class LoadedLayer:
    """Describes how a layer was loaded.

    Attributes:
        name: The layer's name, behind the names of the models and layers that
            hold it.
        source: Where the file has the layer's weights, or None.
        loaded: Names of the weights that were loaded.
        stayed: Names of the weights that stayed as they were.
    """

    name: str
    source: str | None
    loaded: tuple[str, ...]
    stayed: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.loaded:
            parts.append(f"{', '.join(self.loaded)} from {self.source}")
        if self.stayed:
            parts.append(f"as they were: {', '.join(self.stayed)}")
        return f"{self.name}: {'; '.join(parts)}"


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
    """Describes the result of `load_plain_weights`.

    Attributes:
        path: The file.
        matched_by: "name" or "order": how layers were found in the file.
        layers: One entry for each layer that has weights.
    """

    path: pathlib.Path
    matched_by: str
    layers: tuple[LoadedLayer, ...]

    def __str__(self) -> str:
        count = sum(bool(layer.loaded) for layer in self.layers)
        head = (
            f"{self.path}: {count} of {len(self.layers)} layers, by "
            f"{self.matched_by}"
        )
        return "\n  ".join([head, *map(str, self.layers)])


@dataclasses.dataclass
class _Target:
    """Describes a layer that has weights; path and name "" stand for the model.

    Attributes:
        layer: The layer.
        path: The path at which a plain model's file has the layer's weights.
        name: The layer's name.
        label: The name behind the names of the models and layers that hold the
            layer.
        weights: The weights by the file's key, including the weights of a
            branch.
        branch: Keys of the weights that a plain model does not have.
    """

    layer: keras.layers.Layer
    path: str
    name: str
    label: str
    weights: dict[str, Any]
    branch: frozenset[str]

    @property
    def is_plain(self) -> bool:
        """Tells whether a plain model's file has weights for this layer."""
        return len(self.branch) < len(self.weights)


# The pairs of a layer and its entry, and the texts of all mismatches.
_Match = tuple[list[tuple[_Target, Entry]], list[str]]


def load_plain_weights(
    model: keras.Model, path: str | os.PathLike
) -> LoadedWeights:
    """Loads the weights of a plain model into its deformable twin.

    The twin has `DeformableConv2D` where the plain model has `Conv2D`, and
    besides may have layers that pool regions. `load_weights` cannot load such a
    file: weight files number the layers of each class, so that one exchanged
    layer shifts the numbers of its plain neighbours, which then get the weights
    of other layers. `load_weights` raises an error; but with
    `skip_mismatch=True` it loads wrong weights in silence, and this package
    cannot prevent that, as the plain layers are Keras' own.

    Layers are found by name. Where names are missing (older files have none) or
    occur twice, or where the names of the two models differ, layers are found
    by order, with plain and deformable convolutions counted as one class.
    Either way every layer, key and shape has to fit, or nothing is loaded. The
    file does not hold the weights of branches, which stay as they are: zero in
    a new model, which then gives the same output as the plain model (with
    `modulation` None or "2sigmoid"). A deformable model's file whose names fit
    is also loaded, branches included. The state of optimizers is not read.

    Args:
        model: The deformable model, built.
        path: `.weights.h5`, `.weights.json` (with its shards beside it),
            `.keras`, or an `.h5` of Keras 2 or 3, of weights or a whole model;
            or the prefix of a checkpoint of a model, which Keras 2's
            `save_weights("prefix")` and `tf.train.Checkpoint` write and the
            other Keras does not restore. In checkpoints, layers are found by
            name alone. Numbers are cast to the model's types. No code in the
            file is run.

    Returns:
        A description of each layer; `print` it.

    Raises:
        OSError: The file cannot be read.
        TypeError: `model` is not a Keras model, or `path` not a path.
        ValueError: `model` is not built, or the file is of another kind or does
            not fit. The model is then as it was.
    """
    return load(model, path)


def load(
    model: keras.Model, path: str | os.PathLike, without_top: bool = False
) -> LoadedWeights:
    """Does the same; `without_top` leaves out dense layers of the file.

    They are left out where the model has no layer of their name. Any other
    layer may be one of a deeper network, and is an error.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"Expected `model` to be a keras.Model. Received: {model!r}"
        )
    if not model.built:
        raise ValueError(
            "Expected `model` to be built. Received: "
            f"{model.name!r}, which has no weights yet. Call it on data first"
        )
    path = _files.to_path(path)
    index = index_of(path)
    with open(path if path.exists() or not index.exists() else index, "rb"):
        pass  # Reading the file below says what is wrong with the path.
    with contextlib.ExitStack() as stack:
        try:
            entries, form = open_file(path, stack)
        except FileNotFoundError:  # A shard is missing.
            raise
        except Exception as error:
            raise ValueError(
                "Expected `path` to be a .weights.h5, .weights.json, .keras or "
                ".h5 file of Keras, or the prefix of a checkpoint of a model. "
                f"Received: {path}, which cannot be read: {error}"
            ) from error
        legacy = form != "paths"
        targets = _find_targets(model, legacy)
        if without_top:
            entries = _without_top(entries, targets)
        problems = {}
        if form == "groups":
            pairs, matched_by, problems["name or order"] = _match_groups(
                model, entries
            )
        else:
            matched_by = "name"
            pairs, problems["name"] = _match_names(targets, entries)
            if problems["name"] and form == "names":
                # Every LSTM's cell has the same name.
                pairs, others = _match_names(targets, entries, 2)
                problems = {"name": others and problems["name"]}
            elif problems["name"]:
                matched_by = "order"
                pairs, problems["order"] = _match_paths(targets, entries)
        if list(problems.values())[-1]:
            _raise(model, path, problems)
        plans = [_plan(target, entry, form) for target, entry in pairs]
        misfits = [problem for _, found in plans for problem in found]
        if misfits:
            _raise(model, path, {matched_by: misfits})
        loaded = [
            (target, entry, _read(target, entry, keys))
            for (target, entry), (keys, _) in zip(pairs, plans)
        ]
    before = [(variable, variable.numpy()) for variable in model.variables]
    try:
        for target, _, arrays in loaded:
            _assign(target, arrays, legacy)
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    return LoadedWeights(path, matched_by, tuple(_report(targets, loaded)))


def _without_top(entries: list[Entry], targets: list[_Target]) -> list[Entry]:
    """Leaves out dense layers, of a matrix and a bias, that no target is."""
    names = {target.name for target in targets}
    paths = {target.path for target in targets}

    def is_top(entry: Entry) -> bool:
        is_known = entry.path in paths
        if entry.name is not None:
            is_known = entry.name.split("/")[-1] in names
        axes = [len(array.shape) for array in entry.arrays.values()]
        return not is_known and max(axes) == 2

    return [entry for entry in entries if not is_top(entry)]


def _raise(
    model: keras.Model, path: pathlib.Path, problems: dict[str, list[str]]
) -> None:
    texts = []
    for way, found in problems.items():
        more = len(found) - _MOST_PROBLEMS
        texts.append(
            f"by {way}: {'; '.join(found[:_MOST_PROBLEMS])}"
            + (f"; and {more} more" if more > 0 else "")
        )
    raise ValueError(
        f"Expected {path} to hold the weights of model {model.name!r} or of "
        f"its plain twin. Received, {'. And '.join(texts)}. Nothing was loaded"
    )


def _find_targets(
    root: keras.layers.Layer, legacy: bool, name: str = ""
) -> list[_Target]:
    """Finds all layers with weights in a model or layer, itself included.

    Args:
        root: The model, or one of its layers.
        legacy: Whether the keys of the weights are their names, as in a legacy
            file.
        name: "" for the model, else the layer's name.
    """
    targets = []
    for path, label, found in _walk(root, name, name, set()):
        if legacy:
            own = _keras.own_variables(found)
            weights = {_keras.name_of(variable): variable for variable in own}
        else:
            weights = _keras.stored_weights(found)
        branch = frozenset()
        if isinstance(found, DeformableConv2D):
            branch = {"offset_kernel", "offset_bias"} & weights.keys()
        elif isinstance(found, (DisplacedROILayer, DeformablePSROIPooling)):
            branch = weights.keys()
        if weights:
            targets.append(
                _Target(
                    found,
                    path,
                    found.name if path else "",
                    label or found.name,
                    weights,
                    frozenset(branch),
                )
            )
    return targets


def _walk(
    layer: keras.layers.Layer, path: str, label: str, visited: set[int]
) -> Iterator[tuple[str, str, keras.layers.Layer]]:
    """Yields layers in the order of Keras' files, with path and label."""
    if id(layer) in visited:
        return
    visited.add(id(layer))
    yield path, label, layer
    for name, child in _keras.children(layer):
        inner = f"{path}/{name}" if path else name
        yield from _walk_child(child, inner, label, visited, set())


def _walk_child(
    child: Any, path: str, label: str, visited: set[int], containers: set[int]
) -> Iterator[tuple[str, str, keras.layers.Layer]]:
    if isinstance(child, keras.layers.Layer):
        label = f"{label}/{child.name}" if label else child.name
        yield from _walk(child, path, label, visited)
        return
    if not isinstance(child, (list, dict, tuple)) or id(child) in containers:
        return
    containers.add(id(child))
    counts = collections.Counter()
    for item in child.values() if isinstance(child, dict) else child:
        kind = _keras.kind_in_file(item, visited)
        if kind is None:
            continue
        if isinstance(item, DeformableConv2D):
            kind = _keras.snake_case(keras.layers.Conv2D)
        count = counts[kind]
        counts[kind] += 1
        inner = f"{path}/{kind}_{count}" if count else f"{path}/{kind}"
        yield from _walk_child(item, inner, label, visited, containers)


def _match_names(
    targets: list[_Target], entries: list[Entry], depth: int = 1
) -> _Match:
    """Matches layers by names, which have to occur once in both.

    Args:
        depth: The number of trailing names to compare: a layer's own name, and
            before it the names of the layers that hold it.
    """
    if any(entry.name is None for entry in entries):
        return [], ["a file without the layers' names"]

    def tail(name: str) -> str:
        return "/".join(name.split("/")[-depth:])

    given = [tail(entry.name) for entry in entries]
    wanted = [tail(target.label) if target.name else "" for target in targets]
    problems = []
    for where, names in (("file", given), ("model", wanted)):
        problems += [
            f"{name!r} {count} times in the {where}"
            for name, count in collections.Counter(names).items()
            if count > 1
        ]
    by_name = dict(zip(given, entries))
    problems += [
        f"no layer {name!r} in the file"
        for name, target in zip(wanted, targets)
        if target.is_plain and name not in by_name
    ]
    problems += [
        f"a layer {name!r} which the model has not"
        for name in given
        if name not in wanted
    ]
    pairs = [
        (target, by_name[name])
        for name, target in zip(wanted, targets)
        if name in by_name
    ]
    return pairs, problems


def _match_paths(targets: list[_Target], entries: list[Entry]) -> _Match:
    """Matches layers by Keras' paths, which count the layers of each class."""
    by_path = {entry.path: entry for entry in entries}
    paths = {target.path for target in targets}
    problems = [
        f"nothing at {target.path!r} for layer {target.label!r}"
        for target in targets
        if target.is_plain and target.path not in by_path
    ]
    problems += [
        f"weights at {path!r}, for which the model has no layer"
        for path in by_path
        if path not in paths
    ]
    pairs = [
        (target, by_path[target.path])
        for target in targets
        if target.path in by_path
    ]
    return pairs, problems + _find_contradictions(pairs)


def _match_groups(
    model: keras.Model, entries: list[Entry]
) -> tuple[list[tuple[_Target, Entry]], str, list[str]]:
    """Matches a legacy file's groups, in each by names, otherwise by order.

    Returns:
        The pairs, "name" or "order", and the texts of all mismatches.
    """
    groups = collections.defaultdict(list)
    for entry in entries:
        groups[entry.group].append(entry)
    layers = {
        layer.name: _find_targets(layer, True, layer.name)
        for layer in model.layers
    }
    layers[TOP] = [x for x in _find_targets(model, True) if not x.name]
    layers = {
        name: targets
        for name, targets in layers.items()
        if name in groups or any(target.is_plain for target in targets)
    }
    if len(layers) != len(groups) or (TOP in layers) != (TOP in groups):
        names = [repr(name) for name in layers if name not in groups]
        others = [repr(name) for name in groups if name not in layers]
        return (
            [],
            "order",
            [
                f"{len(groups)} layers in place of {len(layers)}, without "
                f"{', '.join(names) or 'none'}, with {', '.join(others)} "
                "besides"
            ],
        )
    by_name = layers.keys() == groups.keys()
    pairs, ordered, problems = [], [], []
    for targets, name in zip(layers.values(), layers if by_name else groups):
        found = groups[name]
        for depth in (1, 2):  # Every LSTM's cell has the same name.
            matched, others = _match_names(targets, found, depth)
            if not others:
                pairs += matched
                break
        else:
            targets = [target for target in targets if target.is_plain]
            if len(targets) != len(found):
                problems += others
            elif len(found) > 1 and not _count_up(found):
                problems.append(
                    f"an order of the layers in {name!r} that may not be "
                    "theirs: frozen ones are written last"
                )
            # A single layer in a group of the same name needs no name of its
            # own.
            alone = by_name and len(found) == 1
            for pair in zip(targets, found):
                (pairs if alone else ordered).append(pair)
    problems += _find_contradictions(ordered)
    return pairs + ordered, "order" if ordered else "name", problems


def _count_up(entries: list[Entry]) -> bool:
    """Checks that names are Keras' own, numbered in the order of the layers."""
    last = {}
    for entry in entries:
        name = entry.name.split("/")[-1]
        kind, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name).groups()
        number = int(number or 0)
        if number <= last.get(kind, -1):
            return False
        last[kind] = number
    return True


def _find_contradictions(pairs: list[tuple[_Target, Entry]]) -> list[str]:
    """Lists layers that get by order the weights that have another name.

    Names that Keras made up are no contradiction: Keras counts plain and
    deformable convolutions apart.
    """
    names = {target.name for target, _ in pairs}
    problems = []
    for target, entry in pairs:
        kinds = [type(target.layer)]
        if isinstance(target.layer, DeformableConv2D):
            kinds = [DeformableConv2D, keras.layers.Conv2D]
        made_up = "|".join(map(_keras.snake_case, kinds))
        name = (entry.name or target.name).split("/")[-1]
        if name in names - {target.name} and not re.fullmatch(
            rf"({made_up})(_\d+)?", name
        ):
            problems.append(
                f"the weights of {name!r} for layer {target.label!r}"
            )
    return problems


def _plan(
    target: _Target, entry: Entry, form: str
) -> tuple[dict[str, str], list[str]]:
    """Assigns the arrays of an entry to weights, and lists all mismatches."""
    given = list(entry.arrays)
    branch = target.branch & set(given)
    if branch and branch != target.branch:
        return {}, [
            f"of the branch of layer {target.label!r} only {sorted(branch)}"
        ]
    wanted = [
        key for key in target.weights if branch or key not in target.branch
    ]
    if set(wanted) == set(given):
        keys = dict(zip(wanted, wanted))
    elif form == "groups" and len(wanted) == len(given):
        keys = dict(zip(wanted, given))  # Keras 2 had other names.
    else:
        return {}, [
            f"for layer {target.label!r} the arrays {sorted(given)} in place "
            f"of {wanted}"
        ]
    problems = []
    for key, name in keys.items():
        weight, array = target.weights[key], entry.arrays[name]
        if array.external or array.is_virtual:
            problems.append(f"{name!r} of {entry.path!r} in another file")
        elif tuple(weight.shape) != array.shape:
            problems.append(
                f"for {_name(target, key)!r} of layer {target.label!r} the "
                f"shape {array.shape} in place of {tuple(weight.shape)}"
            )
        elif _is_float(weight) != (
            array.dtype.kind == "f" or is_bfloat16(array)
        ):
            problems.append(
                f"for {_name(target, key)!r} of layer {target.label!r} the "
                f"type {array.dtype} in place of {weight.dtype}"
            )
    return keys, problems


def _name(target: _Target, key: str) -> str:
    weight = target.weights[key]
    return _keras.name_of(weight) if hasattr(weight, "name") else key


def _is_float(weight: Any) -> bool:
    return tf.as_dtype(weight.dtype).is_floating


def _read(
    target: _Target, entry: Entry, keys: dict[str, str]
) -> dict[str, np.ndarray]:
    arrays = {}
    for key, name in keys.items():
        try:
            array = np.asarray(entry.arrays[name])
        except Exception as error:
            raise ValueError(
                f"Expected all arrays of the file to be whole. Received: "
                f"{name!r} of {entry.path!r}, which cannot be read: {error}. "
                "Nothing was loaded"
            ) from error
        if is_bfloat16(entry.arrays[name]):
            array = array.view(tf.bfloat16.as_numpy_dtype)
        dtype = tf.as_dtype(target.weights[key].dtype).as_numpy_dtype
        arrays[key] = array.astype(dtype)
    return arrays


def _assign(
    target: _Target, arrays: dict[str, np.ndarray], legacy: bool
) -> None:
    if not legacy:
        stays = {key: target.weights[key] for key in target.branch}
        target.layer.load_own_variables({**stays, **arrays})
        return
    for key, array in arrays.items():
        target.weights[key].assign(array)
    if hasattr(target.layer, "finalize_state"):
        target.layer.finalize_state()


def _report(
    targets: list[_Target],
    loaded: list[tuple[_Target, Entry, dict[str, np.ndarray]]],
) -> Iterator[LoadedLayer]:
    found = {id(target.layer): rest for target, *rest in loaded}
    for target in targets:
        entry, arrays = found.get(id(target.layer), (None, {}))
        yield LoadedLayer(
            target.label,
            entry and (entry.path or "the model's own"),
            tuple(_name(target, key) for key in arrays),
            tuple(
                _name(target, key)
                for key in target.weights
                if key not in arrays
            ),
        )
