# SPDX-License-Identifier: Apache-2.0
"""Installs the wheel beside every supported TensorFlow and Keras, and tests it.

    make wheel-test
    python tests/wheel/matrix.py --wheel dist/*linux*.whl --only 2.15 2.21

Every row is a fresh virtual environment without a compiler on its PATH; it is
removed when its tests are over. The result is a table, which
docs/compatibility.md shows, and exit status 1 if a row failed. A Python that is
not on this machine is a row that says so; there pip alone tells whether the
wheel's requirements can be met.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(TESTS)
TIMEOUT = 1800  # seconds, of one row's tests
_SHOWN = 20_000  # characters of the log of a row that failed
# What the tests need besides the wheel.
PACKAGES = ("pytest>=8,<10", "pytest-xdist>=3.6,<4", "h5py")
# The tests that tell whether an installed package works.
TELLING = ("tests/wheel", "tests/keras", "tests/training")
XLA = ("tests/xla/xla_test.py",)
ADDONS = ("tests/addons",)


@dataclasses.dataclass(frozen=True)
class Row:
    """Describes one environment."""

    python: str
    tensorflow: str
    keras: str = ""  # a requirement; empty: the newest that pip finds
    # "tensorflow-cpu" is what the wheel's metadata cannot ask for.
    distribution: str = "tensorflow-cpu"
    packages: tuple[str, ...] = ()
    extras: str = ""  # of the wheel, such as "[onnx]"
    environment: tuple[tuple[str, str], ...] = ()
    tests: tuple[str, ...] = TELLING
    pure: bool = False  # the wheel without libraries

    @property
    def name(self) -> str:
        words = [f"TensorFlow {self.tensorflow}"]
        words.append(self.keras or "newest Keras")
        words.append(f"Python {self.python}")
        words += [
            *filter(None, [self.extras]),
            *(f"{k}={v}" for k, v in self.environment),
        ]
        return ", ".join(words + ["no libraries"] * self.pure)

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower())


LEGACY = (("TF_USE_LEGACY_KERAS", "1"),)
# Keras 3.5 is the floor of this package; TensorFlow 2.20 requires 3.10, and
# 2.21 requires 3.12.
ROWS = (
    Row(
        "3.11",
        "2.15.1",
        distribution="tensorflow",
        packages=("scikit-learn", "scikit-image"),  # of the example
        extras="[addons,onnx,litert]",
        tests=TELLING + ADDONS,
    ),
    Row("3.9", "2.15.1"),
    Row("3.11", "2.16.2", "keras==3.5.0"),
    Row("3.9", "2.16.2"),
    Row(
        "3.11",  # on 3.12, tf-keras 2.16 makes no weights after a seed is set
        "2.16.2",
        distribution="tensorflow",  # tf-keras requires it
        packages=("tf-keras==2.16.0",),
        environment=LEGACY,
    ),
    Row("3.11", "2.17.1", "keras==3.5.0", tests=TELLING + XLA),
    Row("3.12", "2.17.1"),
    Row("3.11", "2.18.1", "keras==3.5.0", tests=TELLING + XLA),
    Row("3.10", "2.18.1", distribution="tensorflow", extras="[litert]"),
    Row("3.11", "2.19.1", "keras==3.5.0", tests=TELLING + XLA),
    Row("3.12", "2.19.1"),
    Row("3.11", "2.20.0", "keras==3.10.0", tests=TELLING + XLA),
    Row("3.13", "2.20.0"),
    Row("3.11", "2.21.0", "keras==3.12.0", tests=TELLING + XLA),
    Row("3.13", "2.21.0", distribution="tensorflow"),
    Row(
        "3.11",
        "2.21.0",
        distribution="tensorflow",
        packages=("tf-keras==2.21.0",),
        environment=LEGACY,
    ),
    Row("3.12", "2.21.0", pure=True),
)


def find_python(version: str) -> str | None:
    """Returns the path of a Python of a minor version, or None."""
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    named = shutil.which(f"python{version}")
    for path in filter(None, [named, *_by_pyenv(pyenv, version)]):
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        result = subprocess.run(
            [path, "-c", code], capture_output=True, text=True, check=False
        )
        if result.stdout.strip() == version:
            return path
    return None


def _by_pyenv(root: str, version: str) -> list[str]:
    return sorted(
        glob.glob(os.path.join(root, "versions", f"{version}.*/bin/python"))
    )


def run_row(row: Row, wheel: str, out: str) -> dict[str, object]:
    """Runs one row in a fresh environment; returns what is found."""
    python = find_python(row.python)
    if python is None:
        return _resolve_alone(row, wheel)
    found: dict[str, object] = {"name": row.name}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.path.join(folder, "venv")
        _run([python, "-m", "venv", environment])
        bin_folder = os.path.join(environment, "bin")
        python = os.path.join(bin_folder, "python")
        install = [python, "-m", "pip", "install", "--quiet"]
        install.append("--disable-pip-version-check")
        _run([*install, *_requirements(row), *PACKAGES])
        begun = time.monotonic()
        # Where another distribution than "tensorflow" gives the module, pip
        # would install TensorFlow a second time.
        alone = ["--no-deps"]
        if row.distribution == "tensorflow":
            # For an extra's sake, pip would take a newer TensorFlow.
            alone = _requirements(row)
        _run([*install, *alone, wheel + row.extras])
        found["install_s"] = round(time.monotonic() - begun, 1)
        found["versions"] = _versions(python)
        found["first_call_s"] = _time_first_call(row, python)
        found.update(_test(row, python, folder, out))
        found["bits"] = _bits(os.path.join(out, row.slug))
        before = _files_of(environment)
        _run([python, "-m", "pip", "uninstall", "--yes", "tf-deform"])
        found["left"] = [path for path in before if os.path.exists(path)]
    return found


def _requirements(row: Row) -> list[str]:
    wanted = [f"{row.distribution}=={row.tensorflow}", *row.packages]
    return wanted + [row.keras] * bool(row.keras)


def _files_of(environment: str) -> list[str]:
    """Returns all paths of an environment that carry the package's name."""
    pattern = os.path.join(environment, "**", "tf[-_]deform*")
    return [
        path
        for path in glob.glob(pattern, recursive=True)
        if "__pycache__" not in path
    ]


