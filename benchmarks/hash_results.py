# SPDX-License-Identifier: Apache-2.0
"""Hashes results of every kind, to show whether a change has changed a bit.

    cd BEFORE && python SCRIPT --out before.txt
    cd AFTER && python SCRIPT --out after.txt
    diff before.txt after.txt

where SCRIPT is the path of this same file in both lines, BEFORE and AFTER are
two checkouts that are built in place (`make install`), and the machine is the
same. The script uses the public functions and layers, the C entry points of the
CUDA kernels, and environment variables, so files may have moved between the two
checkouts.

It prints one line for each case: its name, the SHA-256 of all its results, and
the first digits of each single result's hash. The last line is the hash of all
lines. The names begin with

    cpu/ISA/THREADS     functions and gradients, for each instruction set that
                        this processor has, with 1 and 3 threads
    cuda                the CUDA kernels, emulated on the CPU (compiled once
                        into build/emulated of the checkout)
    portable, xla       functions and gradients in stock TensorFlow, under XLA
    layers              layers with their own branches, and their gradients
    demo                the losses of the demo's first ten training steps

NaNs count as equal whatever their sign and payload: a compiler that exchanges
the operands of a sum changes sign and payload. `--only cpu/avx2/1/roi_align`
runs the cases whose names match. A whole run takes about three minutes of
processor time.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from hash_cases import (
    DIFFERENTIABLE,
    LAYERS,
    cases,
    is_chosen,
    operands,
    pair,
    work_of,
)

ROOT = pathlib.Path.cwd()
DTYPES = ("float16", "bfloat16", "float32", "float64")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
THREADS = (1, 3)
Results = Iterable[tuple[str, Any]]


# -----------------------------------------------------------------------------
# Hashes.


def digest(value: Any) -> str:
    """Returns the SHA-256 of the content of an array or a text."""
    if isinstance(value, str):
        return hashlib.sha256(value.encode()).hexdigest()
    array = np.asarray(value)
    kind = f"{array.dtype} {array.shape}".encode()
    if array.dtype.kind not in "iub":
        # Converts to float64, which holds all numbers of the four types.
        array = array.astype(np.float64)
        array = np.where(np.isnan(array), np.nan, array)
    return hashlib.sha256(kind + array.tobytes()).hexdigest()


def line_of(name: str, results: Results) -> str:
    parts = [(result, digest(value)) for result, value in results]
    whole = hashlib.sha256("".join(part for _, part in parts).encode())
    short = " ".join(f"{result}:{part[:8]}" for result, part in parts)
    return f"{name} {whole.hexdigest()} {short}"


# -----------------------------------------------------------------------------
# Functions: on the CPU, portable, under XLA.


def run_function(
    name: str, dtype: str, implementation: str = "native", xla: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yields output, count, gradients and, of a small case, each one alone.

    The kernels compute a single gradient by another method than all gradients.
    """
    import tensorflow as tf

    import tf_deform

    case = cases()[name]
    coordinates = "float64" if dtype == "float64" else "float32"
    arguments = {
        operand: tf.cast(
            array,
            dtype
            if operand in ("inputs", "kernel", "grad_output")
            else coordinates,
        )
        for operand, array in operands(name).items()
    }
    grad_output = arguments.pop("grad_output")
    function = getattr(tf_deform.ops, f"deformable_{case['op']}")
    attributes = case["attributes"] | {"implementation": implementation}
    if case["op"] == "psroi_pool":
        attributes["return_count"] = True
    all_wanted = [x for x in DIFFERENTIABLE[case["op"]] if x in arguments]

    @tf.function(jit_compile=True)
    def compiled(arguments, grad_output):
        return differentiate(arguments, grad_output, all_wanted)

    def differentiate(arguments, grad_output, wanted):
        sources = [arguments[operand] for operand in wanted]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            made = function(**arguments, **attributes)
            output, *count = made if isinstance(made, tuple) else (made,)
        gradients = tape.gradient(output, sources, grad_output)
        return [output, *count], gradients

    if xla:
        outputs, gradients = compiled(arguments, grad_output)
    else:
        outputs, gradients = differentiate(arguments, grad_output, all_wanted)
    yield from zip(("output", "count"), outputs, strict=False)
    yield from zip(all_wanted, gradients, strict=True)
    if xla or implementation == "portable" or work_of(case) > 1e6:
        return
    for operand in all_wanted:
        _, gradients = differentiate(arguments, grad_output, [operand])
        yield f"{operand}-alone", gradients[0]


def dtypes_of(name: str, isa: str) -> Iterable[str]:
    if isa in ("avx512_bf16", "amx"):  # avx512 but for bfloat16
        return ("bfloat16",) if name.startswith("conv2d") else ()
    return DTYPES


