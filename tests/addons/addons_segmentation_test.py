# SPDX-License-Identifier: Apache-2.0
"""Tests that the example with tensorflow_addons runs as a command."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tf_deform
from tf_deform._keras import keras

pytest.importorskip(
    "tensorflow_addons",
    reason="tensorflow_addons runs with TensorFlow 2.15 alone",
    exc_type=ImportError,
)
for module in ("skimage", "sklearn", "PIL"):
    pytest.importorskip(module, reason="the scenes need it")

HOME = pathlib.Path(tf_deform.__file__).parents[1]
EXAMPLE = pathlib.Path(__file__).parents[2] / "examples/addons_segmentation.py"


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_quick_run(tmp_path, monkeypatch, policy):
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    command = [sys.executable, EXAMPLE, "--quick", "--policy", policy]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "| deformable |" in done.stdout
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    for name in ("before", "plain", "deformable"):
        assert 0 < metrics[name]["miou"] < 1
    # The batch of another size may be summed in another order.
    bound = {"float32": 1e-5, "mixed_float16": 1e-2}[policy]
    assert metrics["served"]["difference"] <= bound
    loaded = keras.models.load_model(tmp_path / "out/deformable.keras")
    optimizer = loaded.optimizer
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    assert optimizer.offset_multiplier == 0.3
    images = np.zeros((1, 64, 64, 1), np.uint8)
    assert np.all(np.isfinite(loaded.predict(images, verbose=0)))
