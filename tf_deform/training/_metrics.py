# SPDX-License-Identifier: Apache-2.0
"""Writes numbers of a training, for programs and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._files import to_path, writing
from tf_deform._keras import keras
from tf_deform.training._monitor import scalar_metadata


def write_metrics(path: str | os.PathLike, metrics: Any) -> None:
    """Writes a JSON file, such as `metrics.json`, whole or not at all.

    Numbers of NumPy become plain ones, arrays become lists, and NaN and
    infinity, which JSON does not have, become null.

    Args:
        path: The file.
        metrics: Dictionaries, lists, texts, numbers, arrays and None.

    Raises:
        OSError: The file cannot be written.
        TypeError: JSON cannot hold a value.
    """
    text = json.dumps(plain(metrics), indent=2, ensure_ascii=False)
    with writing(to_path(path)) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class TensorBoardLogs(keras.callbacks.Callback):
    """Writes the logs of each epoch for TensorBoard.

    `keras.callbacks.TensorBoard` writes more, but needs TensorBoard itself,
    which TensorFlow does not install since 2.20: without it, training fails at
    the end of its first epoch. This callback does not need it. Numbers of the
    validation go into the folder "validation", as Keras' do, so that both lie
    in one chart. Put it after the callbacks that make logs.

    Args:
        folder: The folder for TensorBoard.

    Raises:
        TypeError: `folder` is no path.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__()
        self._folder = to_path(folder)
        self._writers: dict[str, Any] = {}

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        numbers = dict(logs or {})
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if rate is not None:
            numbers["learning_rate"] = rate
        for name, value in numbers.items():
            validation = name.startswith("val_")
            part = "validation" if validation else "train"
            if part not in self._writers:
                self._writers[part] = tf.summary.create_file_writer(
                    str(self._folder / part)
                )
            with self._writers[part].as_default(step=epoch):
                tf.summary.write(
                    f"epoch_{name[4:] if validation else name}",
                    float(value),
                    metadata=scalar_metadata(),
                )
        for writer in self._writers.values():
            writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
