# SPDX-License-Identifier: Apache-2.0
"""Calls of the ROI ops' CUDA kernels, and the tests that both ops share.

As `core.forward_roi` and `core.backward_roi`; all tensors have guards around
them and outputs and workspace are NaN before.
"""

import ctypes

import core
import gpu
import numpy as np
import roi_reference

NAMES = ("inputs", "displacement")


def _tensors(op, operands, dtype, attributes, misaligned):
    """Operands and gradient (or None) on the device, and parameters.

    If `misaligned`, they are aligned to an element only.
    """
    *arrays, grad_output = operands
    stored, _, params, _ = core._prepare_roi(
        op, *arrays, dtype, grad_output, attributes
    )
    tensors = [
        None
        if array is None
        else gpu.Tensor(array, offset=misaligned * array.dtype.itemsize)
        for array in (*stored, core._stored(grad_output, dtype))
    ]
    return tensors, params


def _pointers(kind, tensors):
    return kind(*(None if t is None else t.pointer for t in tensors))


# Of the latest call.
workspace_bytes = 0


def _workspace(name, params, number, *arguments):
    global workspace_bytes
    arguments = [ctypes.byref(argument) for argument in arguments]
    workspace_bytes = gpu.workspace_bytes(
        name, ctypes.byref(params), number, *arguments
    )
    assert workspace_bytes <= 64 << 20
    return gpu.workspace(workspace_bytes)


def _widened(array, dtype):
    return core.from_bfloat16(array) if dtype == "bfloat16" else array


def forward(
    op,
    operands,
    dtype,
    attributes,
    *,
    count=False,
    misaligned=False,
    **options,
):
    """The output or, with `count`, a pair."""
    (*tensors, _), params = _tensors(
        op, (*operands[:3], None), dtype, attributes, misaligned
    )
    storage = tensors[0].dtype
    psroi = op == "DeformablePSROIPool"
    shape = (
        params.num_rois,
        params.pooled_h,
        params.pooled_w,
        params.output_dim if psroi else params.channels,
    )
    output = gpu.Tensor(
        shape=shape, dtype=storage, offset=misaligned * storage.itemsize
    )
    results = [ctypes.c_void_p(output.pointer)]
    counts = gpu.Tensor(shape=shape, dtype=np.float32) if count else None
    if psroi:
        results.append(ctypes.c_void_p(counts.pointer if count else None))
    name, number = f"TfDeform{op}Cuda", core.DTYPES[dtype]
    workspace = _workspace(f"{name}WorkspaceBytes", params, number)
    gpu.call(
        f"{name}Forward",
        [
            ctypes.byref(params),
            number,
            ctypes.byref(_pointers(core.ROIOperands, tensors)),
            ctypes.c_void_p(workspace.pointer),
            *results,
            ctypes.byref(gpu.stream(**options)),
        ],
    )
    workspace.numpy()
    result = _widened(output.numpy(), dtype)
    return (result, counts.numpy()) if count else result


def backward(
    op,
    operands,
    dtype,
    attributes,
    *,
    wanted=NAMES,
    misaligned=False,
    **options,
):
    """The wanted gradients by name; missing displacements have none."""
    tensors, params = _tensors(op, operands, dtype, attributes, misaligned)
    results = {
        name: gpu.Tensor(
            shape=tensor.shape,
            dtype=tensor.dtype,
            offset=misaligned * tensor.dtype.itemsize,
        )
        for name, tensor in zip(NAMES, tensors[:3:2], strict=True)
        if name in wanted and tensor is not None
    }
    gradients = _pointers(core.ROIGradients, map(results.get, NAMES))
    name, number = f"TfDeform{op}Cuda", core.DTYPES[dtype]
    stream = gpu.stream(**options)
    workspace = _workspace(
        f"{name}BackwardWorkspaceBytes", params, number, gradients, stream
    )
    gpu.call(
        f"{name}Backward",
        [
            ctypes.byref(params),
            number,
            ctypes.byref(_pointers(core.ROIOperands, tensors[:3])),
            ctypes.c_void_p(tensors[3].pointer),
            ctypes.c_void_p(workspace.pointer),
            ctypes.byref(gradients),
            ctypes.byref(stream),
        ],
    )
    workspace.numpy()
    return {
        name: _widened(tensor.numpy(), dtype if name == "inputs" else "")
        for name, tensor in results.items()
    }


def fixture(op, module, monkeypatch, deterministic):
    """Lets the tests in `module`, the core's, test the GPU instead."""

    def on_gpu_forward(
        inputs,
        rois,
        displacement=None,
        *,
        dtype="float32",
        threads=1,
        return_count=False,
        **attributes,
    ):
        operands = (inputs, rois, displacement)
        return forward(op, operands, dtype, attributes, count=return_count)

    def on_gpu_backward(
        *operands,
        dtype="float32",
        threads=1,
        wanted=NAMES,
        **attributes,
    ):
        return backward(
            op,
            operands,
            dtype,
            attributes,
            wanted=wanted,
            deterministic=deterministic,
        )

    def on_gpu_check(operands, attributes, dtypes=module.DTYPES, threads=()):
        check(op, operands, attributes, dtypes, deterministic=deterministic)

    monkeypatch.setattr(module, "forward", on_gpu_forward)
    monkeypatch.setattr(module, "backward", on_gpu_backward)
    monkeypatch.setattr(module, "check", on_gpu_check)


