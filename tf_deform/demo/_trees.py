# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a detector of trees, plain and deformable, and compares them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_deform import data, models, training
from tf_deform._files import writing
from tf_deform._keras import keras
from tf_deform.demo import _compare, _fetch, _photographs, _pictures
from tf_deform.demo._thin_resnet import thin_resnet50

_LOG = logging.getLogger("tf_deform")

# Stages of the backbone that are made deformable.
ARMS = {"plain": None, "deformable": "c3-c5"}
# The plain arm that is trained for as long as the deformable one takes.
LONGER = "plain, as long"
STEPS = 800
# Training is validated and saved this often.
_EPOCHS = 8
_SIZE, _BATCH = 416, 2
# A photograph has up to 300 trees, so COCO's 100 detections would not do.
_MAX_DETECTIONS = 500
# A difference between detectors that find less than this says nothing.
_LEAST_AP50 = 0.35
_METRICS = ("AP", "AP50")
_RATE, _WARM_UP, _DECAY = 5e-4, 100, 1e-4
# At a tenth of the rate, offsets are still next to zero after so few steps.
_OFFSET_MULTIPLIER = 1.0
# Steps are timed in so many turns of so many steps.
_TURNS, _STEPS_A_TURN = 15, 12


def trees(
    out: str | os.PathLike,
    seeds: Sequence[int] = (0,),
    steps: int = STEPS,
    weights: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Compares detectors of trees in aerial photographs, plain and deformable.

    Both are a Faster R-CNN on the same pretrained backbone, a thin ResNet-50
    (see `thin_resnet50` for what it was trained for), whose stem, stage c2 and
    normalisation stay frozen. They see the same crops of one photograph with
    473 trees, and are tested on tiles of others: of another place in the same
    park, of Florida and of California. The epoch with the best AP in the rest
    of the training photograph is tested.

    In the folder it leaves

        metrics.json     every number that is logged, and what it was made of
        boxes.png        what both find in a tile of each test photograph
        sampling.png     where the deformable backbone looks for some trees
        photographs/     training, validation and test sets, in VOC's form
        runs/            a folder for each arm and seed: the model and, for
                         each test photograph, results and truth as COCO's JSON

    A call that was interrupted goes on when it is repeated.

    Args:
        out: Folder for results.
        seeds: Seeds of the initial weights and of the order of crops. With two
            or more, the plain arm is also trained for as long as the deformable
            one takes.
        steps: Number of training steps, a multiple of 8.
        weights: The file open_nsfw.onnx; None fetches it.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: `out` holds a run with other settings, or an argument is
            wrong.
        RuntimeError: Photographs or weights cannot be fetched.
    """
    if steps < _EPOCHS or steps % _EPOCHS:
        raise ValueError(
            f"Expected `steps` to be a multiple of {_EPOCHS}. Received: {steps}"
        )
    out = pathlib.Path(out)
    if weights is None:
        weights = _fetch.fetch(_fetch.WEIGHTS) / "open_nsfw.onnx"
    sets = read_sets(_photographs.write(out / "photographs"))
    runs = _Runs(out / "runs", sets, str(weights))
    pairs = [("deformable", "plain")]
    plan = {arm: steps for arm in ARMS}
    times = None
    if len(seeds) > 1:
        # Times are taken first, when the machine has done nothing else yet.
        times = runs.time_steps(steps)
        plan[LONGER] = _steps_as_long(times["ratio"], steps)
        pairs.append(("deformable", LONGER))
    results = [
        runs.run(arm, seed, count)
        for arm, count in plan.items()
        for seed in sorted(set(seeds))
    ]
    metrics = _summarise(results, pairs, out / "runs", sets)
    metrics["step_times"] = times
    training.write_metrics(out / "metrics.json", metrics)
    _LOG.info("\n%s", _report(metrics))
    _draw(out, sets, runs, sorted(seeds)[0])
    _LOG.info("Written to %s", out)
    return metrics


def read_sets(folder: pathlib.Path) -> dict[str, Any]:
    """Reads the sets of `_photographs.write` as `Annotations`, by name."""
    return {
        name: data.read(f"voc:{folder / name}")
        for name in ("train", "val", *_photographs.TESTS)
    }


def build(weights: str, stages: str | None, seed: int) -> keras.Model:
    """Returns an untrained detector on the pretrained backbone.

    The regions are pooled from maps of half the usual channels, and the
    smallest anchor has 16 pixels, as trees have 8 to 108.

    Args:
        weights: Path of open_nsfw.onnx.
        stages: Stages to make deformable, or None.
        seed: Seed of the weights that are not pretrained.
    """
    backbone = thin_resnet50(weights, _SIZE)
    if stages is not None:
        models.make_deformable(backbone, stages, verbose=False)
    models.train_only(backbone, "c3-", freeze_batch_norm=True)
    # Both arms get the same other weights: what was random before is replaced.
    keras.utils.set_random_seed(seed)
    return models.FasterRCNN(
        backbone,
        1,
        image_size=_SIZE,
        class_names=(_photographs.CLASS,),
        fpn_channels=96,
        head_units=256,
        anchor_scales=(4,),
        anchor_ratios=(1,),
        # Most trees are smaller than half of the smallest anchor.
        min_anchor_overlap=0.0,
        candidates=300,
        proposals=300,
        samples=128,
        max_detections=300,
        min_score=0.01,
        seed=seed,
    )


class _Runs:
    """Trains and tests arms, each in a folder of its own.

    Args:
        folder: Parent of these folders.
        sets: The sets of photographs by name.
        weights: Path of open_nsfw.onnx.
    """

    def __init__(
        self, folder: pathlib.Path, sets: dict[str, Any], weights: str
    ) -> None:
        self._folder, self._sets, self._weights = folder, sets, weights

    def folder(self, arm: str, seed: int) -> pathlib.Path:
        name = f"{arm}-seed{seed}".replace(", ", "-").replace(" ", "-")
        return self._folder / name

    def run(self, arm: str, seed: int, steps: int) -> dict[str, Any]:
        folder = self.folder(arm, seed)
        weights = pathlib.Path(self._weights).read_bytes()
        result = _compare.run_once(
            folder,
            {
                "arm": arm,
                "seed": seed,
                "steps": steps,
                "weights": hashlib.sha256(weights).hexdigest(),
            },
            lambda: self._run(folder, arm, seed, steps),
        )
        # Once there is a result, nothing needs the state of training.
        for name in ("best.keras", "last.keras"):
            (folder / name).unlink(missing_ok=True)
        return result

    def time_steps(self, steps: int) -> dict[str, Any]:
        """Times training of both arms, in random turns on the same batches.

        Args:
            steps: Number of steps of a run, on which the rates depend.

        Returns:
            Under "ms_per_step" the median of each arm; under "ratios", for each
            turn, by how much a step of the deformable arm takes longer, and
            under "ratio" their median.
        """
        return _compare.run_once(
            self._folder / "step-times",
            {"turns": _TURNS, "steps_a_turn": _STEPS_A_TURN, "steps": steps},
            lambda: self._time_steps(steps),
        )

    def _time_steps(self, steps: int) -> dict[str, Any]:
        _LOG.info("Timing the steps of both models in turns")
        fits = {}
        for arm, stages in ARMS.items():
            model = build(self._weights, stages, 0)
            self._compile(model, steps)
            fits[arm] = functools.partial(
                model.fit,
                self._batches(0, 0),
                steps_per_epoch=_STEPS_A_TURN,
                shuffle=False,
                verbose=0,
            )
            fits[arm]()  # The first call traces.
        order, seconds = random.Random(0), {arm: [] for arm in ARMS}
        for _ in range(_TURNS):
            for arm in order.sample(list(ARMS), len(ARMS)):
                history = fits[arm](callbacks=[_compare.Timer()]).history
                seconds[arm] += history["seconds"]
        ratios = np.divide(seconds["deformable"], seconds["plain"])
        return {
            "ms_per_step": {
                arm: 1000 * float(np.median(each)) / _STEPS_A_TURN
                for arm, each in seconds.items()
            },
            "ratio": float(np.median(ratios)),
            "ratios": ratios.tolist(),
        }

    def load(self, arm: str, seed: int) -> keras.Model:
        path = self.folder(arm, seed) / "model.keras"
        return keras.saving.load_model(path, compile=False)

    def _run(
        self, folder: pathlib.Path, arm: str, seed: int, steps: int
    ) -> dict[str, Any]:
        model = build(self._weights, ARMS.get(arm), seed)
        _LOG.info("%s, seed %d: %d steps", arm, seed, steps)
        seconds = self._train(model, folder, f"{arm}, seed {seed}", seed, steps)
        model.load_weights(folder / "best.keras")
        measured: dict[str, Any] = {
            "parameters": sum(
                int(np.prod(variable.shape))
                for variable in model.trainable_variables
            ),
            # The median leaves out the first epoch, in which graphs are traced.
            "ms_per_step": 1000 * float(np.median(seconds)) * _EPOCHS / steps,
        }
        for name in _photographs.TESTS:
            judge = make_judge(self._sets[name])
            results = judge.results(
                models.predictions(model, self._sets[name].photographs)
            )
            training.write_metrics(folder / f"results-{name}.json", results)
            training.write_metrics(folder / f"truth-{name}.json", judge.coco)
            measured[name] = judge.measure(results)
        with writing(folder / "model.keras") as partial:
            model.save(partial)
        return measured

    def _train(
        self,
        model: keras.Model,
        folder: pathlib.Path,
        title: str,
        seed: int,
        steps: int,
    ) -> list[float]:
        """Trains a model, and returns how long epochs took, in seconds."""
        self._compile(model, steps)
        checkpoints = training.BestAndLast(folder, "val_AP")
        start = checkpoints.restore(model)
        if start < steps:
            val = self._sets["val"]
            judge = training.CocoCallback(
                make_judge(val),
                lambda: models.predictions(model, val.photographs),
            )
            model.fit(
                self._batches(seed, start),
                initial_epoch=checkpoints.epoch,
                epochs=_EPOCHS,
                steps_per_epoch=steps // _EPOCHS,
                shuffle=False,  # The crops are drawn at random already.
                callbacks=[_compare.Timer(), judge, _Line(title), checkpoints],
                verbose=0,
            )
        return [record["seconds"] for record in checkpoints.history]

    def _compile(self, model: keras.Model, steps: int) -> None:
        optimizer = keras.optimizers.AdamW(
            training.WarmUpSteps(
                _RATE,
                (steps * 8 // 12, steps * 11 // 12),
                warm_up_steps=min(_WARM_UP, steps // 4),
            ),
            weight_decay=_DECAY,
            global_clipnorm=10.0,
        )
        model.compile(
            training.deformable_optimizer(optimizer, _OFFSET_MULTIPLIER),
            jit_compile=False,
        )

    def _batches(self, seed: int, start: int) -> Any:
        return data.detection_batches(
            self._sets["train"],
            _SIZE,
            _BATCH,
            seed=seed,
            start=start,
            tile=_SIZE,
            flips="all",
        )


class _Line(keras.callbacks.Callback):
    """Logs a line after each epoch."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        _LOG.info(
            "%s, epoch %d of %d, %.0f s: loss %.3f; validation: AP %.3f, "
            "AP50 %.3f",
            self._title,
            epoch + 1,
            self.params["epochs"],
            *(logs[x] for x in ("seconds", "loss", "val_AP", "val_AP50")),
        )


