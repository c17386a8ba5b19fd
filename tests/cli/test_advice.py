"""What is said before the long part and in the first line, and commands to try: they run as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import snpc
from snpc.cli import main
from snpc.cli.advice.before import cost_text, seconds_text
from snpc.cli.advice.try_next import commands_to_try, role_hint, roles_to_try
from snpc.cli.arguments import TypedCommand
from snpc.errors import UserError
from snpc.pipeline import candidate
from snpc.planning import Effort
from snpc.types import Difference, Quality
from tests.command_line import CALIB, COMMANDS, VIT, invoke, reported, write_tiny
from tests.models.exports import EXPORTS, export

FEW = ("--calib", CALIB, "--calib-samples", 64)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    path = tmp_path / "my model.onnx"
    path.write_bytes(VIT.read_bytes())
    return path


def commands(text: str) -> list[list[str]]:
    """The commands of snpc in a text, to the end of their line or to a comment."""
    return [shlex.split(found, comments=True)[1:] for found in re.findall(r"snpc (?:prune|bench|apply|build) .*", text)]


def run_as_printed(words: list[str]) -> None:
    invoke(*(str(CALIB) if word == "DATA" else word for word in words))


class TestTyped:
    def parsed(self, *words: str) -> TypedCommand:
        return TypedCommand.parse("prune", COMMANDS["prune"], words)

    def test_flags_and_values(self) -> None:
        typed = self.parsed(
            "m.onnx", "--ratio=0.5", "-o", "a b.onnx", "--uniform", "--dump-after", "all", "d", "--seed", "1"
        )
        assert typed.arguments == ("m.onnx",)
        assert typed.options == (
            ("--ratio", "0.5"), ("-o", "a b.onnx"), ("--uniform",), ("--dump-after", "all", "d"), ("--seed", "1")
        )  # fmt: skip
        assert typed.without("--ratio", "--dump-after").text() == "snpc prune m.onnx -o 'a b.onnx' --uniform --seed 1"
        assert typed.has("--output", "-o") and not typed.has("--target")

    def test_values_that_look_like_flags(self) -> None:
        assert self.parsed("--exclude", "--ratio", "m.onnx").options == (("--exclude", "--ratio"),)
        assert self.parsed("-oa.onnx", "m.onnx").options == (("-o", "a.onnx"),)

    def test_another_command_keeps_the_options_that_it_has(self) -> None:
        typed = self.parsed("m.onnx", "--ratio", "0.5", "--calib", "d.npz", "-o", "p", "--provider", "cpu")
        with click.Context(main):
            apply = typed.of("apply", "m.onnx", "p.json", drop=("-o",))
        assert apply.text() == "snpc apply m.onnx p.json --calib d.npz --provider cpu"


class TestTry:
    def test_inspect_ends_with_commands_that_run(self, vit: Path) -> None:
        text = invoke("inspect", vit).stdout
        tried = [line for line in text.splitlines() if line.startswith("Try: ")]
        assert len(tried) == 2 and "--tokens guided:2@1-3" in tried[0] and "--target macs=0.5" in tried[1]
        assert text.splitlines().index(tried[0]) > text.splitlines().index(
            next(x for x in text.splitlines() if "prunable" in x)
        )
        for words in commands("\n".join(tried)):
            run_as_printed([*words, "--calib-samples", "16"] if "--calib" in words else words)
            assert vit.with_name("my model-pruned.onnx").exists()

    def test_nothing_in_json(self, vit: Path) -> None:
        assert "Try" not in invoke("inspect", vit, "--json", "-").stdout

    def test_options_of_the_model_are_kept(self, vit: Path) -> None:
        text = invoke("inspect", vit, "--no-pins", "--prune-kv-cache", "--calib", CALIB, "--curves").stdout
        both = commands(text)
        assert all("--prune-kv-cache" in words and "--curves" not in words for words in both)
        assert "--calib" not in both[0] and str(CALIB) in both[1]

    def test_a_model_without_tokens(self, tmp_path: Path) -> None:
        analysis = snpc.analyze(snpc.load(write_tiny(tmp_path / "tiny.onnx")))
        ((command, _),) = commands_to_try(analysis, TypedCommand("prune", ("tiny.onnx",), ()))
        share = float(command.options[-1][1].removeprefix("macs="))
        assert 0.6 < share < 0.7  # a third of what can go
        invoke("prune", tmp_path / "tiny.onnx", "--target", f"macs={share}")

    def test_convolutions_that_hold_the_macs_are_named(self) -> None:
        if EXPORTS["convchain__ts17"].missing():
            pytest.skip("cannot be exported here")
        analysis = snpc.analyze(snpc.load(export("convchain__ts17")))
        assert "conv" in roles_to_try(analysis)
        assert re.fullmatch(
            r"\d+ conv groups? holds? [\d.]+ % of the MACs .*: add --roles qk,vo,ffn,conv", role_hint(analysis)
        )
        ((command, _),) = commands_to_try(analysis, TypedCommand("prune", ("m.onnx",), ()))
        roles = dict(option for option in command.options if len(option) == 2)["--roles"].split(",")
        assert "conv" in roles and set(roles) == set(roles_to_try(analysis))

    def test_models_without_convolutions_get_no_hint(self) -> None:
        assert role_hint(snpc.analyze(snpc.load(VIT))) == ""


class TestBefore:
    def test_without_data_the_first_line_says_what_it_does(self, vit: Path) -> None:
        result = invoke("prune", vit, "--ratio", 0.5)
        first = result.stderr.splitlines()[0]
        assert first.startswith("snpc: warning: no calibration data: 50.0 % of qk")
        assert "usually destroys accuracy" in first and "--calib FOLDER_OR_NPZ" in first
        (offered,) = commands(first)
        assert "guided:2@1-3" in offered and "--ratio" not in offered
        run_as_printed(offered)

    def test_little_is_not_called_destruction_and_nothing_is_not_mentioned(self, vit: Path) -> None:
        little = invoke("prune", vit, "--ratio", 0.05, "--dry-run").stderr
        assert "costs accuracy" in little and "destroys" not in little
        assert "warning" not in invoke("prune", vit, "--ratio", 0, "--dry-run").stderr

    def test_a_cliff_is_announced_before_anything_is_fitted(self, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object) -> None:
            raise UserError("refitting begins")

        monkeypatch.setattr(candidate, "with_refitted_weights", stop)
        result = invoke("prune", vit, "--ratio", 0.97, *FEW, code=2)
        plan, warning, end = result.stderr.splitlines()
        assert re.fullmatch(r"snpc: plan: tokens: all stay; widths: 9\d.\d % of qk, .*, predicted drift 0\..*", plan)
        assert (
            warning.startswith("snpc: warning: this takes 9")
            and "is thought safe. Thought safe down to macs=0." in warning
        )
        assert end == "snpc: refitting begins"
        assert not list(vit.parent.glob("*pruned*"))

    def test_small_cuts_are_announced_without_a_warning(self, vit: Path) -> None:
        stderr = invoke("prune", vit, "--ratio", 0.2, *FEW, "--dry-run").stderr
        assert "snpc: plan: tokens: all stay; widths: " in stderr and "warning" not in stderr

    def test_tokens_that_cannot_go_are_explained(self, tmp_path: Path) -> None:
        stderr = invoke("prune", write_tiny(tmp_path / "tiny.onnx"), "--ratio", 0.2, "--dry-run").stderr
        assert "plan: tokens: all stay: it has no attention over tokens; widths: 18.8 % of ffn go" in stderr


class TestAfter:
    def test_the_first_line_says_what_was_lost_and_what_keeps_it(self, vit: Path) -> None:
        result = invoke("prune", vit, "--ratio", 0.97, *FEW)
        first = result.stdout.splitlines()[0]
        assert re.match(r"WARNING: the outputs no longer resemble the original's: drift \d\.\d+ in logits", first)
        (keeping,) = commands(first)
        assert "--ratio" not in keeping and "macs=0." in keeping[-3] and keeping[-2:] == ["--tokens", "none"]
        run_as_printed(keeping)
        assert "no longer resemble" not in invoke(*keeping).stdout
        (better,) = commands(next(line for line in result.stderr.splitlines() if "same MACs at less loss" in line))
        assert better[-2:] == ["--target", "macs=0.03"]

    def test_good_results_get_neither(self, vit: Path) -> None:
        result = invoke("prune", vit, "--ratio", 0.3, *FEW)
        assert "resemble" not in result.stdout and "at less loss" not in result.stderr

    def test_the_same_macs_cost_less_by_the_command_for_a_fair_result(
        self, vit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fair = Quality((Difference("logits", 1.0, 0.2, 0.9, None, "relative", 0.2, 0.2),), 16, True, "made up", False)
        monkeypatch.setattr(candidate.PrunedModel, "quality", fair)
        result = invoke("prune", vit, "--ratio", 0.5, *FEW)
        (better,) = commands(next(line for line in result.stderr.splitlines() if "same MACs at less loss" in line))
        share = re.search(r"^ *MACs .* ([\d.]+) %$", result.stdout, re.MULTILINE)
        assert share is not None and better[-2] == "--target"
        assert float(better[-1].removeprefix("macs=")) == pytest.approx(float(share[1]) / 100, abs=0.0051)
        assert "no longer resemble" not in result.stdout

    def test_json_alone_on_stdout(self, vit: Path) -> None:
        assert reported("prune", vit, "--ratio", 0.97, *FEW)["verify"]["quality"]["grade"] == "poor"


class TestNext:
    def test_every_command_says_what_follows_and_that_runs(self, vit: Path, tmp_path: Path) -> None:
        plan, out = tmp_path / "half.plan.json", tmp_path / "my model-pruned.onnx"
        (apply,) = commands(invoke("plan", vit, "--ratio", 0.2, *FEW, "-o", plan).stderr)
        assert apply[:3] == ["apply", str(vit), str(plan)] and "--calib" in apply
        (bench,) = commands(invoke(*apply).stderr)
        assert bench == ["bench", str(vit), str(out)]
        (build,) = commands(invoke(*bench, "--iterations", 2).stderr)
        assert build[0] == "build" and build[2:] == ["--target", "ort"]
        assert commands(invoke("verify", vit, out).stderr) == [bench]
        assert "next: snpc inspect" in invoke("example", "digits", tmp_path / "example").stderr


class TestCost:
    def test_it_is_printed_before_anything_is_measured(self, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("snpc.cli.advice.before.LONG_RUN_SECONDS", 0.0)
        words = ("prune", vit, *FEW, "--target", "macs=0.7", "--tokens", "none", "--dry-run")
        text = invoke(*words).stderr
        found = re.search(
            r"effort normal: about ([\d.]+) plain passes of 64 samples, \S+ m?s \(quick (.*), search (.*)\)", text
        )
        assert found is not None and float(found.group(1)) > 1
        assert text.index("effort normal") < text.index("plan: ")
        assert "effort" not in invoke(*words, "--quiet").stderr

    def test_short_runs_say_nothing_of_it(self, vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("snpc.cli.advice.before.LONG_RUN_SECONDS", 1e9)
        words = ("prune", vit, *FEW, "--target", "macs=0.7", "--tokens", "none", "--dry-run")
        assert "effort" not in invoke(*words).stderr

    @pytest.mark.parametrize(
        "flags", [("--ratio", 0.5, "--effort", "search"), ("--max-drift", 0.1, "--effort", "quick")]
    )
    def test_an_effort_that_is_not_at_hand_is_refused_in_a_line(self, vit: Path, flags: tuple[object, ...]) -> None:
        result = invoke("prune", vit, *FEW, *flags, "--tokens", "none", "--dry-run", code=2)
        (line,) = result.stderr.splitlines()
        assert "--effort" in line

    def test_it_is_in_passes_and_in_time(self) -> None:
        data = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=32, batch=8)
        costs: dict[Effort, float] = {"quick": 3.0, "normal": 4.5}
        assert cost_text(costs, "normal", data, 10.0) == (
            "effort normal: about 4.5 plain passes of 32 samples, 45 s (quick 30 s)"
        )
        assert [seconds_text(s) for s in (4.25, 60, 600, 9000)] == ["4.2 s", "60 s", "10 min", "2.5 h"]