def check(op, operands, attributes, dtypes, **options):
    """Output, count and gradients against the reference."""
    psroi = op == "DeformablePSROIPool"
    for dtype in dtypes:
        exact = core.rounded(operands, dtype)
        if psroi:
            expected, count = roi_reference.deformable_psroi_pool(
                *exact[:3], return_count=True, **attributes
            )
            gradients = roi_reference.deformable_psroi_pool_grad(
                *exact, **attributes
            )
        else:
            expected = roi_reference.deformable_roi_align(
                *exact[:3], **attributes
            )
            gradients = roi_reference.deformable_roi_align_grad(
                *exact, **attributes
            )
        received = forward(op, exact, dtype, attributes, count=psroi, **options)
        if psroi:
            received, counts = received
            np.testing.assert_array_equal(counts, count)
        roi_reference.assert_close(received, expected, dtype, "output")
        made = backward(op, exact, dtype, attributes, **options)
        for name, gradient in made.items():
            kind = dtype if name == "inputs" or dtype == "float64" else ""
            roi_reference.assert_close(
                gradient, getattr(gradients, name), kind, name
            )


def check_against_cpu(op, operands, attributes, dtypes, **options):
    """The same against the CPU core, which is faster than the reference.

    Two results that were rounded to 16 bits may be one unit apart.
    """
    for dtype in dtypes:
        exact = core.rounded(operands, dtype)
        common = dict(dtype=dtype, **attributes)
        output = core.forward_roi(op, *exact[:3], **common)
        expected = {
            "output": output,
            **core.backward_roi(op, *exact, **common),
        }
        received = {
            "output": forward(op, exact, dtype, attributes, **options),
            **backward(op, exact, dtype, attributes, **options),
        }
        assert received.keys() == expected.keys()
        for name, array in received.items():
            array, other = np.float64(array), np.float64(expected[name])
            scale = max(1, np.abs(other).max(initial=0))
            allowed = 1e-11 if dtype == "float64" else 2e-6
            allowed = allowed * scale
            if name != "displacement":
                unit = 2 * roi_reference.HALF_UNIT.get(dtype, 0)
                allowed = allowed + 1.01 * unit * np.abs(other)
            error = np.abs(array - other)
            assert (error <= allowed).all(), (name, dtype, error.max())


def check_alone_and_again(op, operands, dtype, attributes):
    """Each result is the same alone, in any order of threads, to the bit."""

    def results(**options):
        made = backward(
            op, operands, dtype, attributes, deterministic=True, **options
        )
        output = forward(op, operands, dtype, attributes, deterministic=True)
        return {
            "output": output.tobytes(),
            **{name: array.tobytes() for name, array in made.items()},
        }

    expected = results()
    assert set(expected) == {"output", *NAMES}
    for name in NAMES:
        alone = results(wanted=(name,))
        assert set(alone) == {"output", name}
        assert alone[name] == expected[name]
    assert set(results(wanted=())) == {"output"}
    if gpu.ON_GPU:
        assert all(results() == expected for _ in range(5))
        return
    try:
        gpu.library().TfDeformEmulatedOrder(1)
        assert results() == expected
        not_deterministic = backward(op, operands, dtype, attributes)
    finally:
        gpu.library().TfDeformEmulatedOrder(0)
    displacement = not_deterministic["displacement"]
    assert displacement.tobytes() == expected["displacement"]


def check_bad_batch_indices(op, attributes, channels):
    """Such ROIs are padding: zeros, and nothing is read out of bounds."""
    bad = [2, 3, 1e9, 1e30, np.inf, -np.inf, np.nan, 0.5, 1.5, -0.5, -1]
    rois = np.zeros((len(bad) + 2, 5))
    rois[:, 3:] = 3
    rois[1:-1, 0] = bad
    rois[-1, 0] = 1
    rng = np.random.default_rng(0)
    outputs = (len(rois), 2, 2, attributes.get("output_dim", channels))
    operands = (
        rng.normal(size=(2, 4, 5, channels)),
        rois,
        rng.normal(size=(len(rois), 2, 2, 2)),
        rng.normal(size=outputs),
    )
    for dtype in core.DTYPES:
        exact = core.rounded(operands, dtype)
        good = [
            exact[0],
            *(array[[0, -1]] for array in exact[1:]),
        ]
        for deterministic in (False, True):
            options = dict(deterministic=deterministic)
            output = forward(op, exact, dtype, attributes, **options)
            assert not output[1:-1].any()
            expected = forward(op, good, dtype, attributes)
            assert output[[0, -1]].tobytes() == expected.tobytes()
            made = backward(op, exact, dtype, attributes, **options)
            expected = backward(op, good, dtype, attributes, **options)
            assert not made["displacement"][1:-1].any()
            received = made["displacement"][[0, -1]]
            assert received.tobytes() == expected["displacement"].tobytes()
            # Summed in another order: a rounding of the type, if unlucky.
            rtol = {
                "float64": 1e-12,
                "float32": 1e-5,
                "float16": 2**-9,
                "bfloat16": 2**-7,
            }[dtype]
            np.testing.assert_allclose(
                np.float64(made["inputs"]),
                np.float64(expected["inputs"]),
                rtol=rtol,
                atol=1e-5,
            )
