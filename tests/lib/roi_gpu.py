# SPDX-License-Identifier: Apache-2.0
"""Calls the pooling ops' CUDA kernels.

See gpu.py, and pooling.py for the CPU.
"""

from typing import Any

import core
import gpu
import numpy as np
import pooling
from compare import Tolerance, assert_close, assert_same_bits
from pooling import results
from tolerances import HALF_UNIT

NAMES = ("inputs", "displacement")


class Gpu:
    """Calls an op's kernels, with the methods of `pooling.Cpu`.

    All tensors have guards around them; outputs and scratch are NaN before.
    If `misaligned`, tensors are aligned to an element only.
    """

    def __init__(
        self,
        op: pooling.Op,
        deterministic: bool = False,
        misaligned: bool = False,
    ):
        self.op = op
        self.deterministic = deterministic
        self.misaligned = misaligned
        self.workspace_bytes = 0  # of the latest call

    def _prepare(self, operands, dtype, output_grad, attributes):
        stored, _, params, _ = core._prepare_roi(
            self.op.name, *operands, dtype, output_grad, attributes
        )
        tensors = gpu.Tensors(self.misaligned)
        return tensors, [tensors.of(array) for array in stored], params

    def forward(
        self,
        inputs,
        rois,
        displacement=None,
        *,
        dtype: str = "float32",
        threads: int = 1,
        return_count: bool = False,
        **attributes: Any,
    ):
        """Returns the output or, with `return_count`, a pair."""
        tensors, operands, params = self._prepare(
            (inputs, rois, displacement), dtype, None, attributes
        )
        counts = self.op.counts
        channels = params.output_dim if counts else params.channels
        shape = (params.num_rois, params.pooled_h, params.pooled_w, channels)
        outputs = [tensors.made(shape, dtype)]
        if counts:
            outputs.append(
                gpu.Tensor(shape=shape, dtype=np.float32)
                if return_count
                else None
            )
        self.workspace_bytes = gpu.forward(
            self.op.name,
            params,
            dtype,
            gpu.pointers(core.ROIOperands, operands),
            outputs,
            deterministic=self.deterministic,
        )
        assert self.workspace_bytes <= 64 << 20
        output = gpu.values(outputs[0], dtype)
        return (output, outputs[1].numpy()) if return_count else output

    def backward(
        self,
        inputs,
        rois,
        displacement,
        output_grad,
        *,
        dtype: str = "float32",
        threads: int = 1,
        wanted: tuple[str, ...] = NAMES,
        **attributes: Any,
    ) -> dict[str, np.ndarray]:
        """Returns the wanted gradients by name, for operands that exist."""
        tensors, operands, params = self._prepare(
            (inputs, rois, displacement), dtype, output_grad, attributes
        )
        kinds = {
            "inputs": dtype,
            "displacement": "float64" if dtype == "float64" else "float32",
        }
        made = {
            name: tensors.made(tensor.shape, kinds[name])
            for name, tensor in zip(NAMES, operands[::2], strict=True)
            if name in wanted and tensor is not None
        }
        self.workspace_bytes = gpu.backward(
            self.op.name,
            params,
            dtype,
            gpu.pointers(core.ROIOperands, operands),
            tensors.of(core._stored(output_grad, dtype)),
            gpu.pointers(core.ROIGradients, map(made.get, NAMES)),
            deterministic=self.deterministic,
        )
        assert self.workspace_bytes <= 64 << 20
        return {
            name: gpu.values(tensor, kinds[name])
            for name, tensor in made.items()
        }


def check_against_cpu(
    runner: Gpu, operands, attributes: dict, dtype: str
) -> None:
    """Compares with the CPU's core, which is faster than the reference.

    Two results that were rounded to 16 bits may differ by one unit.
    """
    exact = core.rounded(operands, dtype)
    common = dict(dtype=dtype, **attributes)
    received = results(runner, exact, **common)
    expected = results(pooling.Cpu(runner.op), exact, **common)
    assert received.keys() == expected.keys()
    of_largest = 1e-11 if dtype == "float64" else 2e-6
    for name, array in received.items():
        unit = 0 if name == "displacement" else 2 * HALF_UNIT.get(dtype, 0)
        assert_close(
            array,
            expected[name],
            Tolerance(of_largest, at_least=1, of_each=1.01 * unit),
            case=f"{dtype} {attributes}",
            name=name,
        )


def check_alone_and_again(
    op: pooling.Op, exact, dtype: str, attributes: dict
) -> None:
    """Checks that results have the same bits alone and in any order."""
    runner = Gpu(op, deterministic=True)
    common = dict(dtype=dtype, **attributes)
    expected = results(runner, exact, **common)
    for name in NAMES:
        alone = runner.backward(*exact, wanted=(name,), **common)
        assert_same_bits(alone, {name: expected[name]}, f"{name} alone")
    assert runner.backward(*exact, wanted=(), **common) == {}
    if gpu.ON_GPU:
        for turn in range(5):
            again = results(runner, exact, **common)
            assert_same_bits(again, expected, f"turn {turn}")
        return
    try:
        gpu.library().TfDeformEmulatedOrder(1)
        again = results(runner, exact, **common)
        atomic = Gpu(op).backward(*exact, wanted=NAMES[1:], **common)
    finally:
        gpu.library().TfDeformEmulatedOrder(0)
    assert_same_bits(again, expected, "threads in the opposite order")
    expected = {"displacement": expected["displacement"]}
    assert_same_bits(atomic, expected, "atomic")
