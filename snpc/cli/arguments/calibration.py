"""Calibration data, evaluation data and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import click
import numpy as np

import snpc
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, option, subgroup
from snpc.cli.arguments.parsers import parse_numbers, parse_shard
from snpc.cli.arguments.text import TextArguments
from snpc.cli.tables import print_line, print_note
from snpc.errors import UserError
from snpc.pipeline import PlanRequest, measure_request
from snpc.runtime.calibration import MAX_HELD_OUT, Calibration, read_picture_labels
from snpc.runtime.evaluation import EvaluationData, TaskMetric
from snpc.runtime.execution import Execution
from snpc.targets import kept_vocabulary
from snpc.types import AnyArray, TensorSpec

RANDOM_CALIBRATION = "random"  # --calib without data; a file of that name is ./random
ALL_SAMPLES = 1 << 30


@dataclass(frozen=True)
class ImageArguments(ArgumentGroup):
    """How pictures become inputs."""

    section: ClassVar[str] = "Calibration"

    image_size: str | None = option(
        "--image-size", metavar="H,W", help="Size of calibration images.  [default: the model's input size]"
    )
    image_mean: str | None = option(
        "--image-mean", metavar="R,G,B", help="Mean of each channel, of pixels in 0..1.  [default: ImageNet's]"
    )
    image_std: str | None = option(
        "--image-std", metavar="R,G,B", help="Standard deviation of each channel.  [default: ImageNet's]"
    )
    image_layout: Literal["nchw", "nhwc"] | None = option(
        "--image-layout", type=click.Choice(["nchw", "nhwc"]), help="Axis order of the model's image input."
    )

    def is_given(self) -> bool:
        return (self.image_size, self.image_mean, self.image_std, self.image_layout) != (None,) * 4

    def load(self) -> snpc.ImageOptions:
        """The options as ``load_calibration`` takes them; what is not given is ImageNet's."""
        images = snpc.ImageOptions()
        size = parse_numbers(self.image_size, "--image-size", int, (2,))
        mean = parse_numbers(self.image_mean, "--image-mean", float, (1, 3, 4))
        std = parse_numbers(self.image_std, "--image-std", float, (1, 3, 4))
        return snpc.ImageOptions(
            size=(size[0], size[1]) if size is not None else images.size,
            mean=mean if mean is not None else images.mean,
            std=std if std is not None else images.std,
            layout=self.image_layout or images.layout,
        )

    def print_format(self, calibration: Calibration) -> None:
        """Say how pictures were prepared: a model that was trained on others does not tell that it gets wrong ones."""
        if calibration.images is not None:
            given = self.image_mean is not None or self.image_std is not None or calibration.images.raw
            advice = "" if given else " (ImageNet's; --image-mean and --image-std change it)"
            drawn = f"{calibration.samples} of {calibration.available} from {calibration.source}"
            print_note(f"pictures: {drawn}, {calibration.images.describe()}{advice}")


