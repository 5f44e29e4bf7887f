# SPDX-License-Identifier: Apache-2.0
"""Computes goals, ratios, notes and tables of results, for CPU and GPU alike.

A report is the dictionary that `run.py` fills and saves as JSON. A row of it is
one contender at one shape and one setting: a number of threads on the CPU, a
precision on a GPU. Files of earlier versions can be read.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from contenders import Suite

Row = dict[str, Any]

KINDS = ("forward", "both")
TIMED_KINDS = (*KINDS, "backward")  # not all contenders have the last kind
TITLES = {
    "forward": "forward",
    "both": "forward + backward",
    "backward": "backward alone",
}
HEADS = {"forward": "forward", "both": "fwd+bwd", "backward": "backward"}
NOISE = 0.15  # a larger distance of quartiles over the median is reported


class Goal(NamedTuple):
    """Holds a bound on a ratio, which may depend on the shape."""

    text: str
    of: Callable[[Any], float]  # takes the case


def at(bound: float) -> Goal:
    return Goal(f"{bound:g}", lambda case: bound)


SAMPLING = Goal(
    "1.1 * (1 + 4 * groups / filters)",
    lambda case: 1.1 * (1 + 4 * case.groups / case.filters),
)
# Lists the project's aims, by operator, kind of call, subject and setting. The
# subject is a "ratio" to the contender that the table's ratios refer to (at
# most the goal, in every row), the "mean" of these ratios (geometric, at most
# the goal), a peer (whose time is at least the goal times ours), or "threads"
# (one thread's time is at least the goal times ours). Verdicts are reported and
# never fail a run: a time is no test.
GOAL_THREADS = 2
TWO = f"threads {GOAL_THREADS}"
GOALS = {
    ("conv", "forward", "ratio", TWO): at(1.3),
    ("conv", "forward", "mean", TWO): at(1.1),
    ("conv", "forward", "onnxruntime or openvino", TWO): at(1.25),
    ("conv", "forward", "threads", TWO): at(1.8),
    ("conv", "both", "ratio", TWO): at(1.35),
    ("conv", "both", "gather", TWO): at(2.5),
    ("conv", "both", "threads", TWO): at(1.8),
    ("conv_kinds", "forward", "ratio", TWO): SAMPLING,
    ("conv_kinds", "both", "ratio", TWO): SAMPLING,
    ("roi", "forward", "openvino, psroi", TWO): at(10),
    ("roi", "backward", "ratio", TWO): at(3),
}
for _kind in KINDS:  # on a GPU
    GOALS |= {
        ("conv", _kind, "torchvision", "float32"): at(2),
        ("conv", _kind, "torchvision", "tf32"): at(2),
        ("conv", _kind, "torchvision", "float16"): at(4),
        ("conv", _kind, "ratio", "bfloat16"): at(1.6),
        ("roi", _kind, "torchvision, psroi", "float32"): at(5),
        ("roi", _kind, "torchvision, psroi", "float16"): at(5),
    }


# The functions below compute numbers.


def summary(
    milliseconds: Sequence[float], reference: Sequence[float] | None
) -> dict[str, Any]:
    """Returns quartiles, extremes, samples and, if possible, ratios."""
    times = np.asarray(milliseconds)
    result = _quartiles(times, "_ms") | {
        "min_ms": float(times.min()),
        "max_ms": float(times.max()),
        "samples_ms": [round(float(ms), 4) for ms in times],
    }
    if reference:
        result["ratio"] = float(np.median(times) / np.median(reference))
        # Divides round by round: noise slower than a round does not affect
        # these ratios.
        result["ratio_by_round"] = _quartiles(times / np.asarray(reference), "")
    return result


def _quartiles(values: np.ndarray, unit: str) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {
        f"median{unit}": float(middle),
        f"q25{unit}": float(low),
        f"q75{unit}": float(high),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns a 95 % confidence interval of the median.

    It assumes nothing about the distribution of the values. The k-th value from
    either end bounds the median unless fewer than k values lie on one side of
    the median; a binomial distribution with probability 1/2 gives the
    probability of that. Fewer than 6 values have no such interval: the bounds
    are then infinite.
    """
    ordered, count = sorted(values), len(values)
    fewer, outside = 0, 2.0**-count  # probability of at most `fewer`
    while outside <= 0.025:
        fewer += 1
        outside += math.comb(count, fewer) * 2.0**-count
    if not fewer:
        return -math.inf, math.inf
    return ordered[fewer - 1], ordered[-fewer]


