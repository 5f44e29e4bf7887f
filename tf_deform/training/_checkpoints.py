# SPDX-License-Identifier: Apache-2.0
"""Saves the best model and the last one, from which training resumes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import warnings
import zipfile
from typing import Any

import numpy as np

from tf_deform._files import to_path, writing
from tf_deform._keras import keras
from tf_deform.training._ema import EmaEvaluation

_log = logging.getLogger("tf_deform")
# Entries that are added to Keras' in a `.keras` file, which is a zip file.
_STATE = "tf_deform/state.json"
_ARRAYS = "tf_deform/arrays.npz"


class BestAndLast(keras.callbacks.Callback):
    """Saves `best.keras` and `last.keras` after epochs, and resumes training.

    Each file appears whole or not at all, so a process that is killed, at any
    time, leaves those of an earlier epoch. `best.keras` holds the model of the
    epoch with the best `monitor`. `last.keras` holds all that training needs to
    go on in another process: weights, the optimizer's state, averages, states
    of random seeds, the logs of all epochs and the number of steps; and so the
    rest of training has the same result, to the bit, if every batch is a
    function of its number, and TensorFlow is deterministic. Both are models
    that `keras.saving.load_model` loads.

        checkpoints = tf_deform.training.BestAndLast("run", "val_AP")
        step = checkpoints.restore(model)  # 0 at the first start
        model.fit(
            batches(start=step),
            initial_epoch=checkpoints.epoch,
            epochs=12,
            steps_per_epoch=500,
            callbacks=[coco, checkpoints],
        )

    States of other callbacks are not saved: use schedules of the learning rate,
    not `ReduceLROnPlateau`. Of two processes, only one may write to a folder.

    Args:
        folder: The folder of both files, made where missing.
        monitor: The log that tells how good an epoch is. Callbacks that make it
            come earlier in the list. An epoch without it is never the best. Or
            None: only the last epoch is saved.
        mode: "max" if the best value of `monitor` is the largest one, or "min".
        ema: The `EmaEvaluation` whose averages are the weights of `best.keras`,
            or None. `last.keras` holds the weights of training and the
            averages.

    Attributes:
        epoch: The number of epochs that are done.
        step: The number of batches that are done.
        history: The logs of each epoch, as dictionaries, with the number of the
            epoch, counted from 1, and of the step at its end.
        best: Such a dictionary of the epoch in `best.keras`, or None.

    Raises:
        OSError: When it writes: the folder cannot be written.
        TypeError: An argument has another type.
        ValueError: `mode` is neither "max" nor "min".
        FloatingPointError: After an epoch: a weight is NaN or infinite. The
            files stay as they were.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        monitor: str | None,
        mode: str = "max",
        ema: EmaEvaluation | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("max", "min"):
            raise ValueError(
                f'Expected `mode` to be "max" or "min". Received: {mode!r}'
            )
        if not isinstance(monitor, (str, type(None))):
            raise TypeError(
                "Expected `monitor` to be the name of a log or None. Received: "
                f"{monitor!r}"
            )
        self._folder = to_path(folder)
        self._monitor = monitor
        self._sign = 1 if mode == "max" else -1
        self._ema = ema
        self._batches = 0
        self.epoch = 0
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def restore(self, model: Any) -> int:
        """Restores the state of `last.keras`, if there is one.

        Args:
            model: The model, compiled, and built the same way as in the process
                that saved it.

        Returns:
            The number of batches that are done, 0 without a file.

        Raises:
            ValueError: The model is not compiled or not built, or the file
                holds another model, another optimizer, or no state.
        """
        if not getattr(model, "compiled", False) or not model.built:
            raise ValueError(
                "Expected a model that is built and compiled. Received: "
                f"{model!r}"
            )
        path = self._folder / "last.keras"
        if not path.exists():
            return 0
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        state, arrays = _read(path)
        try:
            with warnings.catch_warnings():
                # Keras would only warn that it leaves the optimizer as it is.
                warnings.filterwarnings("error", "Skipping variable loading")
                model.load_weights(path)
            _set_arrays(self._others(model), arrays)
        except (ValueError, UserWarning) as error:
            raise ValueError(
                f"Expected {path} to hold the state of this model and its "
                f"optimizer. Received: {error}"
            ) from error
        self.epoch, self.step = state["epoch"], state["step"]
        self.history = state["history"]
        self.best = self._read_best()
        return self.step

    def _read_best(self) -> dict[str, Any] | None:
        path = self._folder / "best.keras"
        if self._monitor is None or not path.exists():
            return None
        best = _read(path)[0]["best"]
        if self._monitor not in best:
            raise ValueError(
                f"Expected {path} to be the best by {self._monitor!r}. "
                f"Received: a model with the logs {sorted(best)}"
            )
        return best

    def _others(self, model: Any) -> list[Any]:
        """Returns the variables that Keras leaves out of its files."""
        weights = set(map(id, model.weights))
        seeds = [v for v in model.variables if id(v) not in weights]
        if self._ema is None:
            return seeds
        self._ema.build(model)
        return [*seeds, *self._ema.variables]

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._batches = batch + 1

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        _check_finite(self.model, self.step + self._batches)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.epoch = epoch + 1
        self.step += self._batches
        self._batches = 0
        record = {"epoch": self.epoch, "step": self.step}
        for name, value in (logs or {}).items():
            record[name] = float(value)
        self.history.append(record)
        if self._is_best(record):
            self.best = record
            averages = self._ema.averages() if self._ema else None
            with averages or contextlib.nullcontext():
                _write(
                    self._folder / "best.keras", self.model, {"best": record}
                )
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "history": self.history,
        }
        _write(
            self._folder / "last.keras",
            self.model,
            state,
            [variable.numpy() for variable in self._others(self.model)],
        )

    def _is_best(self, record: dict[str, Any]) -> bool:
        """Compares, NaN being worse than any number; of equals, the last."""
        value = record.get(self._monitor)
        if value is None or self.best is None:
            return value is not None
        best = self.best[self._monitor]
        return math.isnan(best) or self._sign * value >= self._sign * best

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._monitor is not None and self.history and self.best is None:
            _log.warning(
                "Expected the log %r after an epoch, by which the best is "
                "chosen. Received: %s. Only last.keras was written; callbacks "
                "that make the log must come before BestAndLast",
                self._monitor,
                ", ".join(self.history[-1]),
            )