@dataclass(frozen=True)
class CalibrationArguments(ArgumentGroup):
    """Unlabeled inputs to measure on."""

    section: ClassVar[str] = "Calibration"

    calib: str | None = option(
        "--calib",
        "--calibration-data",
        "--data",
        metavar="DATA",
        help="Unlabeled inputs: .npz keyed by input name, .npy, a folder of these, a folder of images, text (.txt, or "
        ".jsonl with a text per line), Polygraphy JSON, test_data_set_*/input_N.pb, or file.py:function (runs that "
        "code). random: noise, where there is no data.",
    )
    calib_samples: int = option(
        "--calib-samples", default=128, show_default=True, type=int, help="Number of samples to use."
    )
    calib_batch: int = option("--calib-batch", default=8, show_default=True, type=int, help="Samples per run.")
    images: ImageArguments = subgroup()
    text: TextArguments = subgroup()
    seed: int = option(
        "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed for drawing samples of larger data."
    )

    def check(self, *others: str | None) -> None:
        """Refuse options of images and text that no data can use. ``others``: data beside --calib."""
        if self.calib is None and self.images.is_given():
            raise UserError("--image-size, -mean, -std and -layout describe calibration images: give --calib too")
        self.text.check(self.calib, *others)

    def load(
        self, analysis: snpc.Analysis, held_out: int = MAX_HELD_OUT, others: Sequence[str | None] = ()
    ) -> Calibration | None:
        """The data as the flags describe it, noise for ``--calib random``, None without --calib. ``others``: data that
        is loaded too."""
        self.check(*others)
        return self.load_data(self.calib, analysis, held_out) if self.calib is not None else None

    def load_data(self, source: str, analysis: snpc.Analysis, held_out: int = MAX_HELD_OUT) -> Calibration:
        """``source`` in place of --calib, prepared in the same way; at most ``held_out`` samples are held out."""
        if source == RANDOM_CALIBRATION and not self.images.is_given():
            print_note("--calib random: the model is fitted to noise; its own inputs, without labels, serve it better")
            return snpc.random_calibration(analysis, samples=self.calib_samples, batch=self.calib_batch, seed=self.seed)
        text = replace(self.text.load(analysis.model.source), vocabulary=kept_vocabulary(analysis.model))
        return self.load_inputs(source, analysis.model.inputs, text, held_out)

    def load_whole(self, inputs: Sequence[TensorSpec], model: Path) -> Calibration | None:
        """Data for a model of several parts, one of which is in the file ``model``; None without data, and where each
        part gets noise of its own."""
        self.check()
        if self.calib is None or (self.calib == RANDOM_CALIBRATION and not self.images.is_given()):
            return None
        return self.load_inputs(self.calib, inputs, self.text.load(model), MAX_HELD_OUT)

    def load_inputs(
        self, source: str, inputs: Sequence[TensorSpec], text: snpc.TextOptions, held_out: int
    ) -> Calibration:
        """``source`` for a model with these inputs."""
        images = self.images.load()
        if self.images.is_given() and not Path(source).is_dir():
            raise UserError(
                f"{source}: --image-size, -mean, -std and -layout are for a folder of images; leave them out"
            )
        calibration = snpc.load_calibration(
            source,
            inputs,
            samples=self.calib_samples,
            batch=self.calib_batch,
            images=images,
            seed=self.seed,
            held_out=held_out,
            text=text,
        )
        self.images.print_format(calibration)
        self.text.print_format(calibration)
        return calibration

    def load_evaluation(
        self, source: str, labels: str | None, analysis: snpc.Analysis, metric: TaskMetric | None = None
    ) -> EvaluationData:
        """All samples of ``source``, prepared in the same way, with the array ``labels`` of it, by which ``metric``
        (None: top1) scores the first output."""
        if metric is not None and labels is None:
            raise UserError(f"--metric {metric.name} scores outputs on labels: give --labels NAME too")
        inputs = replace(self, calib_samples=ALL_SAMPLES).load_data(source, analysis, held_out=0)
        if labels is None:
            return EvaluationData(inputs)
        if labels.endswith(".npy"):
            return EvaluationData(inputs, read_labels(Path(labels)), metric or TaskMetric())
        if labels.endswith(".csv"):
            return EvaluationData(inputs, read_picture_labels(Path(source), Path(labels)), metric or TaskMetric())
        if not source.endswith(".npz"):
            raise UserError(
                f"{source}: --labels names an array of an .npz, an .npy file, or for a folder of pictures a .csv with "
                "file name and class"
            )
        with np.load(source) as arrays:
            if labels not in arrays:
                raise UserError(f"{source}: holds no {labels!r}; it has {', '.join(arrays)}")
            return EvaluationData(inputs, arrays[labels], metric or TaskMetric())


def read_labels(path: Path) -> AnyArray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise UserError(f"--labels {path}: cannot be read as an array ({error})") from None


