# SPDX-License-Identifier: Apache-2.0
"""Lists registers and local memory of every GPU kernel in a built core.

After a change that is meant to use more (or fewer) registers:

    python tests/lib/cuda_resources.py --record

A stack frame is local memory: spilled registers, or arrays that are indexed at
run time. It lives in device memory, so none should appear by surprise.
"""

import argparse
import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess

TABLE = pathlib.Path(__file__).with_suffix(".json")
COLUMNS = ["registers", "stack bytes", "local bytes"]

# By kernel and by architecture: numbers in the order of COLUMNS.
Resources = dict[str, dict[str, list[int]]]


def find_cuobjdump() -> str | None:
    """Returns the cuobjdump of PyPI's nvidia-cuda-cuobjdump, or of PATH."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "cuobjdump":
            return str(file.locate())
    return shutil.which("cuobjdump")


def run_cuobjdump(*arguments: object) -> str:
    return subprocess.run(
        [find_cuobjdump(), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def short_names(mangled: list[str]) -> list[str]:
    """Removes namespaces; puts the source of a local kernel before a colon."""
    demangled = subprocess.run(
        ["c++filt", "-p"],
        input="\n".join(mangled),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    names = []
    for name in demangled:
        source = re.search(r"(\w+)_cu::", name)
        name = re.sub(r"\w+_cu::|tf_deform::|cuda::", "", name)
        names.append(f"{source[1]}: {name}" if source else name)
    return names


def parse(listing: str) -> Resources:
    """Reads the output of `cuobjdump -res-usage`."""
    found = []
    architecture = symbol = None
    for line in listing.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            symbol = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", line):
            found.append((symbol, architecture, [*map(int, match.groups())]))
    resources: Resources = {}
    names = short_names([symbol for symbol, _, _ in found])
    for name, (_, architecture, numbers) in zip(names, found, strict=True):
        # Kernels of the same name in two namespaces count as the larger kernel.
        old = resources.setdefault(name, {}).get(architecture, numbers)
        resources[name][architecture] = [*map(max, old, numbers)]
    return resources


def measure(library: pathlib.Path) -> Resources:
    return parse(run_cuobjdump("-res-usage", library))


def compare(measured: Resources, recorded: Resources) -> list[str]:
    """Lists kernels that use more local memory than recorded.

    New kernels may use none.
    """
    surprises = []
    for name, architectures in measured.items():
        for architecture, numbers in architectures.items():
            old = recorded.get(name, {}).get(architecture, [0] * len(COLUMNS))
            if numbers[1] > old[1] or numbers[2] > old[2]:
                surprises.append(
                    f"{name} ({architecture}): {COLUMNS} = {numbers}, recorded "
                    f"{old}"
                )
    return surprises


def write(resources: Resources, cuda_version: str, path: pathlib.Path) -> None:
    lines = [
        f"    {json.dumps(name)}: {json.dumps(numbers, sort_keys=True)}"
        for name, numbers in sorted(resources.items())
    ]
    path.write_text(
        "{\n"
        f'  "cuda_version": {json.dumps(cuda_version)},\n'
        f'  "columns": {json.dumps(COLUMNS)},\n'
        '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    )


def main() -> None:
    import tf_deform
    from tf_deform import _build_info

    parser = argparse.ArgumentParser(description="The kernels' resources.")
    parser.add_argument("--record", action="store_true", help=f"write {TABLE}")
    arguments = parser.parse_args()
    if not tf_deform.is_built_with_cuda():
        parser.exit(1, "Expected a build with CUDA. Received: one without.\n")
    if find_cuobjdump() is None:
        parser.exit(1, "Run `pip install 'nvidia-cuda-cuobjdump>=13,<14'`.\n")
    core = pathlib.Path(tf_deform.__file__).parent / _build_info.CORE
    measured = measure(core)
    for name, architectures in sorted(measured.items()):
        for architecture, numbers in sorted(architectures.items()):
            print(architecture, *numbers, name)
    if arguments.record:
        write(measured, _build_info.CUDA_VERSION, TABLE)


if __name__ == "__main__":
    main()
