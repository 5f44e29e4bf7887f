# SPDX-License-Identifier: Apache-2.0
"""Tests that the core's headers stay readable.

Formatters garbled their tables.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CONTRACTS = sorted(
    path
    for path in (ROOT / "cc/core").glob("deformable_*.h")
    if not path.stem.endswith("-inl")
)
SOURCES = sorted(
    path
    for path in [*ROOT.glob("cc/**/*"), *ROOT.glob("tests/**/*")]
    if path.suffix in (".c", ".cc", ".cu", ".h")
)
TAG = "// SPDX-License-Identifier: Apache-2.0"
OPERAND = re.compile(r"//   (\w+) +\(")


def table_of(header: str) -> list[str]:
    """Returns the lines of the operand table, up to the include guard."""
    table = header.partition("T is double):\n")[2]
    return table.partition("\n\n#ifndef")[0].splitlines()


def operands_of(header: str) -> set[str]:
    """Returns the names of the operands that the contract declares."""
    struct = re.search(r"struct \w+Inputs \{\n(.*?)\n\};", header, re.DOTALL)
    names = set(re.findall(r"const void\* (\w+)", struct[1]))
    forward = re.search(r"Status Forward\((.*?)\);", header, re.DOTALL)
    return names | set(re.findall(r"(?:void|float)\* (\w+)", forward[1]))


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem)
def test_a_contract_has_one_operand_a_line(path):
    header = path.read_text()
    table = table_of(header)
    begins = [line for line in table if OPERAND.match(line)]
    names = [OPERAND.match(line)[1] for line in begins]
    assert set(names) == operands_of(header) - {"workspace"}
    assert len(set(names)) == len(names)
    columns = {line.index("(") for line in begins}
    assert len(columns) == 1, "shapes begin in one column"
    for line in table:
        # A line that continues an operand begins below the operand's shape.
        assert OPERAND.match(line) or re.match(r"// {9,12}\S", line), line
        others = [name for name in names if re.search(rf"\b{name} +\(", line)]
        assert len(others) <= 1, line


@pytest.mark.parametrize("path", CONTRACTS, ids=lambda path: path.stem)
def test_a_description_is_the_table_once_more(path):
    """Tests that names, order and kinds in the description equal the table's.

    The glue is made from the description; people read the table.
    """
    header = path.read_text()
    described = re.findall(r'\{"(\w+)", k(Value|Coordinate), k\w+,', header)
    table = " ".join(line.removeprefix("//") for line in table_of(header))
    written = re.findall(
        r"(\w+) +\((?:[^()]|\([^()]*\))*\)[^()]*? (T|coordinate)\b", table
    )
    kinds = {"T": "Value", "coordinate": "Coordinate"}
    expected = [(name, kinds[kind]) for name, kind in written]
    assert described == [pair for pair in expected if pair[0] != "output"]
    struct = re.search(r"struct \w+Inputs \{\n(.*?)\n\};", header, re.DOTALL)
    names = re.findall(r"const void\* (\w+)", struct[1])
    assert [name for name, _ in described] == names


def test_contracts_are_found():
    assert len(CONTRACTS) >= 3 and len(SOURCES) > 50


def test_a_garbled_table_is_noticed():
    garbled = (
        "// (double when T is double):\n"
        "//   inputs  (batch)  T\n"
        "//   offset  (batch),\n"
        "//   [group], input pixels mask    (batch)\n\n#ifndef"
    )
    lines = table_of(garbled)
    assert not all(
        OPERAND.match(line) or re.match(r"// {9,12}\S", line) for line in lines
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_licence_is_a_line_of_its_own(path):
    lines = path.read_text().splitlines()
    assert lines[0] == TAG
    assert sum("SPDX" in line for line in lines) == 1
