# SPDX-License-Identifier: Apache-2.0
"""Tests places outside of an image, and NaN and infinity, in other runtimes.

Such places are outside, in offsets, displacements and regions, as in the ops.
Each runtime reads one file that holds all operators.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close
from exported import CLOSE, load, write
from operands import random

from tf_deform import ops

FAR = [np.nan, np.inf, -np.inf, 1e10, -1e10, 3e38, -3e38, 2.0**31, -(2.0**31)]
FAR += [1e5]
INPUTS = {
    "maps": random(2, 8, 9, 18),
    "offset": random(2, 8, 9, 18, seed=1),
    "mask": random(2, 8, 9, 9, seed=2),
    "rois": np.float32(
        [
            (0, 3, 4, 20, 22),
            (1, -5, -3, 12, 40),
            (1, 10, 10, 10, 10),
            (-1, 1, 2, 10, 10),
            (0, 0, 0, 30, 30),
            (1, 5, 6, 25, 17),
        ]
    ),
    "trans": random(6, 3, 3, 2, seed=3),
}


def all_operators(maps, offset, mask, rois, trans):
    kernel = tf.constant(random(3, 3, 18, 2))
    outputs = {
        boundary: ops.deformable_conv2d(
            maps, kernel, offset, mask, padding="same", boundary=boundary
        )
        for boundary in ("zeros", "clamp")
    }
    place = {"spatial_scale": 0.25, "pooled_size": 3}
    for name, ratio in (("adaptive", 0), ("align", 2)):
        outputs[name] = ops.deformable_roi_align(
            maps, rois, trans, sampling_ratio=ratio, **place
        )
    outputs["psroi"] = ops.deformable_psroi_pool(
        maps, rois, trans, output_dim=2, sample_per_part=2, **place
    )
    return outputs


# Runtimes that read a file, each with the exporter and the opset.
RUNTIMES = {
    "onnx": ("onnx", 19),
    "openvino, onnx": ("onnx", 19),
    "onnx, opset 22": ("onnx", 22),
    "litert": ("litert", None),
    "openvino, portable": ("portable", None),
}


class Runtime(NamedTuple):
    name: str
    read: Callable
    function: Callable


@pytest.fixture(scope="module")
def one_conversion():
    """Makes all ONNX files of one conversion, which knows no opset yet."""
    # The package has a function of this name, too.
    module = importlib.import_module("tf_deform.export.onnx")
    original, converted = module._convert, []

    def convert(*arguments):
        if not converted:
            converted.append(original(*arguments))
        return copy.deepcopy(converted[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_convert", convert)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, one_conversion):
    """Returns a function that exports each file once."""
    path = tmp_path_factory.mktemp("far")

    @functools.cache
    def export(kind, opset):
        specs = [
            tf.TensorSpec(
                # LiteRT needs known sizes.
                value.shape
                if kind == "litert"
                else (None,) * (value.ndim - 1) + value.shape[-1:],
                name=name,
            )
            for name, value in INPUTS.items()
        ]
        function = tf.function(all_operators, specs)
        file = path / f"{kind}{opset}.onnx"
        arguments = {} if opset is None else {"opset": opset}
        write(kind, function, file, sample=INPUTS, **arguments)
        return file, function

    return export


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request, files):
    kind, opset = RUNTIMES[request.param]
    file, function = files(kind, opset)
    if request.param.startswith("openvino"):
        kind = "openvino"
    return Runtime(request.param, load(kind, file), function)


def check(runtime, case="", **changed):
    _, read, function = runtime
    given = {**INPUTS, **changed}
    expected = {k: v.numpy() for k, v in function(**given).items()}
    for name, value in expected.items():
        assert np.all(np.isfinite(value)), name
    received = read(given)
    received = {name: received[name] for name in expected}
    assert_close(received, expected, CLOSE, case=case, dtype="float32")


@pytest.mark.parametrize("value", [0.0, *FAR])
def test_displacements(runtime, value):
    """Changes some displacements, and the modulation of samples outside.

    ONNX Runtime multiplies samples outside by the modulation, so it hands on a
    modulation that is not finite.
    """
    rng, changed = np.random.default_rng(0), {}
    for name in ("offset", "trans"):
        changed[name] = INPUTS[name].copy()
        changed[name][rng.random(changed[name].shape) < 0.2] = value
    check(runtime, **changed)
    if np.isfinite(value) or not runtime.name.startswith("onnx"):
        offset, mask = INPUTS["offset"].copy(), INPUTS["mask"].copy()
        offset[:, ::2] = 1e10
        mask[:, ::2] = value
        check(runtime, "modulation", offset=offset, mask=mask)


@pytest.mark.parametrize("value", FAR)
def test_regions(runtime, value):
    """Changes another corner in each of some regions."""
    rois = INPUTS["rois"].copy()
    for row, column in ((0, 1), (1, 4), (2, 3), (4, 2), (5, 3)):
        rois[row, column] = value
    check(runtime, rois=rois)


@pytest.mark.parametrize("rows", [(0, 4), slice(None)], ids=["some", "all"])
def test_padding_regions(runtime, rows):
    rois = INPUTS["rois"].copy()
    rois[rows, 0] = -1
    check(runtime, rois=rois)


def test_inside_arithmetic_holds(runtime):
    """Tests that a modulation of NaN gives NaN."""
    _, read, function = runtime
    given = {**INPUTS, "mask": INPUTS["mask"].copy()}
    given["offset"] = np.full_like(INPUTS["offset"], 0.25)
    given["mask"][0, 4, 4, 4] = np.nan
    expected, received = function(**given), read(given)
    for name in ("zeros", "clamp"):
        assert np.isnan(expected[name]).sum() == 2
        assert_close(received[name], expected[name], CLOSE, name=name)
