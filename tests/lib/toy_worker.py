# SPDX-License-Identifier: Apache-2.0
"""Runs toy units in place of the operators; some of them fail on purpose.

`benchmark_runs_test.py` starts it as the benchmark's worker. The shape says
which fault happens, in the contender "peer". In the shape "built" the other
contender calls the package `tf_deform` of the tree.
"""

import atexit
import os
import pathlib
import re
import sys
import time
from typing import NamedTuple

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))

import numpy as np
import worker
from contenders import Contender, Suite, Unsupported


class Case(str):
    dtype = "float32"

    @classmethod
    def parse(cls, text, dtype, with_mask):
        if not re.fullmatch("[a-z]+", text):
            raise ValueError(f"Expected a toy. Received: {text}")
        return cls(text)


class Operands(NamedTuple):
    inputs: np.ndarray

    @classmethod
    def random(cls, case):
        return cls(np.arange(1, 9, dtype=case.dtype))


class Ours(Contender):
    def __init__(self, case, arrays, setting):
        self.case, self.inputs = case, arrays["inputs"]

    @classmethod
    def prepare(cls, case, operands):
        return operands._asdict()

    def forward(self):
        self.outputs()

    def both(self):
        self.outputs()

    def outputs(self):
        print("libraries print", flush=True)
        if self.case == "built":
            import tf_deform

            return tf_deform.double(self.inputs)
        return 2 * self.inputs

    def gradients(self, kind="both"):
        return {"inputs": np.full_like(self.inputs, 2)}


class Peer(Ours):
    def __init__(self, case, arrays, setting):
        super().__init__(case, arrays, setting)
        if case == "raise":
            raise RuntimeError("no such operator\nat all")
        if case == "lacks":
            raise Unsupported("toys")
        if case == "late":  # after the last result
            atexit.register(os._exit, 9)
        if case == "crash":
            print("illegal memory access", file=sys.stderr, flush=True)
            os._exit(7)
        if case == "hang":
            time.sleep(600)

    def outputs(self):
        wrong = 0.01 * (self.case == "wrong")
        return super().outputs() + np.float32(wrong)


SUITES = {
    "roi": Suite(
        title="Toys",
        case=Case,
        operands=Operands,
        contenders={"tf_deform": (Ours, ()), "peer": (Peer, ())},
        shapes=("right", "wrong", "raise", "lacks", "late", "crash", "hang"),
        quick_shapes=(),
        ratio_to="tf_deform",
        peers=(("peer",),),
        repeats=3,
        memory_repeats=0,
        memory_at_all_threads=True,
    )
}

if __name__ == "__main__":
    worker.CPU_SUITES = SUITES
    worker.main()
