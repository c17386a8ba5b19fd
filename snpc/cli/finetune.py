"""``snpc finetune`` and ``snpc export-torch``: what needs torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from snpc import show
from snpc.cli.options import FILE, as_json, model_argument, picturing
from snpc.cli.requests import analysed, calibration_of, check_targets
from snpc.errors import UserError


def bridge() -> Any:
    """snpc.torch, which is imported when it is needed only."""
    try:
        import snpc.torch
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UserError(f"this needs {error.name}, which is not installed: pip install 'snpc[torch]'") from None
    return snpc.torch


@click.command()
@click.argument("pruned", type=FILE)
@click.option("--teacher", type=FILE, required=True, help="The dense model that PRUNED was made from.")
@click.option(
    "--data", "calib", metavar="DATA", required=True, help="Inputs to train on (forms as --calib of `snpc prune`)."
)
@click.option("--samples", "calib_samples", default=65536, show_default=True, type=int, help="At most so many samples.")
@click.option("--labels", type=FILE, help="A class per sample, for ce: .npy, .npz or text.")
@click.option("-o", "--output", type=FILE, help="The tuned model.  [default: PRUNED-tuned.onnx]")
@click.option(
    "--loss",
    type=click.Choice(["kd", "ce", "mse", "kd+ce"]),
    help="kd: the teacher's logits, softened; mse: its outputs; ce: the labels.  [default: kd]",
)
@click.option("--temperature", type=float, help="Of kd.  [default: 2]")
@click.option("--layerwise", is_flag=True, default=None, help="Also the teacher's hidden states behind every layer.")
@click.option(
    "--output-name", "outputs", multiple=True, metavar="NAME", help="The logits, where several outputs could be."
)
@click.option("--epochs", type=int, help="Passes over the data.  [default: 20]")
@click.option("--steps", type=int, help="Steps, instead of epochs.")
@click.option("--batch", type=int, help="Samples per step, over all processes.  [default: 32]")
@click.option("--lr", type=float, help="Highest learning rate of AdamW.  [default: 0.0003]")
@click.option("--decay", type=float, help="Weight decay, of matrices only.  [default: 0.01]")
@click.option("--warmup", type=int, help="Steps up to it.  [default: a twentieth of all]")
@click.option("--clip", type=float, help="Largest norm of the gradient; 0: any.  [default: 1]")
@click.option("--ema", type=float, help="Write a moving average of the weights, with this decay.")
@click.option(
    "--early-stop",
    type=int,
    metavar="N",
    help="Hold a tenth of the data out; stop after N evaluations that are no better.",
)
@click.option("--evaluate", type=int, metavar="STEPS", help="Steps between evaluations.  [default: an epoch, or less]")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="auto: bf16 on GPUs that have it.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides the order of the data.")
@click.option("--checkpoint", type=FILE, metavar="DIR", help="Save the state of the run here as it goes.")
@click.option("--checkpoint-every", default=50, show_default=True, type=int, metavar="STEPS", help="How often.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint, if there is one.")
@picturing
@as_json
def finetune(
    pruned: Path,
    teacher: Path,
    labels: Path | None,
    output: Path | None,
    seed: int,
    checkpoint: Path | None,
    checkpoint_every: int,
    resume: bool,
    json_path: Path | None,
    **flags: Any,
) -> None:
    """Train PRUNED towards what the dense model says, and write it under the same names.

    No labels are needed. Under torchrun, processes share every batch.
    """
    torch = bridge()
    from snpc.runtime.model_io import data_file, model_files

    target = output or pruned.with_name(f"{pruned.stem}-tuned.onnx")
    reading = ("calib", "calib_samples", "image_size", "image_mean", "image_std", "image_layout")
    calib = {name: flags.pop(name) for name in reading}
    training = torch.Training(**{k: v for k, v in flags.items() if v not in (None, ())}, seed=seed)
    if resume and checkpoint is None:
        raise UserError("--resume goes on from a checkpoint: say where it is with --checkpoint")
    check_targets([target, data_file(target), json_path], *model_files(pruned), *model_files(teacher), calib["calib"])
    data = calibration_of(analysed(teacher), **calib, calib_batch=training.batch, seed=seed)
    saved = torch.Saved(checkpoint, checkpoint_every, resume) if checkpoint else None
    with show.training() as report:
        result = torch.finetune(
            pruned, teacher, data, target, training=training, labels=labels, saved=saved, report=report
        )
    if result is None:
        return  # one of several processes, and not the one that writes
    show.emit_json(torch.report(result), json_path)
    if str(json_path) != "-":
        show.tuned(result)


@click.command("export-torch")
@model_argument
@click.option("-o", "--output", type=FILE, help="Folder for both files.  [default: MODEL without its suffix]")
def export_torch(model: Path, output: Path | None) -> None:
    """Write the weights of MODEL as safetensors, and the widths of its layers as JSON."""
    torch = bridge()
    for path in torch.export_tensors(model, output or model.with_suffix("")):
        show.line(str(path))
