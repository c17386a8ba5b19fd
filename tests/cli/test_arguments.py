"""Argument groups: the options of a command, its help by section, and the values that flags stand for."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

import snpc
import snpc.cli
from snpc.cli import main
from snpc.cli.arguments.calibration import CalibrationArguments, ImageArguments
from snpc.cli.arguments.group import ArgumentGroup, SectionedCommand, SectionOption, argument, command, option, subgroup
from snpc.cli.arguments.planning import PlanningArguments
from snpc.cli.arguments.text import TextArguments
from snpc.errors import UserError
from snpc.passes.pass_list import ENGINE_PASSES, PASS_NAMES
from tests.command_line import COMMANDS

MAX_PARAMETERS = 8


@dataclass(frozen=True)
class Inner(ArgumentGroup):
    section: ClassVar[str] = "Inside"

    width: int = option("--width", default=3, type=int, help="How wide.")


@dataclass(frozen=True)
class Outer(ArgumentGroup):
    section: ClassVar[str] = "Outside"

    name: str = argument()
    inner: Inner = subgroup()
    loud: bool = option("--loud", is_flag=True, section="Inside", help="Loud.")


def test_a_command_gets_its_groups() -> None:
    received: list[Outer] = []

    @command("probe")
    def probe(outer: Outer) -> None:
        """Probe NAME."""
        received.append(outer)

    done = CliRunner().invoke(probe, ["x", "--width", "5"])
    assert done.exit_code == 0, done.output
    assert received == [Outer(name="x", inner=Inner(width=5), loud=False)]


def test_help_lists_options_by_section() -> None:
    @command("probe")
    def probe(outer: Outer) -> None:
        """Probe NAME."""

    text = CliRunner().invoke(probe, ["--help"]).output
    inside = text.partition("Inside:")[2].partition("\n\n")[0]
    assert "--width" in inside and "--loud" in inside  # an option may name another section than its group's
    assert "Outside:" not in text  # a section without options
    assert "Probe NAME." in text


def test_two_options_of_one_name_are_refused() -> None:
    def probe(first: Inner, second: Inner) -> None: ...

    with pytest.raises(ValueError, match="same name"):
        command("probe")(probe)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_a_section_and_says_what_it_does(name: str) -> None:
    listed = COMMANDS[name]
    assert isinstance(listed, SectionedCommand)
    for parameter in listed.params:
        if isinstance(parameter, SectionOption):
            assert parameter.help and parameter.help[0] != " ", parameter.name
            assert parameter.section != "Options", f"{name} {parameter.opts}: name a section"
    text = CliRunner().invoke(main, [name, "--help"]).output
    options = [option for option in listed.params if isinstance(option, click.Option)]
    assert all(option.opts[0] in text for option in options if not option.hidden)


@pytest.mark.parametrize(
    "words",
    ["--ratio 0.3", "--target macs=0.5", "--max-drift 0.1", "--max-ppl 1.1x", "--max-drop 1", "--criterion snp"],
)
def test_options_that_a_sweep_refuses_are_not_in_its_help(words: str, tmp_path: Path) -> None:
    flag, value = words.split()
    assert f"\n  {flag} " not in CliRunner().invoke(main, ["sweep", "--help"]).output
    done = CliRunner().invoke(main, ["sweep", str(tmp_path / "m.onnx"), "--targets", "macs=0.5", flag, value])
    assert done.exit_code == 2 and f"{flag}: a sweep" in done.output


def test_prune_plan_and_sweep_share_the_planning_options() -> None:
    shared = {parameter.name for parameter in PlanningArguments.options()}
    assert {"roles", "ratio", "target", "tokens", "criterion", "uniform"} <= shared
    for name in ("prune", "plan", "sweep"):
        assert shared <= {parameter.name for parameter in COMMANDS[name].params}


def test_prune_has_the_sections() -> None:
    text = CliRunner().invoke(main, ["prune", "--help"]).output
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "How much", "Calibration", "What to cut", "Tokens", "Evaluation", "Checks", "Output", "Building", "Running",
        "Options",
    ]  # fmt: skip


def test_passes_are_listed_in_their_order() -> None:
    listed = json.loads(CliRunner().invoke(main, ["passes", "--json", "-"]).stdout)["passes"]
    assert tuple(row["name"] for row in listed) == PASS_NAMES
    text = CliRunner().invoke(main, ["passes"]).output
    assert all(row["what"] in text and row["why_here"] in text for row in listed)


def test_graphs_are_written_after_a_pass(tmp_path: Path) -> None:
    model = Path(snpc.__file__).parent / "data" / "digits" / "digits_vit.onnx"
    folder = tmp_path / "graphs"
    done = CliRunner().invoke(main, ["inspect", str(model), "--dump-after", "eliminate-dead-rows", str(folder)])
    assert done.exit_code == 0, done.output
    (path,) = folder.iterdir()
    assert path.name == "01-eliminate-dead-rows.txt"
    written = onnx.parser.parse_model(path.read_text()).graph
    assert {node.op_type for node in onnx.load(model).graph.node} >= {node.op_type for node in written.node}
    assert written.output[0].name == "logits"
    wrong = CliRunner().invoke(main, ["inspect", str(model), "--dump-after", "eliminate-dead-row", str(folder)])
    assert wrong.exit_code == 2 and "did you mean eliminate-dead-rows" in wrong.stderr


def test_graphs_are_written_from_loading_to_building(tmp_path: Path) -> None:
    model = Path(snpc.__file__).parent / "data" / "digits" / "digits_vit.onnx"
    flags = ["--ratio", "0.5", "--build", "ort", "-o", str(tmp_path / "half.onnx"), "--dump-after", "all"]
    done = CliRunner().invoke(main, ["prune", str(model), *flags, str(tmp_path / "graphs")])
    assert done.exit_code == 0, done.output
    written = {path.stem[3:] for path in (tmp_path / "graphs").iterdir()}
    nothing_fits = {"dequantize", "fuse-attention-projections", "fuse-gemm-bias"}
    for_tensorrt = {entry.name for entry in ENGINE_PASSES}
    assert set(PASS_NAMES) - written <= nothing_fits | for_tensorrt


def functions() -> list[tuple[str, ast.FunctionDef]]:
    root = Path(snpc.cli.__file__).parent
    return [
        (f"{path.relative_to(root)}:{node.name}", node)
        for path in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_no_function_has_many_parameters() -> None:
    counted = {name: len(node.args.args) + len(node.args.kwonlyargs) for name, node in functions()}
    assert len(counted) > 80
    assert {name: count for name, count in counted.items() if count > MAX_PARAMETERS} == {}


def test_flags_are_typed() -> None:
    """Fields of groups and parameters of commands name their types; Any would switch the type checker off."""
    for name in COMMANDS:
        callback = COMMANDS[name].callback
        assert callback is not None
        function = inspect.getclosurevars(callback).nonlocals["function"]
        groups = inspect.get_annotations(function, eval_str=True)
        assert groups.pop("return") is None
        for group in groups.values():
            assert issubclass(group, ArgumentGroup)
            assert "Any" not in str(inspect.get_annotations(group))


def test_image_options_need_data() -> None:
    flags = click.Command("x", params=CalibrationArguments.options()).make_context("x", []).params
    assert CalibrationArguments.from_flags(flags).calib is None
    with pytest.raises(UserError, match="give --calib too"):
        CalibrationArguments.from_flags({**flags, "image_size": "8,8"}).check()


def test_text_options_need_text() -> None:
    flags = click.Command("x", params=CalibrationArguments.options()).make_context("x", []).params
    given = CalibrationArguments.from_flags({**flags, "seq_len": 8, "calib": "a.npz"})
    with pytest.raises(UserError, match=r"--seq-len and --text-field are for data in \.txt or \.jsonl: leave them out"):
        given.check()
    given.check("eval.txt")


def test_commands_that_read_data_prepare_pictures_and_text_alike() -> None:
    """A model that is calibrated on pictures must not be verified or timed on others."""
    groups = (*ImageArguments.options(), *TextArguments.options())
    images = {flag for parameter in groups for flag in parameter.opts}
    assert {"--image-mean", "--image-std", "--image-size", "--image-layout", "--tokenizer", "--seq-len"} <= images
    readers = []
    for name, given in COMMANDS.items():
        flags = {flag for parameter in given.params for flag in parameter.opts}
        if flags & {"--calib", "--data"}:
            readers.append(name)
            assert {"--calib", "--data"} | images <= flags, name
    assert {"prune", "plan", "apply", "verify", "build", "bench", "sweep", "finetune"} <= set(readers)
