# SPDX-License-Identifier: Apache-2.0
"""Tests by disassembly that compiled code keeps to its instruction set.

Every instruction set has a namespace. All other code runs on any processor
before an instruction set is chosen, so it may use only the baseline (SSE2). The
same goes for functions of the standard library: the linker keeps a single copy
of an inline function, which may be the copy compiled for AVX-512.

The ops' own tests compare the results of every set (`core.cpus`).
"""

import collections
import os
import pathlib
import platform
import re
import shutil
import subprocess

import core
import pytest

# First bytes of an instruction in the encodings of AVX and AVX2 (VEX; also BMI
# and AVX-512's instructions on masks) and of AVX-512 (EVEX), after prefixes of
# segment and address size. In 64-bit code no other instruction begins with
# these bytes.
_VEX, _EVEX = {"c4", "c5"}, {"62"}
_PREFIXES = {"26", "2e", "36", "3e", "64", "65", "67"}
# Instructions between SSE2 and AVX, in the older encoding.
_AFTER_SSE2 = re.compile(
    r"addsubp.|h(add|sub)p.|lddqu|movddup|movs[hl]dup|p?blend.*|phadd.*|phsub.*"
    r"|pabs.|psign.|pshufb|palignr|pmaddubsw|pmulhrsw|packusdw|pcmpeqq|pcmpgtq"
    r"|pmulld|pmuldq|pmaxs[bd]|pmaxu[wd]|pmins[bd]|pminu[wd]|pmov[sz]x.*|ptest"
    r"|round[ps].|extractps|insertps|pextr[bdq]|pinsr[bdq]|dpp.|mpsadbw"
    r"|movntdqa|phminposuw|pcmp[ei]str.*|crc32.*|popcnt.*|lzcnt.*|movbe.*"
)
_MASK = re.compile(r"%k[0-7]\b")
_NAMESPACES = ("avx2", "avx512")


def _namespace(symbol: str) -> str:
    """Returns the instruction set that a function may use, by its mangled name.

    Lambdas, templates and the parts that a compiler splits off have the
    namespace in their names. If a name has two namespaces, the lesser set
    counts.
    """
    named = re.findall(r"3cpu(?:8(baseline)|4(avx2)|6(avx512))", symbol)
    found = {name for groups in named for name in groups if name}
    return min(found, key=["baseline", *_NAMESPACES].index, default="baseline")


def _is_past(isa: str, encoding: str, text: str) -> bool:
    """Returns whether an instruction is beyond the function's set."""
    mnemonic, _, operands = text.partition(" ")
    first = next((b for b in encoding.split() if b not in _PREFIXES), "")
    if isa == "baseline":
        return first in _VEX | _EVEX or bool(_AFTER_SSE2.fullmatch(mnemonic))
    if isa == "avx2":
        return (
            first in _EVEX or "%zmm" in operands or bool(_MASK.search(operands))
        )
    return False


def _objdump(path: str, *options: str) -> str:
    return subprocess.run(
        ["objdump", *options, path], capture_output=True, text=True, check=True
    ).stdout


def _disassembled(path: str):
    """Yields (function, its instructions as pairs of encoding and text)."""
    for block in _objdump(path, "-d", "-w").split("\n\n"):
        if match := re.match(r"\n*[0-9a-f]+ <(.*)>:\n", block):
            lines = [line.split("\t", 2) for line in block.splitlines()]
            yield match[1], [line[1:] for line in lines if len(line) == 3]


def _skip_unless_readable(path: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("on x86-64 only is there more than one instruction set")
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump, from binutils")
    if "no symbols" in _objdump(path, "-t"):
        pytest.skip(f"{path} is stripped: it does not name its functions")


def test_code_keeps_to_its_instruction_set():
    path = core.library()._name
    _skip_unless_readable(path)
    functions = collections.Counter()
    widest = collections.Counter()
    past = {}
    for symbol, instructions in _disassembled(path):
        isa = _namespace(symbol)
        functions[isa] += 1
        for instruction in instructions:
            if _is_past(isa, *instruction):
                past.setdefault(symbol, instruction)
            for register in ("%ymm", "%zmm"):
                widest[isa, register] += register in instruction[1]
    assert not past, f"{len(past)} functions of {path}: {past}"
    # All sets are present, under the names that the test looks for.
    assert min(functions[isa] for isa in ("baseline", *_NAMESPACES)) > 50
    assert widest["avx2", "%ymm"] > 1000
    assert widest["avx512", "%zmm"] > 1000


def test_op_libraries_run_on_every_processor():
    """Tests that they leave everything that is more than baseline to the core.

    TensorFlow's headers have code for other instruction sets, which would be in
    an op library if its flags chose them.
    """
    folder = pathlib.Path(core.library()._name).parent
    paths = sorted(map(str, folder.glob("_ops_*.so")))
    if not paths:
        pytest.skip("there are no ops next to the core")
    for path in paths:
        _skip_unless_readable(path)
        number = 0
        for symbol, instructions in _disassembled(path):
            number += 1
            for instruction in instructions:
                assert not _is_past("baseline", *instruction), (path, symbol)
        assert number > 50


@pytest.mark.parametrize(
    "isa, line",
    [
        ("baseline", "c5 fa 58 c1\tvaddss %xmm1,%xmm0,%xmm0"),
        ("baseline", "c5 f8 77\tvzeroupper"),
        ("baseline", "64 c5 f8 28 00\tvmovaps %fs:(%rax),%xmm0"),
        ("baseline", "c4 e2 f0 f2 c2\tandn %rdx,%rcx,%rax"),
        ("baseline", "66 0f 38 40 c1\tpmulld %xmm1,%xmm0"),
        ("baseline", "f3 48 0f b8 c7\tpopcnt %rdi,%rax"),
        ("avx2", "62 f1 7c 48 58 c1\tvaddps %zmm1,%zmm0,%zmm0"),
        ("avx2", "62 b1 7c 28 58 c1\tvaddps %ymm17,%ymm0,%ymm0"),
        ("avx2", "62 f1 7c 29 58 c1\tvaddps %ymm1,%ymm0,%ymm0{%k1}"),
        ("avx2", "c5 f8 93 c1\tkmovw %k1,%eax"),
    ],
)
def test_what_is_past_a_set_is_found(isa, line):
    assert _is_past(isa, *line.split("\t"))


def test_what_is_in_a_set_passes():
    assert not _is_past("baseline", "0f 58 c1", "addps %xmm1,%xmm0")
    assert not _is_past("avx2", "c5 fc 58 c1", "vaddps %ymm1,%ymm0,%ymm0")
    assert _namespace("_ZN9tf_deform3cpu4avx2L1fEv.cold") == "avx2"
    assert (
        _namespace("_ZSt4sortIZN9tf_deform3cpu6avx512L1fEvEUlvE_E") == "avx512"
    )
    assert _namespace("_ZSt3minIlERKT_S2_S2_") == "baseline"
    assert (
        _namespace("_ZN9tf_deform3cpu6avx512IN9tf_deform3cpu4avx2E") == "avx2"
    )


def test_the_sets_of_this_processor_are_tested():
    """Tests that tests of the core run with every set that the CPU has."""
    if platform.machine() != "x86_64" or "TF_DEFORM_MAX_ISA" in os.environ:
        pytest.skip("there is one set only")
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    names = list(map(str, core.cpus()))
    assert names[0] == core.instruction_set() and names[-1] == "baseline"
    assert "avx2" in names or not {"avx2", "fma"} <= {*flags}
    assert "avx512" in names or "avx512vl" not in flags
    assert "avx512_bf16" in names or "avx512_bf16" not in flags
