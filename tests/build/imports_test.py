# SPDX-License-Identifier: Apache-2.0
"""Tests that imports go one way: core <- tf, xla; ops <- layers <- the rest.

Every import counts, also an import within a function. The same holds for
includes.
"""

import ast
import graphlib
import pathlib
import re
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = "tf_deform"
COMMAND = "tf_deform_cli"

# A part of the package imports only parts of earlier lines and, of its own
# line, only itself. "" is `tf_deform/__init__.py`.
FLOORS = (
    {
        "_build_info",
        "_cache",
        "_command_line",
        "_files",
        "_image_files",
        "_run_folder",
        "_settings",
        "_squares",
        "_tf2onnx",
        "_weight_files",
    },
    {"_loader"},
    {"_implementation"},
    {"_portable"},
    {"ops"},
    {"_keras"},
    {"layers"},
    {"_plain_weights"},
    {"data"},
    {"models", "training"},
    {"export", "hub", "visualization"},
    {"demo"},
    {"tasks"},
    {""},
    {"__main__"},
)
# These parts need TensorFlow alone: a program without Keras 3 could use them.
NO_KERAS = {
    "_cache",
    "_files",
    "_image_files",
    "_loader",
    "_implementation",
    "_portable",
    "_squares",
    "ops",
}
# Every other import of the package belongs to an extra, and stands in the
# function that needs it. Keras requires h5py.
REQUIRED = {"tensorflow", "keras", "numpy", "h5py"}

# Folders of cc, and the folders from which they include.
MAY_INCLUDE = {
    "core": {"core"},
    "core/cpu": {"core", "core/cpu"},
    "core/cuda": {"core", "core/cuda"},
    "tf": {"core", "tf"},
    "xla": {"core", "tf", "xla"},
    "manylinux": set(),
    "": {"tf", "xla"},
}


def part(module: str) -> str:
    """Returns the part of a module: `ops` for `tf_deform.ops._arguments`."""
    return (module.split(".") + [""])[1]


def name_of(path: pathlib.Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names).removesuffix(".__init__")


# The files of the package by the names of their modules.
MODULES = {name_of(path): path for path in (ROOT / PACKAGE).rglob("*.py")}


def imports(
    path: pathlib.Path, *, at_once: bool = False
) -> Iterator[tuple[str, int]]:
    """Yields the modules that a file imports, with line numbers.

    `at_once` leaves out imports within functions and imports for type checkers.
    """
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is relative"
            for alias in node.names:
                # The imported name may be the name of a module.
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module, node.lineno
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If)
            and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if not (at_once and lazy):
            nodes.extend(ast.iter_child_nodes(node))


