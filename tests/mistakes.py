# SPDX-License-Identifier: Apache-2.0
"""Makes mistakes in the sources; the tests must find each of them.

    python tests/mistakes.py               all (hours: it compiles for many)
    python tests/mistakes.py --list
    python tests/mistakes.py --only layer  those whose names begin so

A mistake is a text of the product (`cc/`, `tf_deform/`), what it becomes, and
the test files of which one has to fail. The text is looked for in all sources
and has to be there once, however it is spaced; test files are found by name. So
files may move, and where a text changes, `mistakes_test.py` says which entry
has to change with it.

The command works in a copy of the checkout in `build/mistakes`, in which it
keeps what was compiled. For every mistake it prints the test that found it, and
it ends with 1 if a mistake was not found. A test that fails without any mistake
looks as if it had found one: `make test` comes first.
"""

import argparse
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable

from mistake_list import MISTAKES, Mistake

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mistakes"
SOURCES = [
    *("cc/**/*.h", "cc/**/*.cc", "cc/**/*.cu", "cc/**/*.py"),
    "tf_deform/**/*.py",
]


@functools.cache
def read_sources() -> dict[pathlib.Path, str]:
    """Returns the product's sources by their paths from the root."""
    return {
        path.relative_to(ROOT): path.read_text()
        for pattern in SOURCES
        for path in sorted(ROOT.glob(pattern))
    }


def find(mistake: Mistake) -> list[tuple[pathlib.Path, re.Match]]:
    """Returns the places of a mistake's text, in any spacing."""
    words = map(re.escape, mistake.old.split())
    pattern = re.compile(r"\s+".join(words))
    return [
        (path, match)
        for path, text in read_sources().items()
        for match in pattern.finditer(text)
    ]


def find_tests(mistake: Mistake) -> list[pathlib.Path]:
    """Returns the paths of the test files from the root."""
    found = [list((ROOT / "tests").rglob(f"{x}.py")) for x in mistake.tests]
    if any(len(paths) != 1 for paths in found):
        raise ValueError(
            f"Expected one file of each of {mistake.tests}, of {mistake.name}. "
            f"Received: {found}"
        )
    return [path.relative_to(ROOT) for (path,) in found]


def copy_checkout() -> None:
    """Brings the copy of the sources up to date."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.check_output(command, cwd=ROOT)
    wanted = {name for name in os.fsdecode(listed).split("\0") if name}
    record = WORK / "build" / "copied.txt"
    before = record.read_text().split("\n") if record.exists() else ()
    for name in set(before) - wanted:
        (WORK / name).unlink(missing_ok=True)
    wanted = {name for name in wanted if (ROOT / name).is_file()}
    copy(wanted)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("\n".join(sorted(wanted)))


def copy_built() -> None:
    """Replaces the libraries, into which the last mistake was compiled."""
    copy(
        str(path.relative_to(ROOT))
        for pattern in ("*.so", "_build_info.py")
        for path in (ROOT / "tf_deform").glob(pattern)
    )


def copy(names: Iterable[str]) -> None:
    """Copies the files that differ."""
    for name in names:
        new = (ROOT / name).read_bytes()
        path = WORK / name
        if not path.exists() or path.read_bytes() != new:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path)


def run(command: list, log: pathlib.Path, **variables: str) -> int:
    """Runs Python in the copy and returns the exit status."""
    with log.open("a") as file:
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=WORK,
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode


def build(
    source: pathlib.Path, tests: list[pathlib.Path], log: pathlib.Path
) -> int:
    """Compiles for the tests and returns the exit status.

    The tests of CUDA kernels compile the kernels themselves.
    """
    if source.suffix == ".py" or "cuda" in str(source):
        return 0
    if all(test.name.endswith("_core_test.py") for test in tests):
        (core,) = (WORK / "tf_deform").glob("libtf_deform_core-*.so")
        command = ["cc/build.py", "--output", core]
    else:
        command = ["setup.py", "build_ext", "--inplace"]
    # -O1 compiles faster, and the tests do not judge the compiler.
    return run(command, log, TF_DEFORM_NVCC="0", CXXFLAGS="-O1")


def judge(mistake: Mistake) -> str:
    """Makes the mistake in the copy, runs its tests, and undoes it."""
    ((source, match),) = find(mistake)
    tests = find_tests(mistake)
    log = WORK / "build" / f"{mistake.name}.txt"
    log.unlink(missing_ok=True)
    path = WORK / source
    good = path.read_text()
    copy_built()
    try:
        path.write_text(
            good[: match.start()] + mistake.new + good[match.end() :]
        )
        if build(source, tests, log) != 0:
            return f"NOT BUILT, see {log}"
        status = run(
            ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests], log
        )
    finally:
        path.write_text(good)
    if -status in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        return f"found by a crash, {signal.Signals(-status).name}"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(), re.M)
    if status == 1 and failed:
        return f"found by {failed[0]}"
    return f"NOT FOUND (pytest ended with {status}, see {log})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Makes mistakes that the tests must find."
    )
    parser.add_argument("--only", default="", help="the beginning of names")
    parser.add_argument("--list", action="store_true", help="names alone")
    arguments = parser.parse_args()
    chosen = [x for x in MISTAKES if x.name.startswith(arguments.only)]
    if not chosen:
        parser.error(f"Expected a name. Received: {arguments.only!r}")
    if arguments.list:
        print("\n".join(mistake.name for mistake in chosen))
        return 0
    copy_checkout()
    missed = 0
    for mistake in chosen:
        verdict = judge(mistake)
        missed += not verdict.startswith("found")
        print(f"{mistake.name}: {verdict}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