def _check_finite(model: Any, step: int) -> None:
    bad = [
        weight.path
        for weight in model.weights
        if "float" in str(weight.dtype)
        and not bool(keras.ops.all(keras.ops.isfinite(weight)))
    ]
    if bad:
        raise FloatingPointError(
            f"Expected finite weights after step {step}. Received: NaN or "
            f"infinity in {len(bad)}, such as {bad[0]}. Lower the learning "
            "rate, clip gradients, or look for NaN in the data. The files of "
            "earlier epochs stay"
        )


def _write(
    path: pathlib.Path,
    model: Any,
    state: dict[str, Any],
    arrays: list[np.ndarray] | None = None,
) -> None:
    """Writes a model with what else is to be known, whole or not at all."""
    with writing(path) as partial:
        model.save(partial)
        with zipfile.ZipFile(partial, "a") as archive:
            archive.writestr(_STATE, json.dumps(state))
            if arrays:
                with archive.open(_ARRAYS, "w") as file:
                    np.savez(file, *arrays)


def _read(path: pathlib.Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    try:
        with zipfile.ZipFile(path) as archive:
            state = json.loads(archive.read(_STATE))
            arrays = []
            if _ARRAYS in archive.namelist():
                with archive.open(_ARRAYS) as file, np.load(file) as found:
                    arrays = [found[key] for key in found.files]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected {path} to be a file of BestAndLast. Received: {error}"
        ) from error
    return state, arrays


def _set_arrays(variables: list[Any], arrays: list[np.ndarray]) -> None:
    if [tuple(v.shape) for v in variables] != [a.shape for a in arrays]:
        raise ValueError(
            f"{len(arrays)} averages and states of random seeds, where the "
            f"model has {len(variables)}, or of other shapes"
        )
    for variable, array in zip(variables, arrays):
        variable.assign(array)