# -----------------------------------------------------------------------------
# CUDA kernels, emulated.

INT64 = ctypes.c_int64


class Shape(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int), ("dims", INT64 * 8)]


class Stream(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("allow_tf32", ctypes.c_bool),
        ("deterministic", ctypes.c_bool),
    ]


def pointers(arrays: list[np.ndarray | None]) -> ctypes.Array:
    """Returns addresses of operands, and zeros for arguments after them."""
    addresses = [None if a is None else a.ctypes.data for a in arrays]
    return (ctypes.c_void_p * 8)(*addresses)


def conv_params(attributes: dict) -> bytes:
    padding = attributes.get("padding", "valid")
    pads = (0, 0, 0, 0)
    if not isinstance(padding, str):
        pads = [*pair(pair(padding)[0]), *pair(pair(padding)[1])]
    numbers = np.array(
        [
            *pair(attributes.get("strides", 1)),
            *pair(attributes.get("dilation_rate", 1)),
            *pads,
            attributes.get("offset_groups", 1),
        ],
        np.int64,
    )
    names = {"valid": 0, "same": 1}.get(str(padding), 2)
    boundary = attributes.get("boundary", "zeros") == "clamp"
    factors = np.zeros(1, np.int64)  # those of the operand `mask`
    words = np.array([names, boundary], np.int32)
    return numbers.tobytes() + words.tobytes() + factors.tobytes()


def psroi_params(attributes: dict) -> bytes:
    pooled = attributes["pooled_size"]
    numbers = [
        attributes["output_dim"],
        *pair(pooled),
        *pair(attributes.get("group_size", pooled)),
        *pair(attributes.get("part_size", pooled)),
        attributes.get("sample_per_part", 4),
    ]
    factors = [attributes["spatial_scale"], attributes.get("trans_std", 0.1)]
    return np.array(factors).tobytes() + np.array(numbers, np.int64).tobytes()


def align_params(attributes: dict) -> bytes:
    numbers = [
        *pair(attributes["pooled_size"]),
        attributes.get("sampling_ratio", 0),
    ]
    factors = [attributes["spatial_scale"], attributes.get("gamma", 0.1)]
    return np.array(factors).tobytes() + np.array(numbers, np.int64).tobytes()


PARAMS: dict[str, Callable[[dict], bytes]] = {
    "conv2d": conv_params,
    "psroi_pool": psroi_params,
    "roi_align": align_params,
}
NAMES = {
    "conv2d": "TfDeformDeformableConv2D",
    "psroi_pool": "TfDeformDeformablePSROIPool",
    "roi_align": "TfDeformDeformableROIAlign",
}


