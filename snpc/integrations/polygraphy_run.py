"""A runner for ``polygraphy run``: the pruned model in onnxruntime, beside the original in any other runner.

Polygraphy finds it by its entry points ``polygraphy.run.plugins``, which are functions that return argument groups.
"""

from __future__ import annotations

from typing import Any

import onnx
from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import ModelArgs, OnnxLoadArgs, OnnxrtSessionArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from snpc.errors import CheckFailed, UserError
from snpc.integrations.polygraphy import SnpcPrune
from snpc.planning import parse_target

OPTIONS = ("target", "calib", "tokens", "save")


class PruneOrStop(SnpcPrune):
    """The loader, which says in one line why a request cannot be served, as the commands of Polygraphy do."""

    def call_impl(self) -> onnx.ModelProto:
        try:
            return super().call_impl()
        except (UserError, CheckFailed) as error:
            G_LOGGER.critical(str(error))
            raise


def argument_groups() -> list[BaseArgs]:
    """What Polygraphy adds to its own."""
    return [SnpcRunnerArgs()]


class SnpcRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]  # Polygraphy has no types
    """
    snpc: running inference with the pruned model in ONNX-Runtime.

    Depends on:

        - ModelArgs
        - OnnxLoadArgs
        - OnnxrtSessionArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "the model as snpc prunes it, in ONNX-Runtime", "snpc"

    def add_parser_args_impl(self) -> None:
        add = self.group.add_argument
        add("--snpc-target", metavar="macs=R", help="How much is left of the model, as --target of snpc prune.")
        add("--snpc-calib", metavar="DATA", help="Inputs like those that the model will see, without labels.")
        add("--snpc-tokens", metavar="SPEC|auto", help="How tokens get fewer, as --tokens of snpc prune.")
        add("--snpc-save", metavar="FILE", help="Also write the pruned model.")

    def parse_impl(self, args: Any) -> None:
        """
        Parses command-line arguments and populates the following attributes:

        Attributes:
            target, calib, tokens, save (str): The options of the pruning; None where they are left out.
        """
        self.target, self.calib, self.tokens, self.save = (args_util.get(args, f"snpc_{name}") for name in OPTIONS)
        if self.target is not None:
            try:
                parse_target(self.target)
            except UserError as error:
                G_LOGGER.critical(f"--snpc-target: {error}")

    def add_to_script_impl(self, script: Any) -> None:
        if self.target is None and self.tokens is None:
            G_LOGGER.critical("--snpc prunes to a target: give --snpc-target macs=0.5, or --snpc-tokens")
        loader = self.arg_groups[OnnxLoadArgs]
        source = self.arg_groups[ModelArgs].path
        if loader.must_use_onnx_loader():
            source = loader.add_to_script(script)
        script.add_import(imports=["PruneOrStop"], frm=__name__)
        options = {"tokens": self.tokens, "target": self.target}
        given = {name: value for name, value in options.items() if value is not None}
        pruned = script.add_loader(make_invocable("PruneOrStop", source, self.calib, **given), "snpc_prune")
        if self.save is not None:
            script.add_import(imports=["SaveOnnx"], frm="polygraphy.backend.onnx")
            pruned = script.add_loader(make_invocable("SaveOnnx", pruned, self.save), "save_pruned")
        script.add_import(imports=["BytesFromOnnx"], frm="polygraphy.backend.onnx")
        content = script.add_loader(make_invocable("BytesFromOnnx", pruned), "serialize_pruned")
        session = self.arg_groups[OnnxrtSessionArgs].add_to_script(script, content)
        script.add_import(imports=["OnnxrtRunner"], frm="polygraphy.backend.onnxrt")
        script.add_runner(make_invocable("OnnxrtRunner", session, name="snpc"))
