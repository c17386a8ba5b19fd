"""``snpc finetune`` and ``snpc export-torch``: what needs torch."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from snpc.cli import progress as bars
from snpc.cli import tables as show
from snpc.cli.arguments import (
    calibration_from_flags,
    check_output_paths,
    evaluation_from_flags,
    load_and_analyze,
    write_text_file,
)
from snpc.cli.options import PATH_TYPE, image_options, json_option, model_argument
from snpc.errors import UserError
from snpc.planning.config import parse_target


def import_torch_package() -> Any:
    """snpc.torch, which is imported when it is needed only."""
    try:
        import snpc.torch
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UserError(f"this needs {error.name}, which is not installed: pip install 'snpc[torch]'") from None
    return snpc.torch


@click.command("finetune")
@click.argument("pruned", type=PATH_TYPE)
@click.option("--teacher", type=PATH_TYPE, required=True, help="The dense model that PRUNED was made from.")
@click.option(
    "--data", "calib", metavar="DATA", required=True, help="Inputs to train on (forms as --calib of `snpc prune`)."
)
@click.option("--samples", "calib_samples", default=65536, show_default=True, type=int, help="At most so many samples.")
@click.option(
    "--labels",
    metavar="FILE",
    help="A class per sample, for ce: .npy, .npz or text. With --eval: the array of that .npz with the right classes.",
)
@click.option("-o", "--output", type=PATH_TYPE, help="The tuned model.  [default: PRUNED-tuned.onnx]")
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
@click.option("--adapters", type=int, metavar="RANK", help="Train low-rank updates of the matrices, and nothing else.")
@click.option(
    "--reinit",
    type=click.Choice(["epochs", "budget"]),
    help="Begin with new weights: as many steps, or as much computing as that for the teacher's size.",
)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), help="auto: bf16 on GPUs that have it.")
@click.option("--sharded", is_flag=True, default=None, help="Under torchrun: each process holds a part of the weights.")
@click.option(
    "--learn-masks",
    "masks",
    type=click.Choice(["vib", "psp", "apma"]),
    help="Train a factor on every unit of PRUNED (the teacher itself) and cut what they close; needs --target.",
)
@click.option(
    "--schedule",
    type=click.Choice(["cubic", "adaptive"]),
    help="Cut PRUNED (the teacher itself) to --target in rounds, training after each: by the cubic schedule, or in "
    "equal steps that are taken back and halved where --max-drift or --max-drop is exceeded.",
)
@click.option(
    "--rounds", type=click.IntRange(1), help="With --schedule: how many; adaptive: for the first step.  [default: 4]"
)
@click.option("--max-drift", type=float, help="With --schedule adaptive: largest drift of the outputs after training.")
@click.option(
    "--max-drop", type=float, help="Or: largest share of right answers lost (0.01: one point), on --eval and --labels."
)
@click.option(
    "--eval", "held_out", metavar="DATA", help="With --max-drop: inputs to judge by (forms as --data), as `snpc sweep`."
)
@click.option("--criterion", metavar="NAME", help="With --schedule: select units by it.  [default: closed forms]")
@click.option("--target", metavar="macs=R", help="With --learn-masks or --schedule: the share of MACs to come down to.")
@click.option("--plan", "plan_path", type=PATH_TYPE, help="With --learn-masks: also write the plan here.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Decides the order of the data.")
@click.option("--checkpoint", type=PATH_TYPE, metavar="DIR", help="Save the state of the run here as it goes.")
@click.option("--checkpoint-every", default=50, show_default=True, type=int, metavar="STEPS", help="How often.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint, if there is one.")
@image_options
@json_option
def finetune_command(
    pruned: Path,
    teacher: Path,
    labels: str | None,
    output: Path | None,
    seed: int,
    checkpoint: Path | None,
    checkpoint_every: int,
    resume: bool,
    json_path: Path | None,
    masks: str | None,
    target: str | None,
    plan_path: Path | None,
    schedule: str | None,
    rounds: int | None,
    max_drift: float | None,
    max_drop: float | None,
    held_out: str | None,
    criterion: str | None,
    **flags: Any,
) -> None:
    """Train PRUNED towards what the dense model says, and write it under the same names.

    No labels are needed. Under torchrun, processes share every batch.
    """
    torch = import_torch_package()
    from snpc.runtime.io.atomic import external_data_path
    from snpc.runtime.io.load import model_files

    written = output or pruned.with_name(f"{pruned.stem}-tuned.onnx")
    reading = ("calib", "calib_samples", "image_size", "image_mean", "image_std", "image_layout")
    calib = {name: flags.pop(name) for name in reading}
    given = {k: v for k, v in flags.items() if v not in (None, ())}
    training = torch.Training(**given, seed=seed)
    if resume and checkpoint is None:
        raise UserError("--resume goes on from a checkpoint: say where it is with --checkpoint")
    check_output_paths(
        [written, external_data_path(written), json_path, plan_path],
        *model_files(pruned),
        *model_files(teacher),
        calib["calib"],
        held_out,
    )
    analysis = load_and_analyze(teacher)
    data = calibration_from_flags(analysis, **calib, calib_batch=training.batch, seed=seed)
    saved = torch.Saved(checkpoint, checkpoint_every, resume) if checkpoint else None
    if schedule is None and (rounds, criterion, max_drift, max_drop, held_out) != (None,) * 5:
        raise UserError(
            "--rounds, --criterion, --max-drift, --max-drop and --eval are for --schedule: cut with `snpc prune`, then "
            "finetune"
        )
    if schedule is not None:
        judged = (
            None
            if held_out is None
            else evaluation_from_flags(analysis, held_out, labels, evaluation_flags(calib, training, seed))
        )
        check_schedule(schedule, pruned, teacher, labels, judged, (max_drift, max_drop), (masks, plan_path))
        way = torch.Way("select" if criterion else None, criterion)
        options = {"goal": target or "macs", "rounds": rounds or 4, "way": way, "training": training, "saved": saved}
        run = torch.prune_in_rounds
        if schedule == "adaptive":
            run = torch.prune_adaptively
            limit = torch.DriftLimit(max_drift) if judged is None else torch.AccuracyDrop(max_drop, teacher, judged)
            options["objective"] = limit
        found = run(pruned, data, written, **options, heard=bars.print_round)
        show.emit_json({"snpc_rounds": 1, "output": str(written), "rounds": [asdict(r) for r in found]}, json_path)
        return
    if masks is not None:
        if pruned.resolve() != teacher.resolve() or labels is not None:
            raise UserError("--learn-masks cuts the dense model: give it as --teacher too, and no labels")
        if "lr" not in given:
            training = replace(training, lr=torch.RATE)
        learn_masks_and_prune(analysis, data, masks, target, training, saved, written, plan_path, json_path)
        return
    if target is not None or plan_path is not None:
        raise UserError(
            "--target and --plan are for --learn-masks and --schedule: cut with `snpc prune`, then finetune"
        )
    classes = Path(labels) if labels else None
    with bars.training_progress() as report:
        result = torch.finetune(
            pruned, teacher, data, written, training=training, labels=classes, saved=saved, report=report
        )
    if result is None:
        return  # one of several processes, and not the one that writes
    show.emit_json(torch.report(result), json_path)
    if str(json_path) != "-":
        show.print_finetuned(result)


def check_schedule(
    schedule: str,
    pruned: Path,
    teacher: Path,
    labels: str | None,
    judged: Any,
    limits: tuple[float | None, float | None],
    others: tuple[object, ...],
) -> None:
    """``limits``: --max-drift and --max-drop; ``others``: what does not go together with a schedule."""
    if pruned.resolve() != teacher.resolve() or others != (None,) * len(others):
        raise UserError("--schedule cuts the dense model: give it as --teacher too, and no masks or --plan")
    drift, drop = limits
    if schedule == "cubic" and (limits != (None, None) or judged is not None or labels is not None):
        raise UserError("--max-drift, --max-drop, --eval and --labels are for --schedule adaptive")
    if schedule == "adaptive" and (drift is None) == (drop is None):
        raise UserError("--schedule adaptive takes --max-drift, or --max-drop with --eval and --labels")
    if (drop is not None) != (judged is not None and labels is not None) or (drop is None and labels is not None):
        raise UserError("--max-drop is judged on --eval DATA --labels NAME: give all three, or --max-drift")


def evaluation_flags(calib: dict[str, Any], training: Any, seed: int) -> dict[str, Any]:
    return {**calib, "calib_batch": training.batch, "seed": seed}


def learn_masks_and_prune(
    analysis: Any,
    data: Any,
    masks: str,
    target: str | None,
    training: Any,
    saved: Any,
    written: Path,
    plan_path: Path | None,
    json_path: Path | None,
) -> None:
    """Masks, a plan by them, and the model that it makes, as `snpc prune` writes and shows it."""
    import snpc

    with bars.training_progress() as report:
        learned = import_torch_package().learn_masks(
            analysis,
            data,
            masks,
            snpc.Budget(target=parse_target(target or "macs")),
            training=training,
            saved=saved,
            report=report,
        )
    if plan_path is not None:
        write_text_file(plan_path, snpc.plan_to_json(learned.plan))
    result = snpc.apply(snpc.PruningPlan(learned.plan, calibration=data), written)
    show.emit_json(snpc.json_report(result), json_path)
    if str(json_path) != "-":
        show.print_result(result)


@click.command("export-torch")
@model_argument
@click.option("-o", "--output", type=PATH_TYPE, help="Folder for both files.  [default: MODEL without its suffix]")
def export_torch_command(model: Path, output: Path | None) -> None:
    """Write the weights of MODEL as safetensors, and the widths of its layers as JSON."""
    torch = import_torch_package()
    for path in torch.export_tensors(model, output or model.with_suffix("")):
        show.print_line(str(path))