@functools.cache
def emulated_core() -> ctypes.CDLL:
    """Loads the core whose CUDA kernels are compiled for the host."""
    path = next((ROOT / "tests").rglob("emulated_nvcc.py"))
    spec = importlib.util.spec_from_file_location("emulated_nvcc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = ROOT / "build" / "emulated"
    environment = {"TF_DEFORM_NVCC": module.install(folder), "CXXFLAGS": "-O0"}
    library = folder / "hashed.so"
    subprocess.run(
        [sys.executable, "cc/build.py", "--output", library]
        + ["--objects", folder / "temp"],
        env=os.environ | environment,
        stdout=sys.stderr,
        check=True,
    )
    return ctypes.CDLL(str(library))


def call(name: str, *arguments: Any) -> None:
    message = ctypes.create_string_buffer(512)
    if getattr(emulated_core(), name)(*arguments, message, INT64(512)) != 0:
        raise RuntimeError(f"{name}: {message.value.decode()}")


def scratch(name: str, *arguments: Any) -> np.ndarray:
    function = getattr(emulated_core(), name)
    function.restype = INT64
    return aligned((function(*arguments),), np.uint8)


def aligned(shape: tuple, dtype: Any) -> np.ndarray:
    """Returns memory of bytes 0xFF, aligned to 256 bytes."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.full(size + 256, 0xFF, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size].view(dtype).reshape(shape)


def run_cuda(
    name: str, dtype: str, tf32: bool, deterministic: bool
) -> Iterator[tuple[str, Any]]:
    """Yields output, count and gradients of the emulated kernels."""
    import ml_dtypes

    case = cases()[name]
    op = NAMES[case["op"]]
    types = dict.fromkeys(("inputs", "kernel", "grad_output"), dtype)
    types = {k: getattr(ml_dtypes, v, v) for k, v in types.items()}
    coordinates = "float64" if dtype == "float64" else "float32"
    stored = {}
    for operand, array in operands(name).items():
        stored[operand] = aligned(array.shape, types.get(operand, coordinates))
        stored[operand][...] = array
    grad_output = stored.pop("grad_output")
    slots = DIFFERENTIABLE[case["op"]]
    order = slots if case["op"] == "conv2d" else (slots[0], "rois", slots[1])

    # Validate writes sizes behind the attributes, so there is room for them.
    params = PARAMS[case["op"]](case["attributes"])
    params = ctypes.create_string_buffer(params, len(params) + 128)
    shapes = [
        ctypes.byref(
            Shape(stored[operand].ndim, (INT64 * 8)(*stored[operand].shape))
        )
        if operand in stored
        else None
        for operand in order
    ]
    call(f"{op}Validate", params, *shapes, None)
    number = DTYPES.index(dtype)
    given = pointers([stored.get(operand) for operand in order])
    stream = ctypes.byref(Stream(None, tf32, deterministic))

    output = aligned(grad_output.shape, grad_output.dtype)
    count = aligned(grad_output.shape, np.float32)
    results = [ctypes.c_void_p(output.ctypes.data)]
    if case["op"] == "psroi_pool":
        results.append(ctypes.c_void_p(count.ctypes.data))
    memory = scratch(f"{op}CudaWorkspaceBytes", params, number)
    call(
        f"{op}CudaForward",
        *(params, number, given, ctypes.c_void_p(memory.ctypes.data)),
        *(*results, stream),
    )
    yield "output", output
    if case["op"] == "psroi_pool":
        yield "count", count

    gradients = [
        aligned(stored[slot].shape, stored[slot].dtype)
        if slot in stored
        else None
        for slot in slots
    ]
    wanted = pointers(gradients)
    memory = scratch(
        f"{op}CudaBackwardWorkspaceBytes", params, number, wanted, stream
    )
    call(
        f"{op}CudaBackward",
        *(params, number, given, ctypes.c_void_p(grad_output.ctypes.data)),
        *(ctypes.c_void_p(memory.ctypes.data), wanted, stream),
    )
    for slot, gradient in zip(slots, gradients, strict=True):
        if gradient is not None:
            yield slot, gradient


# -----------------------------------------------------------------------------
# Layers.

POLICIES = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


def run_layer(index: int, policy: str, how: str) -> Iterator[tuple[str, Any]]:
    """Yields configuration, outputs, gradients of operands and weights.

    `how` is "native", "portable" or "xla".
    """
    import tensorflow as tf

    import tf_deform

    kind, arguments, shapes = LAYERS[index]
    rng = np.random.default_rng(index)
    layer = getattr(tf_deform.layers, kind)(
        **arguments,
        name="layer",
        dtype=policy,
        implementation="portable" if how == "portable" else "native",
    )
    given = {}
    for name, shape in shapes.items():
        if name == "rois":
            shape = (*shape, 4)
            corners = np.sort(rng.uniform(-2, 18, shape).reshape(-1, 2, 2), 1)
            image = rng.integers(-1, 2, (len(corners), 1))
            array = np.concatenate([image, corners.reshape(-1, 4)], 1)
        else:
            array = rng.normal(size=shape)
        given[name] = tf.constant(array, layer.variable_dtype)
    layer.build(**{f"{x}_shape": v.shape for x, v in given.items()})
    for weight in layer.weights:
        seed = zlib.crc32(weight.name.encode())
        values = np.random.default_rng(seed).normal(size=weight.shape)
        weight.assign(0.3 * values)
    sources = [given[name] for name in given if name != "rois"]

    @tf.function(jit_compile=True)
    def compiled():
        return differentiate()

    def differentiate():
        with tf.GradientTape() as tape:
            tape.watch(sources)
            outputs = layer(**given)
            # Neighbours get different weights, so that no gradients cancel out.
            ramp = tf.cast(tf.range(tf.size(outputs)) % 17 - 7, outputs.dtype)
            loss = tf.reduce_sum(outputs * tf.reshape(ramp, outputs.shape))
        weights = [weight.value for weight in layer.trainable_weights]
        return outputs, tape.gradient(loss, [*sources, *weights])

    outputs, gradients = compiled() if how == "xla" else differentiate()
    yield "config", json.dumps(layer.get_config(), sort_keys=True, default=str)
    yield "outputs", outputs
    names = [name for name in given if name != "rois"]
    names += [weight.name for weight in layer.trainable_weights]
    yield from zip(names, gradients, strict=True)


# -----------------------------------------------------------------------------
# The demo's first steps.

DEMOS = (("segment", "dcn-v1"), ("segment", "dcn-v2"), ("detect", "both"))


def run_demo(task: str, arm: str) -> Iterator[tuple[str, Any]]:
    """Yields the losses of ten training steps on 64 scenes of digits."""
    from tf_deform import data
    from tf_deform.demo import _digit_models, _digit_scenes, _digits

    build, read = {
        "segment": (_digit_models.build_segmenter, data.segmentation_batches),
        "detect": (_digit_models.build_detector, data.detection_batches),
    }[task]
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),
    ):
        scenes = pathlib.Path(folder, "scenes")
        _digit_scenes.write(scenes, train=64, val=0, test=0)
        train = _digit_scenes.read(scenes / "train", task)
        model = build(arm, 0)
        model.compile(optimizer=_digits.make_optimizer(10))
        losses = [
            model.train_on_batch(*batch)
            for batch in read(train, 64, 32, augment=False).take(10)
        ]
    yield "losses", np.array(losses)


# -----------------------------------------------------------------------------
# Processes.


def environment(**variables: Any) -> dict[str, str]:
    """Returns the environment in which the checkout's package is imported."""
    path = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    variables = {name: str(value) for name, value in variables.items()}
    return os.environ | {"PYTHONPATH": path} | variables


def is_available(isa: str) -> bool:
    """Returns whether the processor has the instruction set."""
    core = next((ROOT / "tf_deform").rglob("*core.so"))
    script = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1])"
    script += ".TfDeformInstructionSet; f.restype = ctypes.c_char_p"
    found = subprocess.run(
        [sys.executable, "-c", f"{script}; print(f().decode())", core],
        env=environment(TF_DEFORM_MAX_ISA=isa),
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip() == isa


def groups() -> Iterator[tuple[str, dict[str, Any], list[tuple]]]:
    """Yields cases that share a process: prefix, environment, cases.

    A case is a name, a function of this file, and its arguments.
    """
    for isa in filter(is_available, INSTRUCTION_SETS):
        for threads in THREADS:
            variables = {
                "TF_DEFORM_MAX_ISA": isa,
                "TF_NUM_INTRAOP_THREADS": threads,
            }
            yield (
                f"cpu/{isa}/{threads}",
                variables,
                [
                    (f"{name}/{dtype}", "run_function", name, dtype)
                    for name in cases()
                    for dtype in dtypes_of(name, isa)
                ],
            )
    small = [name for name in cases() if work_of(cases()[name]) < 3e5]
    yield (
        "cuda",
        {},
        [
            (
                f"{name}/{dtype}{'/tf32' * tf32}{'/ordered' * ordered}",
                *("run_cuda", name, dtype, tf32, ordered),
            )
            for name in small
            if work_of(cases()[name]) > 0
            for dtype in DTYPES
            for tf32 in (False, True)[: 1 + name.startswith("conv2d")]
            for ordered in (False, True)
            if not tf32 or (dtype == "float32" and not ordered)
        ],
    )
    two = {"TF_NUM_INTRAOP_THREADS": 2, "TF_DETERMINISTIC_OPS": 1}
    yield (
        "portable",
        two,
        [
            (f"{name}/{dtype}", "run_function", name, dtype, "portable")
            for name in small
            for dtype in DTYPES
            if dtype == "float32" or is_chosen(name)
        ],
    )
    yield (
        "xla",
        two,
        [
            (f"{name}/{dtype}", "run_function", name, dtype, "native", True)
            for name in filter(is_chosen, cases())
            for dtype in ("float32", "bfloat16")
        ],
    )
    yield (
        "layers",
        two,
        [
            (
                f"{index}-{LAYERS[index][0]}/{policy}/{how}",
                *("run_layer", index, policy, how),
            )
            for index in range(len(LAYERS))
            for policy in POLICIES
            for how in ("native", "portable", "xla")
            if how == "native" or policy == "float32"
        ],
    )
    yield "demo", two, [("-".join(x), "run_demo", *x) for x in DEMOS]


def work(chosen: list[tuple]) -> None:
    """Prints the lines of one process' cases."""
    for name, function, *arguments in chosen:
        print(line_of(name, globals()[function](*arguments)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Hashes the results of the checkout in this folder."
    )
    parser.add_argument("--out", type=pathlib.Path, help="file for the lines")
    parser.add_argument(
        "--only", type=re.compile, help="cases whose names match this pattern"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(json.load(sys.stdin))
    lines = []
    for prefix, variables, named in groups():
        chosen = [(f"{prefix}/{name}", *rest) for name, *rest in named]
        if arguments.only:
            chosen = [case for case in chosen if arguments.only.search(case[0])]
        if not chosen:
            continue
        print(f"{prefix}: {len(chosen)} cases", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, __file__, "--work"],
            input=json.dumps(chosen),
            env=environment(**variables),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            sys.exit(done.stderr)
        lines += done.stdout.splitlines()
    lines.append(f"total {digest(chr(10).join(lines))}")
    text = "".join(f"{line}\n" for line in lines)
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
