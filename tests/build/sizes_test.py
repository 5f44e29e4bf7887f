# SPDX-License-Identifier: Apache-2.0
"""Tests that files of code have at most 600 lines, functions at most 100."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("cc", "tf_deform", "examples", "benchmarks", "tests")
FILE_LINES = 600
FUNCTION_LINES = 100
NATIVE = (".c", ".cc", ".cu", ".h")
SOURCES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (*NATIVE, ".py") and "golden" not in path.parts
)


def python_functions(text: str) -> list[tuple[str, int]]:
    """Returns names and lengths of all functions, without their docstrings."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                text = node.body[0]
                lines -= text.end_lineno - text.lineno + 1
            found.append((node.name, lines))
    return found


def native_functions(text: str) -> list[tuple[str, int]]:
    """Returns names and lengths of functions, from name to brace.

    clang-format indents no function but those of a class, and all lines within
    a function, so a function ends with the first brace that stands alone below
    its name. Functions of one line are left out.
    """
    pattern = (
        r"^(|  )(?=[\w~_])(?!namespace|struct|class|public|private|enum|extern)"
        r"((?:template[^\n]*\n\1)?[^\n]*\n"
        r"(?:(?:\1 [^\n]*|#[^\n]*|)\n)*?)\1}$"
    )
    found = []
    for match in re.finditer(pattern, text, re.MULTILINE):
        head = re.sub(r"__\w+__\s*\(+[^()]*\)+", "", match[2])
        name = re.search(r"(~?\w+|operator\S+)\s*\(", head)
        found.append((name[1], match[2].count("\n") + 1))
    return found


def test_functions_are_found():
    python = 'def f():\n    """A\n    text."""\n    pass\n\n\nx = 1\n'
    assert python_functions(python) == [("f", 2)]
    native = """
namespace a {
struct S {
  __attribute__((noinline)) S() : x{1} {
  }
  int At(int i) const {
    return '{';
  }
};
constexpr int kTable[] = {
  1,
};
template <typename T>
void Body(
    int i,
    const char* text = "{") {
  for (;;) {
    const auto f = [&](int j) {
      return '{';
    };
  }
}
}  // namespace a
"""
    assert native_functions(native) == [("S", 2), ("At", 3), ("Body", 10)]


def test_sources_are_found():
    assert len(SOURCES) > 150
    functions = [
        name
        for path in SOURCES
        if path.suffix in NATIVE
        for name, _ in native_functions(path.read_text())
    ]
    assert {"Advance", "VisitSample", "FindWeights"} <= set(functions)
    assert len(functions) > 500


def lengths(path: pathlib.Path) -> dict[str, int]:
    """Returns the lengths of functions by name."""
    find = python_functions if path.suffix == ".py" else native_functions
    return dict(sorted(find(path.read_text()), key=lambda item: item[1]))


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_long(folder):
    long = {}
    for path in SOURCES:
        if not path.is_relative_to(ROOT / folder):
            continue
        name = path.relative_to(ROOT)
        if (lines := len(path.read_text().splitlines())) > FILE_LINES:
            long[name] = lines
        for function, lines in lengths(path).items():
            if lines > FUNCTION_LINES:
                long[f"{name}: {function}"] = lines
    assert not long
