"""What a model is finetuned with: the fields of ``snpc.torch.TrainingOptions``, the data, and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import click

from snpc.cli.arguments.calibration import CalibrationArguments, ImageArguments
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, option, subgroup
from snpc.cli.arguments.metric import METRIC_HELP
from snpc.cli.arguments.parsers import parse_given_roles
from snpc.cli.arguments.text import TextArguments
from snpc.errors import UserError
from snpc.types import Role

if TYPE_CHECKING:  # these need torch
    from snpc.torch import CheckpointOptions, TrainingOptions


@dataclass(frozen=True)
class TrainingArguments(ArgumentGroup):
    """The options of a training run; None where ``TrainingOptions`` has a default."""

    section: ClassVar[str] = "Training"

    loss: Literal["kd", "ce", "mse", "kd+ce"] | None = option(
        "--loss",
        type=click.Choice(["kd", "ce", "mse", "kd+ce"]),
        help="kd: the teacher's logits at --temperature; mse: the teacher's outputs; ce: the labels.  [default: kd]",
    )
    temperature: float | None = option("--temperature", type=float, help="Temperature of kd.  [default: 2]")
    layerwise: bool | None = option(
        "--layerwise", is_flag=True, default=None, help="Also match the teacher's hidden states behind every layer."
    )
    outputs: tuple[str, ...] = option(
        "--output-name", multiple=True, metavar="NAME", help="The logits, where several outputs could be; repeatable."
    )
    epochs: int | None = option("--epochs", type=int, help="Passes over the data.  [default: 20]")
    steps: int | None = option("--steps", type=int, help="Steps, instead of epochs.")
    batch: int | None = option("--batch", type=int, help="Samples per step, over all processes.  [default: 32]")
    lr: float | None = option("--lr", type=float, help="Highest learning rate of AdamW.  [default: 0.0003]")
    decay: float | None = option("--decay", type=float, help="Weight decay, of matrices only.  [default: 0.01]")
    regularize: Literal["decay", "lobster"] | None = option(
        "--regularize",
        type=click.Choice(["decay", "lobster"]),
        help="decay: all weights alike, by --decay. lobster: each by what its gradient is short of one; needs "
        "--sparsify.  [default: decay]",
    )
    sparsify: float | None = option(
        "--sparsify",
        type=float,
        metavar="RISE",
        help="Set the smallest weights to zero, as many as let the held-out loss rise by this much above that of the "
        "given weights: unstructured sparsity.",
    )
    warmup: int | None = option(
        "--warmup", type=int, help="Steps up to the highest learning rate.  [default: a twentieth of all]"
    )
    clip: float | None = option("--clip", type=float, help="Largest norm of the gradient; 0: no limit.  [default: 1]")
    ema: float | None = option(
        "--ema", type=float, help="Write an exponential moving average of the weights, with this decay."
    )
    early_stop: int | None = option(
        "--early-stop",
        type=int,
        metavar="N",
        help="Stop after N evaluations on the held-out data without improvement.",
    )
    evaluate: int | None = option(
        "--evaluate", type=int, metavar="STEPS", help="Steps between evaluations.  [default: an epoch, or less]"
    )
    adapters: int | None = option(
        "--adapters", type=int, metavar="RANK", help="Train low-rank updates of the matrices, and nothing else."
    )
    reinit: Literal["epochs", "budget"] | None = option(
        "--reinit",
        type=click.Choice(["epochs", "budget"]),
        help="Begin with new weights. epochs: train for as many steps; budget: for as much compute as the teacher's "
        "size would take.",
    )
    precision: Literal["auto", "fp32", "bf16"] | None = option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16"]),
        help="Precision of training. auto: bf16 on GPUs that have it.  [default: auto]",
    )
    sharded: bool | None = option(
        "--sharded", is_flag=True, default=None, help="Under torchrun: each process holds a part of the weights."
    )
    metric: tuple[str, ...] = option(
        "--metric", multiple=True, metavar="[OUTPUT=]NAME|FILE.py:FUNCTION", section="Checks", help=METRIC_HELP
    )

    def load(self, seed: int) -> TrainingOptions:
        from snpc.torch import TrainingOptions

        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return TrainingOptions(**{k: v for k, v in values.items() if v not in (None, ())}, seed=seed)


@dataclass(frozen=True)
class TrainingDataArguments(ArgumentGroup):
    """Inputs to train on, and their classes."""

    section: ClassVar[str] = "Inputs"

    calib: str = option(
        "--data",
        "--calib",
        metavar="DATA",
        required=True,
        help="Inputs to train on (forms as --calib of `snpc prune`).",
    )
    calib_samples: int = option(
        "--samples",
        "--calib-samples",
        default=65536,
        show_default=True,
        type=int,
        help="Use at most this many samples.",
    )
    labels: str | None = option(
        "--labels",
        metavar="FILE",
        help="A class per sample, for ce: .npy, .npz or text. With --eval: the array of that .npz with the right "
        "classes.",
    )
    images: ImageArguments = subgroup(section="Inputs")
    text: TextArguments = subgroup(section="Inputs")
    seed: int = option(
        "--seed", default=0, show_default=True, type=click.IntRange(0), help="Seed for the order of the data."
    )

    def as_calibration(self, batch: int) -> CalibrationArguments:
        """The same data as calibration data, in batches of ``batch`` samples."""
        return CalibrationArguments(
            calib=self.calib,
            calib_samples=self.calib_samples,
            calib_batch=batch,
            images=self.images,
            text=self.text,
            seed=self.seed,
        )


@dataclass(frozen=True)
class CheckpointArguments(ArgumentGroup):
    """Where the state of a run is saved."""

    section: ClassVar[str] = "Running"

    checkpoint: Path | None = option(
        "--checkpoint", type=FILE_PATH, metavar="DIR", help="Save the state of the run in this folder as it goes."
    )
    checkpoint_every: int = option(
        "--checkpoint-every",
        default=50,
        show_default=True,
        type=int,
        metavar="STEPS",
        help="Steps between checkpoints.",
    )
    resume: bool = option("--resume", is_flag=True, help="Continue from the checkpoint, if there is one.")

    def load(self) -> CheckpointOptions | None:
        from snpc.torch import CheckpointOptions

        if self.checkpoint is None:
            if self.resume:
                raise UserError("--resume goes on from a checkpoint: say where it is with --checkpoint")
            return None
        return CheckpointOptions(self.checkpoint, self.checkpoint_every, self.resume)


@dataclass(frozen=True)
class ScheduleArguments(ArgumentGroup):
    """Pruning while training: masks that are learned, or rounds of pruning and training."""

    section: ClassVar[str] = "Pruning"

    masks: Literal["vib", "psp", "apma"] | None = option(
        "--learn-masks",
        type=click.Choice(["vib", "psp", "apma"]),
        help="Train a mask on every unit of PRUNED (the teacher itself) and prune by the masks; needs --target.",
    )
    schedule: Literal["cubic", "adaptive"] | None = option(
        "--schedule",
        type=click.Choice(["cubic", "adaptive"]),
        help="Prune PRUNED (the teacher itself) to --target in rounds, and train after each. cubic: by the cubic "
        "schedule. adaptive: in equal steps; a step that exceeds --max-drift or --max-drop is undone and halved.",
    )
    target: str | None = option(
        "--target", metavar="macs=R", help="With --learn-masks or --schedule: fraction of the MACs to prune to."
    )
    roles: tuple[Role, ...] | None = option(
        "--roles",
        metavar="ROLE,...",
        callback=parse_given_roles,
        help="With --learn-masks: what gets a mask, units of these roles as in `snpc prune`, or layer alone: whole "
        "layers (vib).  [default: qk,vo,ffn]",
    )
    rounds: int | None = option(
        "--rounds",
        type=click.IntRange(1),
        help="With --schedule: number of rounds; adaptive: size of the first step, as 1/N of the way.  [default: 4]",
    )
    criterion: str | None = option(
        "--criterion", metavar="NAME", help="With --schedule: select units by it.  [default: closed forms]"
    )
    max_drift: float | None = option(
        "--max-drift",
        type=float,
        help="With --schedule adaptive: largest drift of the outputs (relative RMS) after training.",
    )
    max_drop: float | None = option(
        "--max-drop",
        type=float,
        help="With --schedule adaptive: largest loss of accuracy in points (1.0: one in a hundred), on --eval "
        "and --labels.",
    )
    held_out: str | None = option(
        "--eval", metavar="DATA", help="With --max-drop: inputs to evaluate on (forms as --data)."
    )

    def check_unused(self) -> None:
        """Refuse options of a schedule without one, and of masks without them."""
        if self.masks is None and self.roles is not None:
            raise UserError("--roles is for --learn-masks: cut with `snpc prune`, then finetune")
        used = (self.rounds, self.criterion, self.max_drift, self.max_drop, self.held_out)
        if self.schedule is None and used != (None,) * 5:
            raise UserError(
                "--rounds, --criterion, --max-drift, --max-drop and --eval are for --schedule: cut with `snpc prune`, "
                "then finetune"
            )
