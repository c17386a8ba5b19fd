"""What to cut, how much, and the tokens: the groups that ``prune``, ``plan`` and ``sweep`` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import click

import snpc
from snpc.cli.arguments.group import ArgumentGroup, option, subgroup
from snpc.cli.arguments.metric import MetricArguments
from snpc.cli.arguments.parsers import parse_roles, parse_width_multiple
from snpc.cli.tables import print_note, print_step
from snpc.errors import UserError
from snpc.pipeline import ALL_TOKENS, AUTO_TOKENS, PlanRequest, apply_token_request, effective_token_request, run_stages
from snpc.planning import (
    Allocator,
    Effort,
    PruningMethod,
    ResourceTarget,
    parse_max_ratios,
    parse_perplexity_limit,
    parse_target,
)
from snpc.runtime.calibration import Calibration
from snpc.runtime.execution import Execution, StageCost
from snpc.tokens import clamped_removals
from snpc.types import Role


@dataclass(frozen=True)
class SelectionArguments(ArgumentGroup):
    """Which groups may lose units, and how these units are chosen."""

    section: ClassVar[str] = "What to cut"

    roles: tuple[Role, ...] = option(
        "--roles",
        default="qk,vo,ffn",
        show_default=True,
        metavar="ROLE,...",
        callback=parse_roles,
        help="What to prune: qk (width of query and key), vo (width of value and output), ffn (hidden width of "
        "feed-forward layers), head (whole heads), experts (whole experts), conv (channels of convolutions), residual "
        "(width of the residual stream), other; all: qk, vo, ffn, conv and other; layer: whole attention and "
        "feed-forward layers (needs --calib); or none.",
    )
    include: str | None = option("--include", metavar="REGEX", help="Prune only groups whose id matches.")
    exclude: str | None = option("--exclude", metavar="REGEX", help="Do not prune groups whose id matches.")
    method: PruningMethod | None = option(
        "--method",
        type=click.Choice(["auto", "parallel", "select"]),
        help="auto: narrow layer after layer, and refit the weights that are left to the calibration data by least "
        "squares (needs --calib). parallel: the same for all layers at once, which is faster and keeps less. select: "
        "remove the units that --criterion scores lowest, and change no other weight.  "
        "[default: auto with --calib and no --criterion; parallel with --load-stats alone; else select]",
    )
    criterion: str | None = option(
        "--criterion",
        metavar="NAME[:KEY=VALUE,...]",
        help="How units are scored, see `snpc criteria`.  [default: mixed with --calib, else magnitude]",
    )
    effort: Effort = option(
        "--effort",
        type=click.Choice(["quick", "normal", "search"]),
        default="normal",
        show_default=True,
        help="How long to look for the best widths. quick: predict what each width costs. normal: also try a few "
        "widths of every group on the model. search: then try to move units between groups, for --target macs=R, "
        "params=R or bytes=R.",
    )
    round_to: int | str | snpc.PreferredWidths = option(
        "--round-to",
        "--align",
        default="1",
        show_default=True,
        metavar="N|auto",
        callback=parse_width_multiple,
        help="Make widths multiples of N channels (a rotary pair is two); auto: of the multiple that is fast where the "
        "model will run.",
    )
    min_width: int = option(
        "--min-width", default=1, show_default=True, type=int, help="Keep at least this many channels per block."
    )
    max_ratio: str | None = option(
        "--max-ratio", metavar="R|ROLE=R,...", help="Remove at most this fraction of the units of any group."
    )


@dataclass(frozen=True)
class BudgetArguments(ArgumentGroup):
    """How far to prune, and how that is distributed over the groups."""

    section: ClassVar[str] = "How much"

    ratio: float | None = option(
        "--ratio", type=float, help="Remove this fraction of the units of every role in --roles, in [0, 1)."
    )
    target: str | None = option(
        "--target",
        metavar="macs=R|params=R|bytes=R|latency=R|latency=Xms",
        help="Prune until this fraction of the dense model is left, cutting first where the predicted loss is "
        "smallest. A latency is measured with --provider, --batch, --input-shapes and --threads, on the artifact of "
        "--build if given.",
    )
    max_drift: float | None = option(
        "--max-drift",
        type=float,
        help="Prune as far as possible while outputs change by at most this (relative RMS, or as --metric says), "
        "measured on the written model (needs --calib).",
    )
    max_ppl: str | None = option(
        "--max-ppl",
        metavar="FACTORx|VALUE",
        help="Prune as far as possible while the perplexity of a causal language model stays within this: 1.1x is a "
        "factor on the dense model's, 25 a perplexity; measured on the written model (needs --calib).",
    )
    max_drop: float | None = option(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="Prune as far as possible while the score on labels falls by at most so many points (1.0: one in a "
        "hundred), measured on the written model (needs --calib, --eval and --labels).",
    )
    uniform: bool = option(
        "--uniform", is_flag=True, help="Remove the same fraction of every group, instead of ranking across groups."
    )
    allocator: Allocator = option(
        "--allocator",
        type=click.Choice(["loss", "dimap"]),
        default="loss",
        show_default=True,
        help="What decides how much each group loses. loss: the predicted loss. dimap: the relative energy of the "
        "weights alone.",
    )

    @property
    def resource_target(self) -> ResourceTarget | None:
        return parse_target(self.target) if self.target is not None else None

    @property
    def given_flags(self) -> list[str]:
        """The flags that say how much goes, as far as they are given."""
        amounts = {
            "--ratio": self.ratio,
            "--target": self.target,
            "--max-drift": self.max_drift,
            "--max-ppl": self.max_ppl,
            "--max-drop": self.max_drop,
        }
        return [flag for flag, value in amounts.items() if value is not None]

    @property
    def is_given(self) -> bool:
        return bool(self.given_flags)

    @property
    def wants_latency(self) -> bool:
        target = self.resource_target
        return target is not None and target.kind == "latency"


@dataclass(frozen=True)
class TokenArguments(ArgumentGroup):
    """How tokens get fewer."""

    section: ClassVar[str] = "Tokens"

    tokens: str | None = option(
        "--tokens",
        metavar="METHOD:N[@BLOCKS][/BLOCK]|auto|none",
        help="Use fewer tokens (patches, words); without --ratio, --target, --max-drift or --max-ppl cut no widths. "
        "merge:13: merge 13 at every block. topk:0.7@3,6,9: keep 70 % after these blocks. Other methods: star, fuse, "
        "guided, energy, adaptive:0.9 (per input, as many as carry 90 % of the attention). merge:13@1-6/9: where "
        "outputs need all tokens, they are back behind block 9. Join several with +. auto: choose the method and the "
        "counts for --target macs=R or latency=R. none: all stay. star, adaptive and auto need --calib.  [default: "
        "auto for such a target with --calib, where tokens can get fewer, else none]",
    )

    @property
    def schedule(self) -> str | None:
        """The specification, where one is given: neither auto nor none."""
        text = self.tokens.strip() if self.tokens is not None else ALL_TOKENS
        return text if text not in (AUTO_TOKENS, ALL_TOKENS) else None


@dataclass(frozen=True)
class PlanningArguments(ArgumentGroup):
    """What to cut, how much, and the tokens."""

    selection: SelectionArguments = subgroup()
    amount: BudgetArguments = subgroup()
    reduction: TokenArguments = subgroup()
    judging: MetricArguments = subgroup()

    def with_width_multiple(self, target: str | None, execution: Execution) -> PlanningArguments:
        """The same with --round-to auto replaced by the widths that run well on ``target``."""
        if self.selection.round_to != "auto":
            return self
        preferred = snpc.widths_for_target(target, execution)
        return replace(self, selection=replace(self.selection, round_to=preferred))

    def budget(self, target: ResourceTarget | None = None) -> snpc.Budget:
        """The budget that the flags describe; ``target`` in place of --target. UserError for flags that contradict
        each other."""
        selection, amount = self.selection, self.amount
        widths = selection.round_to
        if not isinstance(widths, snpc.PreferredWidths):
            widths = snpc.PreferredWidths(int(widths), 1)
        return snpc.Budget(
            ratio=amount.ratio,
            roles=selection.roles,
            target=target or amount.resource_target,
            uniform=amount.uniform,
            round_to=widths.multiple,
            min_width=selection.min_width if selection.min_width < 1 else max(widths.minimum, selection.min_width),
            include=selection.include,
            exclude=selection.exclude,
            max_ratio=parse_max_ratios(selection.max_ratio) if selection.max_ratio is not None else None,
            max_drift=amount.max_drift,
            allocator=amount.allocator,
            max_ppl=parse_perplexity_limit(amount.max_ppl) if amount.max_ppl is not None else None,
            head_sizes=widths.head_sizes,
            max_drop=amount.max_drop,
        )

    def check_predictable(self) -> None:
        """Refuse a limit that says nothing of widths before the original is run: a score on labels, and a perplexity
        that is no factor."""
        limit = self.amount.max_ppl
        if self.amount.max_drop is not None or self.judging.task() is not None:
            raise UserError(
                "--max-drop and scores on labels are measured on a written model: let `snpc prune` write it, or give "
                "--target, --ratio or --max-drift"
            )
        if limit is not None and not parse_perplexity_limit(limit).relative:
            raise UserError(
                f"--max-ppl {limit}: widths for it are found by measuring; let `snpc prune` write the model, or give a "
                "factor on the dense model's perplexity, such as 1.1x"
            )

    @property
    def cuts_widths(self) -> bool:
        """Widths are cut by --ratio, --target, --max-drift, --max-ppl or --max-drop, unless --roles none; a --tokens
        schedule alone cuts none.

        Raises UserError where nothing says how much goes.
        """
        if self.selection.roles and not self.amount.is_given and self.reduction.schedule is None:
            raise UserError(
                "say how much goes: --target macs=R (or params=R, bytes=R, latency=R), --ratio R, --max-drift X, "
                "--max-ppl X or --max-drop POINTS for widths, --tokens SCHEDULE for tokens alone"
            )
        return bool(self.selection.roles) and self.amount.is_given

    def alone(self) -> PlanningArguments:
        """Of a model that says less already: nothing else goes where nothing says how much."""
        if self.amount.is_given or self.reduction.schedule is not None:
            return self
        return replace(self, selection=replace(self.selection, roles=()))

    def check_no_widths(self) -> None:
        """Refuse options that say which widths go, or how, where none do."""
        selection, amount = self.selection, self.amount
        for flag in amount.given_flags:
            if flag != "--target":
                raise UserError(f"--roles none cuts no widths: leave out {flag}")
        for flag, given in (
            ("--criterion", selection.criterion),
            ("--method parallel", selection.method if selection.method == "parallel" else None),
            ("--effort", selection.effort if selection.effort != "normal" else None),
            ("--include", selection.include),
            ("--exclude", selection.exclude),
            ("--max-ratio", selection.max_ratio),
            ("--uniform", amount.uniform or None),
        ):
            if given is not None:
                raise UserError(f"no widths are cut: leave out {flag}, or give --ratio or --target, and --roles")

    def request(self, workload: snpc.Workload | None) -> PlanRequest | None:
        """What ``make_plan`` is asked for; None where no width is cut. ``workload``: of a latency target."""
        if not self.cuts_widths:
            return None
        selection = self.selection
        return PlanRequest(self.budget(), selection.method, selection.criterion, workload, effort=selection.effort)

    @property
    def tokens(self) -> str | None:
        """What --tokens says; where it says nothing and no width is cut, tokens alone can reach a target."""
        alone = not self.cuts_widths and self.amount.resource_target is not None
        return AUTO_TOKENS if self.reduction.tokens is None and alone else self.reduction.tokens

    def stages(
        self,
        analysis: snpc.Analysis,
        calibration: Calibration | None,
        workload: snpc.Workload | None,
        *,
        writes: bool = True,
    ) -> list[StageCost]:
        """See ``run_stages``."""
        method = self.selection.method
        return run_stages(analysis, calibration, self.request(workload), self.tokens, method=method, writes=writes)

    def chosen_tokens(self, tokens: str | None, analysis: snpc.Analysis, calibration: Calibration | None) -> str | None:
        """See ``effective_token_request``."""
        return effective_token_request(tokens, analysis, calibration, self.amount.resource_target, self.selection.roles)

    def reduce_tokens(
        self,
        analysis: snpc.Analysis,
        calibration: Calibration | None,
        workload: snpc.Workload | None,
        execution: Execution,
    ) -> snpc.Analysis:
        """The analysis with its tokens reduced as --tokens says. ``workload``: of a latency target."""
        target, tokens, widths = self.amount.resource_target, self.tokens, self.request(workload)
        schedule = self.reduction.schedule
        tries = target is not None and target.kind in ("macs", "latency") and calibration is not None
        if tries and self.chosen_tokens(tokens, analysis, calibration) == AUTO_TOKENS:
            print_step("choosing which tokens go by trying schedules (--tokens none: widths only, which is faster)")
        reduced = apply_token_request(analysis, calibration, tokens, target=target, widths=widths, execution=execution)
        if schedule is not None:
            note_clamped_removals(schedule, clamped_removals(analysis, schedule))
        return reduced


def note_clamped_removals(schedule: str, clamped: Mapping[int, tuple[int, int]]) -> None:
    """``clamped``: block -> tokens to remove, tokens that can be removed."""
    if clamped:
        counts = ", ".join(f"{possible} after block {block}" for block, (_, possible) in clamped.items())
        print_note(f"--tokens {schedule}: fewer tokens are there, or can be merged at once: {counts} go")