def setting(row: Row) -> str:
    """Returns a row's setting as goals name it."""
    if row.get("threads"):
        return f"threads {row['threads']}"
    return row["precision"]


# The functions below make tables.


def markdown(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    words: int | None = None,
) -> str:
    """Returns a table; columns after the first `words` are set as numbers."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    words = len(header) if words is None else words
    rule = "|" + "---|" * words + "---:|" * (len(header) - words)
    return "\n".join([lines[0], rule, *lines[1:]])


def table(report: dict[str, Any], op: str) -> str:
    """Returns the rows of an operator, without unsupported contenders."""
    rows = rows_of(report, op)
    on_gpu = report.get("device") == "cuda"
    peaks = report.get("peaks", {})
    kinds = TIMED_KINDS if any("backward" in row for row in rows) else KINDS
    has_rates = on_gpu and any("flop" in row for row in rows)
    has_memory = not on_gpu and any(row["extra_mib"] for row in rows)

    def cells(row: Row) -> list[tuple[str, str]]:
        """Returns the heads of all columns, and the row's texts."""
        place = "precision" if on_gpu else "threads"
        found = [(k, str(row[k])) for k in ("shape", place, "contender")]
        for kind in kinds:
            # A GPU's calls take fractions of a millisecond.
            time = _time_cell(kind, 3 if on_gpu else 1, row)
            ratio = "to forward" if kind == "backward" else "ratio"
            found.append((f"{HEADS[kind]} ms (25-75 %)", time))
            found.append((ratio, _ratio_cell(kind, row)))
            if has_rates:
                rate = _rate_cell(kind, peaks, row)
                found.append(("TFLOP/s (of peak)", rate))
        if on_gpu:
            found.append(("largest difference", _difference_cell(row)))
        if has_memory:
            found += [
                (f"extra MiB {HEADS[kind]}", _memory_cell(kind, row))
                for kind in KINDS
            ]
        return found

    return markdown(
        [head for head, _ in cells(rows[0])],
        [
            [text for _, text in cells(row)]
            for row in rows
            if "unsupported" not in row
        ],
    )


def rows_of(report: dict[str, Any], op: str) -> list[Row]:
    return [row for row in report["rows"] if row["op"] == op]


def _time_cell(kind: str, digits: int, row: Row) -> str:
    if kind in row["errors"]:
        return "error"
    if kind not in row:
        return ""
    middle, low, high = (
        f"{row[kind][name]:.{digits}f}"
        for name in ("median_ms", "q25_ms", "q75_ms")
    )
    return f"{middle} ({low}-{high})"


def _ratio_cell(kind: str, row: Row) -> str:
    if kind not in row or kind in row["errors"]:
        return ""
    return f"{row[kind]['ratio']:.2f}" if "ratio" in row[kind] else "n/a"


def _rate_cell(kind: str, peaks: Mapping[str, float], row: Row) -> str:
    work = row.get("flop", {}).get(kind)
    if kind not in row or not work:
        return ""
    rate = work / row[kind]["median_ms"] / 1e9
    peak = peaks.get(row["precision"])
    return f"{rate:.3g}" + (f" ({rate / peak:.0%})" if peak else "")


def _difference_cell(row: Row) -> str:
    values = row["disagreement"].values()
    if None in values:  # JSON has no number for infinity and NaN
        return "not finite"
    return f"{max(values):.1e}" if values else ""


def _memory_cell(kind: str, row: Row) -> str:
    # The contender was not compared and timed, or its memory not measured.
    if kind not in row or row["extra_mib"] is None:
        return ""
    # A negative reading is noise around 0.
    readings = [round(max(m, 0)) for m in row["extra_mib"].get(kind, [])]
    if not readings:
        return "n/a"
    if max(readings) - min(readings) > 2:
        return f"{min(readings)}-{max(readings)}"
    return str(round(statistics.median(readings)))


# The functions below write the notes below a table.


