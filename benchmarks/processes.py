# SPDX-License-Identifier: Apache-2.0
"""Starts child processes, waits for them, and ends them with their children."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "worker.py")


@contextlib.contextmanager
def start(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Starts a program; ends it and all its children afterwards."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """Ends a program that `start` has started, with all its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_program(
    command: list[str], timeout: float, **options: Any
) -> tuple[int | None, str]:
    """Returns the exit status, None if it took too long, and its output."""
    with start(command, stdin=subprocess.DEVNULL, **options) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            kill(process)
            return None, process.communicate()[0]


def worker_environment(job: dict[str, Any]) -> dict[str, str]:
    """Returns the environment of a child process."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if job["device"] == "cuda":
        on_gpu = job["torch_device"] == "cuda"
        environment |= {"TF_DEFORM_TEST_GPU": str(int(on_gpu))}
        if job["core"]:
            environment |= {"TF_DEFORM_CORE": job["core"]}
        return environment
    threads = str(job["threads"])
    environment |= {
        "CUDA_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_ENABLE_ONEDNN_OPTS": "1",
    }
    if job["mode"] == "memory":
        # Returns large blocks to the system when they are freed, instead of to
        # a pool whose size depends on earlier calls.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    if "tree" in job:
        # The folders come before installed packages.
        path = os.environ.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [job["tree"], path])
        )
    return environment


def run_worker(
    job: dict[str, Any], timeout: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Runs one child process; returns its results and its failure."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        status, output = run_program(
            [sys.executable, WORKER, json.dumps(job)],
            timeout,
            stderr=log,
            env=worker_environment(job),
        )
        last = last_lines(log)
    results = []
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last may be cut
            results.append(json.loads(line))
    if status == 0:
        return results, None
    if status is None:
        return results, f"not finished after {timeout:g} s"
    print(*last, sep="\n", file=sys.stderr, flush=True)
    return results, f"the process ended with exit status {status}: {last[-1]}"


def last_lines(log: IO[str]) -> list[str]:
    """Returns the end of a program's output, at least one line."""
    log.seek(0)
    return log.read().strip().splitlines()[-20:] or ["no output"]


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