@dataclass(frozen=True)
class EvaluationArguments(ArgumentGroup):
    """Inputs with labels, on which models are scored."""

    section: ClassVar[str] = "Evaluation"

    held_out: str | None = option(
        "--eval",
        metavar="DATA",
        help="Inputs to score the original and the result on (forms as --calib).",
    )
    labels: str | None = option(
        "--labels",
        metavar="NAME|FILE.npy|FILE.csv",
        help="The right class (or score) of every sample of --eval: an array of its .npz, or a file; of a folder of "
        "pictures, a .csv with file name and class.",
    )

    def check(self) -> None:
        """Refuse labels of nothing."""
        if self.labels and not self.held_out:
            raise UserError("--labels are those of --eval: give --eval DATA too")


@dataclass(frozen=True)
class ScoredCalibrationArguments(CalibrationArguments):
    """Unlabeled inputs to measure on, and others on which models are scored."""

    evaluating: EvaluationArguments = subgroup()

    def load_scored(self, analysis: snpc.Analysis, metric: TaskMetric | None) -> EvaluationData | None:
        """The data of --eval; None without. ``metric``: how the labels are scored."""
        source = self.evaluating.held_out
        if source is not None:
            return self.load_evaluation(source, self.evaluating.labels, analysis, metric)
        if metric is not None:
            raise UserError(f"--metric {metric.name} scores outputs on labels: give --eval DATA --labels NAME")
        return None

    def sources(self) -> list[str | None]:
        """What is read."""
        return [self.calib, self.evaluating.held_out]


@dataclass(frozen=True)
class StatisticsArguments(ArgumentGroup):
    """Statistics of the calibration data in files."""

    section: ClassVar[str] = "Calibration"

    load_stats: tuple[Path, ...] = option(
        "--load-stats",
        multiple=True,
        type=FILE_PATH,
        metavar="FILE",
        help="Read statistics that --save-stats wrote, instead of measuring them; repeat to add several up. Without "
        "--calib, for --method parallel and select only.",
    )

    def load(self) -> snpc.Statistics | None:
        """The files added up, None without --load-stats."""
        return snpc.load_statistics(*self.load_stats) if self.load_stats else None


@dataclass(frozen=True)
class SavedStatisticsArguments(StatisticsArguments):
    """Statistics that are read, and written."""

    save_stats: Path | None = option(
        "--save-stats", type=FILE_PATH, metavar="FILE", help="Write the measured statistics here, for --load-stats."
    )

    shard: tuple[int, int] | None = option(
        "--shard",
        metavar="I/N",
        callback=parse_shard,
        help="Measure part I of N of the samples, write it with --save-stats and stop: for job arrays, whose N files "
        "--load-stats adds up.",
    )

    def measure_shard(
        self, analysis: snpc.Analysis, calibration: Calibration | None, request: PlanRequest, execution: Execution
    ) -> None:
        """Measure and write the part of --shard."""
        assert self.shard is not None
        if self.save_stats is None or self.load_stats:
            raise UserError("--shard measures a part of the samples for a file: give --save-stats, and no --load-stats")
        if calibration is None:
            raise UserError("--shard measures a part of the samples: give --calib")
        index, count = self.shard
        statistics = measure_request(analysis, request, calibration.shard(index, count), execution)
        snpc.save_statistics(statistics, self.save_stats)
        print_line(
            f"statistics of part {index} of {count} ({statistics.samples} of {calibration.samples} samples) written to "
            f"{self.save_stats}"
        )

    def check_no_widths(self) -> None:
        """Refuse, where no widths are cut, the statistics that only widths need."""
        for flag, value in (
            ("--load-stats", self.load_stats),
            ("--save-stats", self.save_stats),
            ("--shard", self.shard),
        ):
            if value not in (None, ()):
                raise UserError(f"no widths are cut: leave out {flag}, or give --ratio or --target, and --roles")