def is_of_package(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def wrong_imports(files: dict[str, pathlib.Path]) -> list[str]:
    """Describes the imports that go up or sideways."""
    levels = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    return [
        f"{path}:{line}: {module} imports {imported}"
        for module, path in files.items()
        for imported, line in imports(path)
        if is_of_package(imported)
        and part(imported) != part(module)
        and levels[part(imported)] >= levels[part(module)]
    ]


def test_every_part_has_a_floor():
    assert sorted({part(module) for module in MODULES}) == sorted(
        set().union(*FLOORS)
    )


def test_imports_go_one_way():
    assert wrong_imports(MODULES) == []


@pytest.mark.parametrize(
    "module, text",
    [
        ("tf_deform.ops.x", "from tf_deform import layers"),
        ("tf_deform.ops.x", "import tf_deform.layers._branch"),
        (
            "tf_deform.layers.x",
            "def f():\n    from tf_deform.export import onnx",
        ),
        ("tf_deform._plain_weights", "from tf_deform import export"),
        ("tf_deform._files", "from tf_deform import _loader"),
        ("tf_deform.ops.x", "import tf_deform"),
    ],
)
def test_a_wrong_import_is_found(module, text, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(text)
    assert len(wrong_imports({module: path})) == 1


def test_there_are_no_circles():
    """Tests circles of modules, also within a part.

    A package's own modules come before the package.
    """
    graph = {
        module: {
            name
            for name, _ in imports(path)
            if is_of_package(name) and not module.startswith(f"{name}.")
        }
        for module, path in MODULES.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_only_the_module_main_imports_the_command():
    paths = [*MODULES.values(), *(ROOT / "cc").rglob("*.py")]
    for folder in ("examples", "benchmarks"):
        paths += (ROOT / folder).rglob("*.py")
    importing = [
        path.relative_to(ROOT).as_posix()
        for path in paths
        if {COMMAND, f"{PACKAGE}.__main__"}
        & {name for name, _ in imports(path)}
    ]
    assert importing == ["tf_deform/__main__.py"]


def tops(path: pathlib.Path, *, at_once: bool = False) -> set[str]:
    """Returns the packages that a file imports."""
    return {name.split(".")[0] for name, _ in imports(path, at_once=at_once)}


def test_the_command_imports_the_standard_library_at_first():
    names = tops(ROOT / f"{COMMAND}.py", at_once=True)
    assert names <= sys.stdlib_module_names


def test_ops_do_without_keras():
    for module, path in MODULES.items():
        assert part(module) not in NO_KERAS or "keras" not in tops(path), path


def test_an_extra_is_imported_when_it_is_used():
    for path in MODULES.values():
        others = tops(path, at_once=True) - REQUIRED - {PACKAGE, COMMAND}
        if path.parent.name == "hub":  # Users import it with their own.
            others.discard("keras_hub")
        assert others <= sys.stdlib_module_names, path


def test_the_import_brings_nothing_of_others(run_python):
    """Tests that the import loads only TensorFlow and Keras besides."""
    printed = run_python(
        """
import re
import sys

import h5py
import keras
import tensorflow

before = set(sys.modules)
import tf_deform

new = {name.split(".")[0] for name in set(sys.modules) - before}
# TensorFlow names the module of an op library by a hash.
new = {name for name in new if not re.fullmatch("[0-9a-f]{40}", name)}
print(sorted(new - sys.stdlib_module_names))
print([n for n in sorted(sys.modules) if n.startswith("tf_deform.export")])
assert callable(tf_deform.export.onnx)
assert tf_deform.load_plain_weights.__name__ == "load_plain_weights"
assert set(tf_deform.__all__) <= set(dir(tf_deform))
try:
    tf_deform.exports
except AttributeError as error:
    print(error)
"""
    )
    assert printed.splitlines() == [
        "['tf_deform']",
        "[]",
        "module 'tf_deform' has no attribute 'exports'",
    ]


# C++.


def folder_of(path: str) -> str:
    return path.removeprefix("cc/").rpartition("/")[0]


SOURCES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "cc").rglob("*"))
    if path.suffix in (".h", ".cc", ".cu")
]
INCLUDES = [
    (path, header)
    for path in SOURCES
    for header in re.findall(
        r'^\s*#\s*include\s+["<](.+)[">]', (ROOT / path).read_text(), re.M
    )
]


def test_every_folder_of_sources_is_known():
    assert {folder_of(path) for path in SOURCES} <= MAY_INCLUDE.keys()
    assert len(SOURCES) > 50 and len(INCLUDES) > 200


def test_includes_go_one_way():
    for path, header in INCLUDES:
        if header.startswith("cc/"):
            allowed = MAY_INCLUDE[folder_of(path)]
            assert folder_of(header) in allowed, f"{path}: {header}"
            assert (ROOT / header).exists(), f"{path}: {header}"


# Folders whose sources may include headers of other people. No C++ source
# includes a header of CUDA, because the stream is passed as `void*`, and tests
# compile the kernels for the host.
OTHERS = {
    r"(tensorflow|absl|Eigen|unsupported)/": {"tf", "xla"},
    r"xla/": {"xla"},
    r"(cuda|cublas|mma)": {"core/cuda"},
}


@pytest.mark.parametrize("headers", OTHERS)
def test_who_includes_headers_of_others(headers):
    found = {
        folder_of(p) for p, header in INCLUDES if re.match(headers, header)
    }
    assert found <= OTHERS[headers]