def make_judge(annotations: Any) -> Any:
    """Returns the evaluator of a set."""
    return training.CocoEvaluator(annotations.to_coco(), _MAX_DETECTIONS)


def _steps_as_long(ratio: float, steps: int) -> int:
    """Returns for how many steps the plain arm takes as long as the other."""
    return max(_EPOCHS, _EPOCHS * round(steps * ratio / _EPOCHS))


def _summarise(
    results: list[dict[str, Any]],
    pairs: list[tuple[str, str]],
    folder: pathlib.Path,
    sets: dict[str, Any],
) -> dict[str, Any]:
    """Returns the content of `metrics.json`."""
    compared = []
    for name in _photographs.TESTS:
        for metric in _METRICS:
            for pair in _compare.differences(
                results, lambda r, n=name, m=metric: r[n][m], pairs
            ):
                compared.append({"photograph": name, "metric": metric, **pair})
    runs = _Runs(folder, sets, "")
    for name in _photographs.TESTS:
        if len(sets[name].photographs) > 1:
            _add_tiles(results, compared, name, runs)
    plain = [r["yellowstone"]["AP50"] for r in results if r["arm"] == "plain"]
    return {
        "photographs": {
            name: {
                "place": place,
                "tiles": len(sets[name].photographs),
                "trees": sum(
                    int((~(each.crowd | each.difficult)).sum())
                    for each in sets[name].photographs
                ),
            }
            for name, place in _photographs.TESTS.items()
        },
        "max_detections": _MAX_DETECTIONS,
        "results": results,
        "differences": compared,
        "comparable": bool(np.mean(plain) >= _LEAST_AP50),
        "cpus": len(os.sched_getaffinity(0)),
    }