def errors(report: dict[str, Any]) -> list[str]:
    """Returns everything that makes the run a failure."""
    baseline = report["settings"]["baseline"]
    found = list(report["errors"])
    if baseline in report["missing"]:
        found.append(f"nothing to compare with, {baseline} is missing")
    for row in report["rows"]:
        found += [
            f"{row['shape']}, {setting(row)}, {row['contender']}, "
            f"{TITLES[kind]}: {text}"
            for kind, text in row["errors"].items()
        ]
    return found


def notes(report: dict[str, Any], op: str, suite: Suite) -> list[str]:
    """Returns remarks on agreement, goals and noise."""
    settings, rows = report["settings"], rows_of(report, op)
    lines = sorted(
        {
            f"Not supported by {row['contender']}: {row['unsupported']}."
            for row in rows
            if "unsupported" in row
        }
    )
    tolerances = settings["tolerance"]
    if not isinstance(tolerances, dict):  # on the CPU there is one type
        tolerances = {settings["dtype"]: tolerances}
    for precision, tolerance in tolerances.items():
        differences = [
            math.inf if value is None else value
            for row in rows
            if row["contender"] != settings["baseline"]
            and row.get("precision", precision) == precision
            for value in row["disagreement"].values()
        ]
        if differences:
            where = f" in {precision}" if len(tolerances) > 1 else ""
            lines.append(
                f"Largest difference{where} from {settings['baseline']}: "
                f"{max(differences):.1e} of the root mean square (allowed: "
                f"{tolerance:.0e})."
            )
    lines += _judge(rows, op, suite)
    timed = [
        (row, row[kind]) for row in rows for kind in TIMED_KINDS if kind in row
    ]
    noisy = [
        f"{row['shape']} at {setting(row)}"
        for row, time in timed
        if time["q75_ms"] - time["q25_ms"] > NOISE * time["median_ms"]
    ]
    if noisy:
        lines.append(
            f"NOISE: quartiles more than {NOISE:.0%} of the median apart in "
            f"{len(noisy)} timings; do not trust the ratios of "
            f"{', '.join(dict.fromkeys(noisy))}."
        )
    eager = sum(time.get("mode") == "launches" for _, time in timed)
    if eager:
        lines.append(
            f"{eager} times are of launches, not of CUDA graphs: they contain "
            "what the host needs if that is longer."
        )
    return lines


def _judge(rows: list[Row], op: str, suite: Suite) -> list[str]:
    """Compares `tf_deform` with its goals at every setting that has any.

    On the CPU a setting is one number of threads.
    """
    found = {setting(row): row.get("threads") for row in rows}
    counts = {
        row["threads"]
        for row in rows
        if row.get("threads") and row["contender"] == "tf_deform"
    }
    if counts:
        threads = GOAL_THREADS if GOAL_THREADS in counts else max(counts)
        found = {f"threads {threads}": threads}
    lines: list[str] = []
    judged: set[tuple[str, ...]] = set()
    for kind in TIMED_KINDS:
        for name, threads in found.items():
            compared = comparisons(rows, suite, kind, name, threads)
            for what, (text, ratios) in compared.items():
                key = op, kind, what, name
                judged |= {key, (op, kind, "mean", name)}
                title = f"tf_deform, {TITLES[kind]}, {name}"
                lines.append(f"{title}: {_verdict(ratios, text, key, suite)}.")
    left = [
        f"{TITLES[kind]}, {name}, {what} ({goal.text})"
        for (of, kind, what, name), goal in GOALS.items()
        if of == op and name in found and (of, kind, what, name) not in judged
    ]
    return lines + [f"Goals not measured: {'; '.join(left)}."] * bool(left)


