# SPDX-License-Identifier: Apache-2.0
"""Compares contenders' results, then times them in random turns.

`agree` compares results with an oracle's. A clock turns each call into a
sampler, a function that makes the call and returns its milliseconds, and
`take_turns` draws samples from all samplers. The clock is the host's
(`HostClock`) or a GPU's (`CudaClock`).
"""

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Call = Callable[[], Any]
Sampler = Callable[[], float]  # returns milliseconds

# Largest difference allowed anywhere, in units of the expected root mean
# square. One sample read from a wrong pixel changes a result by about 0.002 or
# more in the shapes here, so float32's bound finds such a sample with room on
# both sides. The mantissas of tf32 and float16 have the same length.
TOLERANCES = {
    "float64": 1e-9,
    "float32": 1e-4,
    "tf32": 3e-2,
    "float16": 3e-2,
    "bfloat16": 2e-1,
}

# A call that takes longer needs no untimed call before it.
LONG_CALL_MS = 500.0
# A sample on a GPU has as many launches as take this time.
SAMPLE_MS = 1.0
MOST_LAUNCHES = 200
WARM_UP_S = 0.15  # seconds; an idle GPU's clock is low


def disagreement(result: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, in units of the root mean square.

    The result is infinite if one of the arrays is not finite.

    Raises:
        ValueError: if the shapes differ.
    """
    if result.shape != expected.shape:
        raise ValueError(
            f"Expected a result of shape {expected.shape}. "
            f"Received: {result.shape}"
        )
    if not expected.size:
        return 0.0
    result = result.astype(np.float64)
    expected = expected.astype(np.float64)
    if not (np.isfinite(result).all() and np.isfinite(expected).all()):
        return math.inf
    scale = np.sqrt(np.mean(expected**2))
    # An expected result that is zero throughout has no scale of its own.
    return float(np.max(np.abs(result - expected)) / (scale or 1.0))


def agree(
    results: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: float,
) -> tuple[dict[str, float], str | None]:
    """Compares results by name; returns (disagreements, error or None)."""
    differences = {
        name: disagreement(result, expected[name])
        for name, result in results.items()
    }
    wrong = [
        f"{name} by {value:.2g}"
        for name, value in differences.items()
        if not value <= tolerance
    ]
    if not wrong:
        return differences, None
    return differences, f"differs from the baseline: {', '.join(wrong)}"


class HostClock:
    """Times calls that return when their work is complete.

    The untimed call before each timed call brings a contender's own threads and
    data back, after another contender used the processors and the caches. A
    call that is known to be long needs no untimed call.
    """

    def samplers(self, calls: Mapping[Any, Call]) -> dict[Any, Sampler]:
        return {key: self._sampler(call) for key, call in calls.items()}

    def _sampler(self, call: Call) -> Sampler:
        latest = 0.0

        def sample() -> float:
            nonlocal latest
            if latest < LONG_CALL_MS:
                call()
            start = time.perf_counter()
            call()
            latest = 1e3 * (time.perf_counter() - start)
            return latest

        return sample

    def describe(self, key: Any) -> dict[str, Any]:
        """Returns facts about a row's samples for the row's reader."""
        del key
        return {}

    def synchronize(self) -> None:
        """Waits for all work, and fails if some of it has failed."""

    def free(self) -> None:
        """Frees memory that no contender holds any longer."""
        gc.collect()


class CudaClock(HostClock):
    """Times launches by a GPU's events, as replays of CUDA graphs.

    No launch of a graph waits for the host. If one call cannot be captured, the
    host launches all calls.
    """

    def __init__(self):
        self._mode = "launches"
        self._launches: dict[Any, int] = {}

    def samplers(self, calls: Mapping[Any, Call]) -> dict[Any, Sampler]:
        calls = self._capture(calls)
        started = time.monotonic()
        while True:  # runs at least once
            for key, call in calls.items():
                once = max(self._elapsed_ms(call, 1), 1e-6)
                wanted = math.ceil(SAMPLE_MS / once)
                self._launches[key] = min(MOST_LAUNCHES, wanted)
            if time.monotonic() - started >= WARM_UP_S:
                break
        return {
            key: functools.partial(self._sample, call, self._launches[key])
            for key, call in calls.items()
        }

    def _capture(self, calls: Mapping[Any, Call]) -> Mapping[Any, Call]:
        self._mode = "launches"
        try:
            graphs = {key: self._graph(call) for key, call in calls.items()}
        except Exception as error:
            print(f"no CUDA graphs: {first_line(error)}", flush=True)
            self.synchronize()
            return calls
        self._mode = "graph"
        return graphs

    def _graph(self, call: Call) -> Call:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _sample(self, call: Call, launches: int) -> float:
        return self._elapsed_ms(call, launches) / launches

    def _elapsed_ms(self, call: Call, launches: int) -> float:
        """Times all launches, one after the other, until all have ended."""
        import torch

        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def describe(self, key: Any) -> dict[str, Any]:
        return {"mode": self._mode, "launches": self._launches[key]}

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def free(self) -> None:
        import torch

        super().free()
        torch.cuda.empty_cache()


def take_turns(
    samplers: Mapping[Any, Sampler], repeats: int, seed: int = 0
) -> dict[Any, list[float]]:
    """Returns milliseconds: one sample of each per round, in random order.

    A disturbance of the machine then affects neighbours alike, and no contender
    always runs after the same other contender, whose data in the caches and
    whose threads that still look for work would affect it.
    """
    samples: dict[Any, list[float]] = {key: [] for key in samplers}
    order = list(samplers)
    orders = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            orders.shuffle(order)
            for key in order:
                samples[key].append(samplers[key]())
    finally:
        gc.enable()
    return samples


def medians(
    calls: Mapping[Any, Call], repeats: int, untimed: int = 0
) -> dict[Any, float]:
    """Returns the median milliseconds of calls that take turns.

    Each call is made `untimed` times before: the first calls trace, compile and
    allocate.
    """
    for call in calls.values():
        for _ in range(untimed):
            call()
    samples = take_turns(HostClock().samplers(calls), repeats)
    return {key: statistics.median(times) for key, times in samples.items()}


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its text."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"
