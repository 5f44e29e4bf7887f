# SPDX-License-Identifier: Apache-2.0
"""Reads files of Keras' weights, of all kinds, as lists of layers' arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

_MEMBER = "model.weights.h5"  # of a .keras file
TOP = "top_level_model_weights"  # of a legacy file
# Parts of paths to objects that have variables and are no layers.
_NO_LAYERS = {"optimizer", "metrics", "seed_generator", "random_generator"}


@dataclasses.dataclass
class Entry:
    """Holds a layer's arrays of a file; path and name "" stand for the model.

    Attributes:
        path: The path of the arrays in the file.
        name: The layer's name, if the file says it.
        arrays: The arrays by key: a number, or, in a legacy file, the weight's
            name.
        group: In a legacy file, the model's layer that is this layer or holds
            it.
    """

    path: str
    name: str | None
    arrays: dict[str, h5py.Dataset | CheckpointArray]
    group: str = ""


@dataclasses.dataclass(frozen=True)
class CheckpointArray:
    """Reads an array of a checkpoint when it is asked for, as h5py does."""

    reader: Any
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    attrs: dict[str, str] = dataclasses.field(default_factory=dict)
    external: None = None
    is_virtual: bool = False

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self.reader.get_tensor(self.key), dtype)


def index_of(path: pathlib.Path) -> pathlib.Path:
    """Returns the file that every checkpoint has."""
    return path.with_name(f"{path.name}.index")


def open_file(
    path: pathlib.Path, stack: contextlib.ExitStack
) -> tuple[list[Entry], str]:
    """Lists the file's entries.

    Returns:
        The entries, and what they are told apart by: "paths", "groups" (in
        legacy files) or "names" (in checkpoints).
    """
    if not path.exists() and index_of(path).exists():
        return _list_checkpoint_entries(path), "names"
    if path.suffix == ".json":
        shards = []
        for names in json.loads(path.read_text())["weight_map"].values():
            shards += [names] if isinstance(names, str) else names
        files = []
        for name in dict.fromkeys(shards):
            if pathlib.Path(name).name != name:
                raise ValueError(f"a shard called {name!r}")
            files.append(h5py.File(path.with_name(name)))
            stack.callback(files[-1].close)
        return _list_entries(files), "paths"
    source = path
    if zipfile.is_zipfile(path):
        source = stack.enter_context(tempfile.TemporaryFile())
        with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as member:
            shutil.copyfileobj(member, source)
    file = stack.enter_context(h5py.File(source))
    root = file["model_weights"] if "model_weights" in file else file
    if _has_attribute(root, "layer_names"):
        return _list_legacy_entries(root), "groups"
    return _list_entries([file]), "paths"


def _list_entries(files: Sequence[h5py.File]) -> list[Entry]:
    """Lists entries of `.weights.h5` files: a group "vars" for each layer."""
    entries = {}

    def add(path: str, item: Any) -> None:
        # Keras 2.12 and 2.13 named this group differently.
        path = path.replace("_layer_checkpoint_dependencies", "layers")
        parts = ["", *path.split("/")]
        if not _NO_LAYERS.isdisjoint(parts):
            return
        if isinstance(item, h5py.Dataset):
            *parts, key = parts
        if parts[-1] != "vars":
            return
        path = "/".join(parts[1:-1])
        entry = entries.setdefault(path, Entry(path, None, {}))
        if isinstance(item, h5py.Dataset):
            entry.arrays[key] = item
        elif "name" in item.attrs:
            entry.name = _as_text(item.attrs["name"])

    for file in files:
        file.visititems(add)  # Follows no links, and so reads no other files.
    for entry in entries.values():
        if not entry.path:
            entry.name = ""
    return [entry for entry in entries.values() if entry.arrays]


def _list_legacy_entries(root: h5py.Group) -> list[Entry]:
    """Lists entries of a legacy file: a group for each layer of the model.

    A group holds the weights of all layers inside that layer, named like
    "outer/inner/kernel" (Keras 3) or "inner/kernel:0" (Keras 2).
    """
    entries = []
    for group in [*_read_attribute(root, "layer_names"), TOP]:
        if group not in root:
            continue
        found = {}
        for weight in _read_attribute(root[group], "weight_names"):
            layer, _, name = weight.rpartition("/")
            entry = found.setdefault(
                layer,
                Entry(f"{group}/{layer}", layer, {}, group),
            )
            entry.arrays[name.split(":")[0]] = root[group][weight]
        if len(found) == 1:
            (entry,) = found.values()
            entry.path, entry.name = group, "" if group == TOP else group
        entries += found.values()
    return entries


def _list_checkpoint_entries(path: pathlib.Path) -> list[Entry]:
    """Lists entries of a checkpoint of a model, by the names of its variables.

    The keys of Keras 2 and 3 differ ("layer_with_weights-0/kernel" and
    "_operations/1/_kernel"); the full names, "first/kernel", do not.
    """
    reader = tf.train.load_checkpoint(str(path))
    shapes = reader.get_variable_to_shape_map()
    types = reader.get_variable_to_dtype_map()
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
    attributes = [one for node in graph.nodes for one in node.attributes]
    # An optimizer may have any name in a checkpoint.
    optimizers = tuple(
        one.checkpoint_key.rpartition(counter)[0] + "/"
        for one in attributes
        for counter in ("/_iterations/", "/iter/")
        if counter in one.checkpoint_key
    )
    entries = {}
    for one in attributes:
        key, parts = one.checkpoint_key, one.checkpoint_key.split("/")
        is_state = (
            key.startswith(optimizers)
            or ".OPTIMIZER_SLOT" in parts
            or "save_counter" in parts
            or not _NO_LAYERS.isdisjoint(parts)
        )
        # The shortest way to a weight may lead through an optimizer.
        is_state = is_state and "_trainable_variables" not in parts
        if is_state or one.name != "VARIABLE_VALUE":
            continue
        layer, _, name = one.full_name.rpartition("/")
        entry = entries.setdefault(layer, Entry(layer, layer, {}))
        if name in entry.arrays:
            raise ValueError(f"two weights called {one.full_name!r}")
        entry.arrays[name] = CheckpointArray(
            reader, key, tuple(shapes[key]), np.dtype(types[key].as_numpy_dtype)
        )
    return list(entries.values())


def _has_attribute(group: h5py.Group, name: str) -> bool:
    return name in group.attrs or f"{name}0" in group.attrs


def _read_attribute(group: h5py.Group, name: str) -> list[str]:
    """Reads a list of texts, which Keras cuts into pieces if it is long."""
    if name in group.attrs:
        return [_as_text(item) for item in group.attrs[name]]
    texts = []
    for index in itertools.count():
        if f"{name}{index}" not in group.attrs:
            return texts
        texts += [_as_text(item) for item in group.attrs[f"{name}{index}"]]


def _as_text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def is_bfloat16(array: h5py.Dataset | CheckpointArray) -> bool:
    # Keras 2 writes bytes without a word.
    return array.attrs.get("dtype") == "bfloat16" or array.dtype.str[1:] == "V2"