def _add_tiles(
    results: list[dict[str, Any]],
    compared: list[dict[str, Any]],
    name: str,
    runs: _Runs,
) -> None:
    """Adds intervals over the tiles of a photograph to its differences.

    The tiles are drawn with replacement, the same for all runs; of each draw,
    the difference of arms is that of their means over seeds.
    """
    folders = [runs.folder(r["arm"], r["seed"]) for r in results]
    truth, *found = (
        json.loads(path.read_text())
        for path in (
            folders[0] / f"truth-{name}.json",
            *(folder / f"results-{name}.json" for folder in folders),
        )
    )

    def measure(coco: dict[str, Any], items: list) -> list[float]:
        judge = training.CocoEvaluator(coco, _MAX_DETECTIONS)
        measured = judge.measure(items)
        return [measured[metric] for metric in _METRICS]

    drawn = _compare.bootstrap(truth, found, measure)
    arms = np.array([result["arm"] for result in results])
    for pair in compared:
        if pair["photograph"] == name:
            values = drawn[:, :, _METRICS.index(pair["metric"])]
            delta = values[:, arms == pair["arm"]].mean(1)
            delta = delta - values[:, arms == pair["base"]].mean(1)
            if np.isfinite(delta).any():  # AP needs objects in the tiles.
                pair["interval_over_tiles"] = _compare.percentiles(delta)


