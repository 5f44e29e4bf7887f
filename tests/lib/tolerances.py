# SPDX-License-Identifier: Apache-2.0
"""Lists the errors that tests allow, by purpose and type.

Every table gives a `compare.Tolerance` for the name of the type of a call's
values. Errors are shares of the largest number expected, unless a comment says
otherwise.
"""

from compare import Tolerance


def _shares(**shares: float) -> dict[str, Tolerance]:
    return {dtype: Tolerance(share) for dtype, share in shares.items()}


# Convolution against a float64 computation on the same rounded operands. For
# the 16-bit types the error is four units of the last place. The same
# tolerances hold for the layers.
FORWARD = _shares(
    float64=1e-12, float32=1e-5, float16=4 * 2**-11, bfloat16=4 * 2**-8
)
GRADIENT = _shares(
    float64=1e-9, float32=3e-4, float16=4 * 2**-11, bfloat16=4 * 2**-8
)

# The core's convolution against float64, as a share of 1 if all numbers
# expected are smaller.
CORE_CONV2D = {
    dtype: Tolerance(share, at_least=1)
    for dtype, share in {
        "float64": 1e-9,
        "float32": 1e-5,
        "float16": 2e-3,
        "bfloat16": 1.6e-2,
    }.items()
}

# ROI pooling against float64. The 16-bit types are summed in float32 and
# rounded once: half a unit of the last place, as a share of each number,
# besides the error of float32.
HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
POOLING = {
    "float64": Tolerance(1e-9, at_least=1),
    "float32": Tolerance(1e-5, at_least=1),
    **{
        dtype: Tolerance(1e-5, at_least=1, of_each=1.01 * unit)
        for dtype, unit in HALF_UNIT.items()
    },
}

# The portable ops against the native ops: both sum in another order, and round
# 16-bit results once.
PORTABLE = _shares(float64=1e-12, float32=1e-5, float16=2**-10, bfloat16=2**-7)
PORTABLE_GRADIENT = {
    dtype: Tolerance(30 * tolerance.of_largest)
    for dtype, tolerance in PORTABLE.items()
}

# Kernels of a GPU against float64 on the CPU; TF32 keeps 10 bits of both
# factors.
GPU = _shares(
    float64=1e-9, float32=1e-4, float16=4 * 2**-11, bfloat16=4 * 2**-8
)
GPU_TF32 = Tolerance(8 * 2**-11)

# Float32 sums in another order, as in other runtimes.
ANOTHER_ORDER = Tolerance(1e-5)