def _versions(python: str) -> str:
    code = "import importlib.metadata as m\n"
    code += "for d in m.distributions(): print(d.metadata['Name'], d.version)"
    wanted = "tensorflow([-_]cpu|-addons)?|keras|tf[-_]keras|numpy"
    lines = _run([python, "-c", code]).splitlines()
    return ", ".join(sorted(x for x in lines if re.match(f"({wanted}) ", x)))


_FIRST_CALL = """
import time
import tensorflow as tf
begun = time.monotonic()
import tf_deform
layer = tf_deform.layers.DeformableConv2D(8, 3)
layer(tf.ones((1, 32, 32, 3)))
print(round(time.monotonic() - begun, 2))
"""


def _time_first_call(row: Row, python: str) -> float:
    """Returns the seconds of import and first call, without TensorFlow's."""
    environment = {**os.environ, **dict(row.environment)}
    return float(_run([python, "-c", _FIRST_CALL], environment).split()[-1])


def _bits(folder: str) -> str:
    """Returns a short hash of all results, which all versions share."""
    names = sorted(glob.glob(os.path.join(folder, "*.sha256")))
    content = "".join(open(name).read() for name in names)
    return hashlib.sha256(content.encode()).hexdigest()[:8] if names else ""


def _test(row: Row, python: str, folder: str, out: str) -> dict[str, object]:
    """Runs the tests of a row on the installed package, without a compiler."""
    # The tests lie elsewhere, so that they import what is installed.
    tests = os.path.join(folder, "tests")
    shutil.copytree(TESTS, tests)
    shutil.copy(os.path.join(ROOT, "pyproject.toml"), folder)
    for name in ("examples", "docs"):
        shutil.copytree(os.path.join(ROOT, name), os.path.join(folder, name))
    results = os.path.join(folder, "results.xml")
    environment = {
        "HOME": folder,
        "PATH": os.path.dirname(python),
        "TF_DEFORM_TEST_INSTALLED": json.dumps(
            {"tensorflow": row.tensorflow, "native": not row.pure}
        ),
        "TF_DEFORM_TEST_OUT": os.path.join(out, row.slug),
        **dict(row.environment),
    }
    begun = time.monotonic()
    command = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-q"]
    command += ["-p", "no:cacheprovider", f"--junitxml={results}", *row.tests]
    try:
        result = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        log, status = result.stdout, result.returncode
    except subprocess.TimeoutExpired as error:
        log, status = str(error.stdout), -1
    with open(os.path.join(out, f"{row.slug}.log"), "w") as file:
        file.write(log)
    if status:  # Where this runs, the file may be gone when one looks for it.
        print(f"\n{log[-_SHOWN:]}", flush=True)
    found: dict[str, object] = {"test_s": round(time.monotonic() - begun)}
    found["status"] = status
    if os.path.exists(results):
        suite = xml.etree.ElementTree.parse(results).getroot()[0]
        counts = {
            name: int(suite.get(name, 0))
            for name in ("tests", "failures", "errors", "skipped")
        }
        bad = counts["failures"] + counts["errors"]
        found["passed"] = counts["tests"] - bad - counts["skipped"]
        found["failed"] = bad
        found["skipped"] = counts["skipped"]
        found["reasons"] = sorted(
            {skip.get("message", "") for skip in suite.iter("skipped")}
        )
    return found