def _report(metrics: dict[str, Any]) -> str:
    columns = {
        f"{metric}, {name}": lambda r, n=name, m=metric: r[n][m]
        for name in _photographs.TESTS
        for metric in _METRICS
    }
    lines = [_compare.table(metrics["results"], columns), ""]
    for pair in metrics["differences"]:
        what = f"{pair['metric']}, {_photographs.TESTS[pair['photograph']]}"
        lines.append(_compare.sentence(pair, what))
    if not metrics["comparable"]:
        lines.append(
            "Too poor to be compared: the plain model's AP50 at Yellowstone is "
            f"below {_LEAST_AP50}"
        )
    return "\n".join(lines)


def _draw(
    out: pathlib.Path, sets: dict[str, Any], runs: _Runs, seed: int
) -> None:
    """Draws what models of a seed find, and where the deformable one looks."""
    rows = []
    for name in _photographs.TESTS:
        photographs = sets[name].photographs
        index = len(photographs) // 2
        found = {
            arm: _read_found(
                runs.folder(arm, seed) / f"results-{name}.json", index + 1
            )
            for arm in ARMS
        }
        image = data.read_image(photographs[index].path)
        place = _photographs.TESTS[name]
        rows.append(_pictures.Row(place, image, photographs[index], found))
    _pictures.draw_boxes(out / "boxes.png", rows)
    model = runs.load("deformable", seed)
    _pictures.draw_sampling(out / "sampling.png", model, rows)


def _read_found(path: pathlib.Path, number: int) -> dict[str, np.ndarray]:
    """Returns what a file of results has for an image."""
    items = json.loads(path.read_text())
    items = [item for item in items if item["image_id"] == number]
    boxes = np.reshape([item["bbox"] for item in items], (-1, 4))
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "scores": np.array([item["score"] for item in items]),
    }
