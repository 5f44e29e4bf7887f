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


def without_texts(text: str) -> str:
    """Blanks comments and literals of C++; keeps every line."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'"

    def blank(match):
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(pattern, blank, text, flags=re.DOTALL)


def native_functions(text: str) -> list[tuple[str, int]]:
    """Returns names and lengths of the outermost functions, from name to brace.

    A brace opens a function if the text since the last statement or block ends
    with arguments (and then qualifiers or initial values).
    """
    found = []
    opened = []  # whether each open brace opens a function; its name; its line
    head = ""
    for number, line in enumerate(without_texts(text).splitlines(), 1):
        if line.startswith("#"):
            continue
        for character in line:
            if character == "{":
                inside = any(is_function for is_function, _, _ in opened)
                plain = re.sub(r"__\w+__\s*\(+[^()]*\)+", "", head)
                scope = re.search(
                    r"\b(namespace|struct|class|union|enum|extern)\b[^()]*$",
                    head,
                )
                name = re.search(r"(~?\w+|operator\S+)\s*\(", plain)
                is_function = not inside and name is not None and not scope
                first = number - head.lstrip().count("\n")
                opened.append((is_function, name[1] if name else "", first))
                head = ""
            elif character == "}":
                is_function, name, first = opened.pop()
                if is_function:
                    found.append((name, number - first + 1))
                head = ""
            elif character == ";" and head.count("(") == head.count(")"):
                head = ""
            else:
                head += character
        head += "\n"
    assert not opened, "braces do not match"
    return found


def test_functions_are_found():
    python = 'def f():\n    """A\n    text."""\n    pass\n\n\nx = 1\n'
    assert python_functions(python) == [("f", 2)]
    native = """
namespace a {
struct S {
  __attribute__((noinline)) S() : x{1} {}  // }
  int At(int i) const { return x[i]; }
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
    found = dict(native_functions(native))
    assert found["At"] == 1
    assert found["Body"] == 10
    assert set(found) == {"S", "At", "Body"}


def test_sources_are_found():
    assert len(SOURCES) > 150
    functions = [
        name
        for path in SOURCES
        if path.suffix in NATIVE
        for name, _ in native_functions(path.read_text())
    ]
    assert {"Advance", "VisitSample", "FindWeights"} <= set(functions)
    assert len(functions) > 600


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_is_long(folder):
    long = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if path.is_relative_to(ROOT / folder)
        and (lines := len(path.read_text().splitlines())) > FILE_LINES
    }
    assert not long


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_is_long(folder):
    long = {}
    for path in SOURCES:
        if not path.is_relative_to(ROOT / folder):
            continue
        find = python_functions if path.suffix == ".py" else native_functions
        for name, lines in find(path.read_text()):
            if lines > FUNCTION_LINES:
                long[f"{path.relative_to(ROOT)}: {name}"] = lines
    assert not long