def _resolve_alone(row: Row, wheel: str) -> dict[str, object]:
    """Asks pip whether an absent Python could meet the requirements."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "install", "--dry-run"]
        command += ["--quiet", "--target", folder, "--only-binary=:all:"]
        command += [f"--python-version={row.python}", wheel + row.extras]
        command += _requirements(row)
        result = subprocess.run(
            command, capture_output=True, text=True, check=False
        )
    said = result.stderr.strip().splitlines()
    return {
        "name": row.name,
        "versions": f"Python {row.python} is not here; pip "
        + ("resolves" if result.returncode == 0 else f"fails: {said[-1:]}"),
        "status": result.returncode,
    }


def _run(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> str:
    result = subprocess.run(
        command,
        env=environment,
        cwd=tempfile.gettempdir(),  # not this tree, whose package would win
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"Expected `{' '.join(command)}` to run. Received:\n{result.stdout}"
        )
    return result.stdout


def table(rows: Sequence[dict[str, object]]) -> str:
    """Returns the rows as Markdown."""
    lines = ["| environment | installed | passed | failed | skipped | bits |"]
    lines.append("|---|---|---:|---:|---:|---|")
    for row in rows:
        cells = [row["name"], row.get("versions", row.get("error", ""))]
        cells += [
            row.get(k, "") for k in ("passed", "failed", "skipped", "bits")
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons = sorted({r for row in rows for r in row.get("reasons", [])})
    return "\n".join([*lines, "", "Skipped:", "", *(f"- {r}" for r in reasons)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests the wheel.")
    parser.add_argument("--wheel", help="default: the one in dist")
    parser.add_argument("--pure", help="the wheel without libraries")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="parts of rows' names, as in tensorflow-2.21.0-keras-3.12.0",
    )
    parser.add_argument("--out", default=os.path.join(ROOT, "runs", "wheel"))
    arguments = parser.parse_args()
    dist = os.path.join(ROOT, "dist")
    wheel = arguments.wheel or _newest(os.path.join(dist, "*linux*.whl"))
    pure = arguments.pure or _newest(os.path.join(dist, "*none-any.whl"))
    wheel, pure, out = map(os.path.abspath, (wheel, pure, arguments.out))
    os.makedirs(out, exist_ok=True)
    found = []
    for row in ROWS:
        if arguments.only and not any(x in row.slug for x in arguments.only):
            continue
        print(row.name, end=": ", flush=True)
        try:
            made = run_row(row, pure if row.pure else wheel, out)
        except RuntimeError as error:
            made = {"name": row.name, "error": str(error)[-2000:], "status": 1}
        found.append(made)
        print({k: v for k, v in made.items() if k != "name"}, flush=True)
        with open(os.path.join(out, "results.json"), "w") as file:
            json.dump(found, file, indent=1)
        with open(os.path.join(out, "table.md"), "w") as file:
            file.write(table(found) + "\n")
    bits = {row["bits"] for row in found if row.get("bits")}
    if len(bits) > 1:
        print(f"Expected all versions to compute the same bits: {bits}")
    failed = any(row["status"] or row.get("left") for row in found)
    return int(failed or len(bits) > 1)


def _newest(pattern: str) -> str:
    paths = sorted(glob.glob(pattern), key=os.path.getmtime)
    if not paths:
        sys.exit(f"Expected a wheel. Received: no {pattern}. Run `make wheel`.")
    return paths[-1]


if __name__ == "__main__":
    sys.exit(main())
