# SPDX-License-Identifier: Apache-2.0
"""Compares arms (models that differ in one property) over seeds and tiles."""

from __future__ import annotations

import itertools
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tf_deform._keras import keras
from tf_deform.training import write_metrics

_LOG = logging.getLogger("tf_deform")
_DRAWS = 400  # of the bootstrap; the interval's ends are the 10th from the end
Results = Sequence[Mapping[str, Any]]


def claim(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Takes a folder for a run, so that no other run's state is resumed.

    Args:
        folder: Folder of the run, made where missing.
        settings: All settings that the result depends on, as JSON holds them.

    Raises:
        ValueError: The folder belongs to a run with other settings.
    """
    record = folder / "settings.json"
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_metrics(record, settings)
    found = json.loads(record.read_text())
    if found != settings:
        raise ValueError(
            f"Expected {folder} to hold a run with {settings}. Received: "
            f"{found}. Remove the folder or choose another one"
        )


def run_once(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    run: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Runs something, or finds that it was done before.

    Args:
        folder: Folder of the run, see `claim`; then it holds `result.json`.
        settings: See `claim`.
        run: Does the work and returns the result, as JSON holds it.

    Returns:
        The settings together with the result.
    """
    claim(folder, settings)
    path = folder / "result.json"
    if not path.exists():
        write_metrics(path, {**settings, **run()})
    else:
        _LOG.info("%s: done before", folder.name)
    return json.loads(path.read_text())


class Timer(keras.callbacks.Callback):
    """Adds the seconds that an epoch's training took to its logs."""

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        self._begin = time.perf_counter()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        logs["seconds"] = time.perf_counter() - self._begin


def differences(
    results: Results,
    read: Callable[[Mapping[str, Any]], float | None],
    pairs: Iterable[tuple[str, str]],
) -> list[dict[str, Any]]:
    """Compares arms seed by seed.

    Args:
        results: Results, each with its "arm" and "seed".
        read: Returns the measure to compare of a result.
        pairs: Pairs of arms. Those without results are left out.

    Returns:
        For each pair the differences per seed, their mean and, for two or more
        seeds, the two ends of their 95 % confidence interval (Student's t).
        Seeds for which a measure is no number (None in a file), as AP is where
        there is no object, stand in "not_measured" instead; without others the
        mean is None.
    """
    scores = {}
    for result in results:
        score = _number(read(result))
        scores.setdefault(result["arm"], {})[result["seed"]] = score
    compared = []
    for arm, base in pairs:
        seeds = sorted(scores.get(arm, {}).keys() & scores.get(base, {}).keys())
        if not seeds:
            continue
        every = {s: scores[arm][s] - scores[base][s] for s in seeds}
        delta = np.array([x for x in every.values() if math.isfinite(x)])
        pair = {
            "arm": arm,
            "base": base,
            "seeds": [s for s in seeds if math.isfinite(every[s])],
            "per_seed": delta.tolist(),
            "mean": float(delta.mean()) if len(delta) else None,
        }
        if len(delta) < len(seeds):
            pair["not_measured"] = sorted({*seeds} - {*pair["seeds"]})
        if len(delta) > 1:
            pair["interval_over_seeds"] = t_interval(delta)
        compared.append(pair)
    return compared


def _number(score: float | None) -> float:
    return math.nan if score is None else float(score)


def t_interval(values: np.ndarray) -> list[float]:
    """Returns the ends of the 95 % interval of a mean (Student's t)."""
    import scipy.stats

    interval = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    return [float(interval.low), float(interval.high)]


def bootstrap(
    truth: Mapping[str, Any],
    results: Sequence[Results],
    measure: Callable[[dict[str, Any], list], Any],
    draws: int = _DRAWS,
) -> np.ndarray:
    """Measures sets of images that are drawn with replacement.

    Args:
        truth: Ground truth in COCO's format.
        results: Lists of results in COCO's format, each of them of one model on
            all images.
        measure: Returns the measures of ground truth and results.
        draws: Number of sets. All models are measured on the same sets.

    Returns:
        `(draws, len(results), measures)`.
    """
    ids = [image["id"] for image in truth["images"]]
    objects, *found = (
        _by_image(items, ids) for items in (truth["annotations"], *results)
    )
    images = {image["id"]: image for image in truth["images"]}
    rng = np.random.default_rng(0)
    measured = []
    for _ in range(draws):
        drawn = [ids[i] for i in rng.integers(len(ids), size=len(ids))]
        copy = {
            **truth,
            "images": [
                {**images[old], "id": new}
                for new, old in enumerate(drawn, start=1)
            ],
            "annotations": _renumbered(objects, drawn),
        }
        for number, item in enumerate(copy["annotations"], start=1):
            item["id"] = number
        measured.append([measure(copy, _renumbered(x, drawn)) for x in found])
    return np.array(measured)


def _by_image(items: Results, ids: Sequence[int]) -> dict[int, list]:
    groups = {number: [] for number in ids}
    for item in items:
        groups[item["image_id"]].append(item)
    return groups


def _renumbered(groups: dict[int, list], drawn: Sequence[int]) -> list[dict]:
    return [
        {**item, "image_id": new}
        for new, old in enumerate(drawn, start=1)
        for item in groups[old]
    ]


def percentiles(values: np.ndarray) -> list[float]:
    """Returns the ends of the middle 95 % of the values that are numbers."""
    return np.nanpercentile(values, (2.5, 97.5)).tolist()


def table(
    results: Results,
    columns: Mapping[str, Callable[[Mapping[str, Any]], float]],
) -> str:
    """Returns a table in Markdown: a row for each arm, means over seeds.

    Args:
        results: Results, each with its "arm", "parameters" and "ms_per_step".
        columns: Titles, each with what returns the measure of a result.
    """
    lines = [
        f"| model | parameters | {' | '.join(columns)} | ms per step |",
        f"|---|---:{'|---:' * len(columns)}|---:|",
    ]
    for arm, group in itertools.groupby(results, lambda r: r["arm"]):
        group = list(group)
        cells = [arm, f"{group[0]['parameters']:,}"]
        for read in columns.values():
            scores = [_number(read(result)) for result in group]
            mean = np.mean(scores)
            cells.append(f"{mean:.3f}" if math.isfinite(mean) else "none")
            if len(scores) > 1 and math.isfinite(mean):
                cells[-1] += f" ± {np.std(scores, ddof=1):.3f}"
        step = np.median([result["ms_per_step"] for result in group])
        lines.append(f"| {' | '.join(cells)} | {step:.0f} |")
    return "\n".join(lines)


def sentence(pair: Mapping[str, Any], metric: str) -> str:
    """Returns a line about one of the `differences`."""
    line = f"{pair['arm']} against {pair['base']}: "
    if pair["mean"] is None:
        return f"{line}{metric} is no number, as where there is no object"
    line += f"{100 * pair['mean']:+.1f} points of {metric}"
    if "not_measured" in pair:
        seeds = ", ".join(map(str, pair["not_measured"]))
        line += f" (it is no number for the seeds {seeds})"
    for what in ("seeds", "tiles"):
        if f"interval_over_{what}" in pair:
            low, high = (100 * x for x in pair[f"interval_over_{what}"])
            line += f", 95 % interval over {what} {low:+.1f} to {high:+.1f}"
    return line