def comparisons(
    rows: list[Row], suite: Suite, kind: str, name: str, threads: int | None
) -> dict[str, tuple[str, dict[str, float]]]:
    """Returns words and ratios by shape of `tf_deform`, by subject.

    The ratio of the table, which is a cost, comes first, then gains over peers
    and the gain by a second thread.
    """
    times: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if kind in row:
            key = row["contender"], setting(row)
            times.setdefault(key, {})[row["shape"]] = row[kind]
    ours = times.get(("tf_deform", name), {})

    def gains(others: list[tuple[str, str]], operator: str) -> dict[str, float]:
        """Returns how many times as long the fastest of others takes."""
        peers = [times.get(other, {}) for other in others]
        return {
            shape: min(
                peer[shape]["median_ms"] for peer in peers if shape in peer
            )
            / time["median_ms"]
            for shape, time in ours.items()
            if shape.rpartition(":")[0].startswith(operator)
            and any(shape in peer for peer in peers)
        }

    found = {}
    reference = "its forward" if kind == "backward" else suite.ratio_to
    if reference != "tf_deform":
        ratios = {k: t["ratio"] for k, t in ours.items() if "ratio" in t}
        found["ratio"] = f"times {reference}", ratios
    # Groups shapes by operator, if they begin with an operator's name.
    for operator in dict.fromkeys(shape.rpartition(":")[0] for shape in ours):
        for names in suite.peers:
            what = " or ".join(names) + (f", {operator}" if operator else "")
            peers = [(peer, name) for peer in names]
            found[what] = f"times as fast as {what}", gains(peers, operator)
    if threads and threads > 1:
        found["threads"] = (
            "times as fast as with one thread",
            gains([("tf_deform", "threads 1")], ""),
        )
    return {what: entry for what, entry in found.items() if entry[1]}


def _verdict(
    ratios: dict[str, float],
    text: str,
    key: tuple[str, str, str, str],
    suite: Suite,
) -> str:
    """Says how large ratios are, by shape, and whether they meet the goal."""
    op, kind, what, name = key
    is_cost = what == "ratio"  # a ratio of the table; all others are gains
    superlative = "most" if is_cost else "least"
    worst = (max if is_cost else min)(ratios, key=ratios.get)
    result = (
        f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} {text}; "
        f"{superlative} at {worst}"
    )
    if is_cost:
        mean = statistics.geometric_mean(ratios.values())
        result += f"; geometric mean {mean:.2f}"
        if goal := GOALS.get((op, kind, "mean", name)):
            verdict = "met" if mean <= goal.of(None) else "MISSED"
            result += f" (goal: at most {goal.text}, {verdict})"
    if goal := GOALS.get(key):
        missed = []
        for shape, ratio in ratios.items():
            bound = goal.of(suite.case.parse(shape, "float32", True))
            if (ratio > bound) if is_cost else (ratio < bound):
                missed.append(f"{shape} ({ratio:.2f}, not {bound:.2f})")
        verdict = f"MISSED at {', '.join(missed)}" if missed else "met"
        result += f"; goal: at {superlative} {goal.text}, {verdict}"
    return result


# The functions below write the whole report.


def describe(report: dict[str, Any]) -> list[str]:
    """Returns lines about the command, the machine and versions."""
    machine = report["machine"]
    about = f"{machine['cpu']}, {machine['processors']} processors"
    if "gpu" in machine:
        about = (
            f"{machine['gpu']} (compute capability {machine['capability']}, "
            f"driver {machine['driver']}), nvcc {machine['nvcc']}"
        )
    versions = ", ".join(
        f"{name} {version}"
        for name, version in report["versions"].items()
        if version
    )
    lines = [f"`{report['command']}`, {report['date'][:10]}:"]
    if report.get("emulated"):
        lines.append("EMULATED on the CPU: times and goals mean nothing.")
    lines.append(f"{about}; {versions}")
    if report.get("instruction_set"):
        lines.append(f"tf_deform used {report['instruction_set']}.")
    if peaks := report.get("peaks"):
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in peaks.items())
        lines.append(f"Peak (a large matrix product, TFLOP/s): {rates}.")
    return lines


def document(report: dict[str, Any], suites: Mapping[str, Suite]) -> str:
    """Returns all tables and notes as Markdown."""
    lines = describe(report)
    for op, suite in suites.items():
        if rows_of(report, op):
            lines += ["", f"### {suite.title}", "", table(report, op), ""]
            lines += [f"- {line}" for line in notes(report, op, suite)]
    if remarked := remarks(report):
        lines += ["", *remarked]
    return "\n".join(lines) + "\n"


def remarks(report: dict[str, Any]) -> list[str]:
    """Returns lines about contenders that are missing and about errors."""
    lines = [f"- {name}: {text}" for name, text in report["missing"].items()]
    lines += [f"- ERROR {line}" for line in errors(report)]
    return lines


def save(path: str, content: str | dict[str, Any]) -> None:
    """Writes text, or a dictionary as JSON: the whole new file or nothing."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)
