"""What an argument group is, and commands made of groups.

A command is a function whose parameters are groups:

    @command("bench")
    def bench_command(models: BenchModels, execution: ExecutionArguments) -> None: ...

``command`` collects the options of the groups, lists them in ``--help`` by section, and builds the groups from the
parsed values. Most groups have a ``load`` method that turns the flags into the value that they describe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

import click

from snpc.cli.arguments.typed import WORDS_KEY

FILE_PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is refused in one line, by its reader
GroupT = TypeVar("GroupT", bound="ArgumentGroup")

SECTIONS = (
    "How much", "Inputs", "Calibration", "What to cut", "Tokens", "Training", "Evaluation", "Pruning", "Checks",
    "Output", "Building", "Running",
)  # fmt: skip
"""Sections of ``--help``, in this order; any other comes last."""


@dataclass(frozen=True)
class ParameterSpec:
    """How click parses a field. ``section``: None for the one of its group."""

    kind: type[click.Parameter]
    flags: tuple[str, ...]
    attributes: Mapping[str, Any]
    section: str | None = None


@dataclass(frozen=True)
class SubgroupSpec:
    """A field that is a group. ``section``: None for its own."""

    section: str | None = None


class SectionOption(click.Option):
    """An option that ``--help`` lists under ``section``."""

    section: str = "Options"


def option(*flags: str, section: str | None = None, **attributes: Any) -> Any:
    """A field that is an option. ``attributes``: as of ``click.option``."""
    return field(metadata={"spec": ParameterSpec(SectionOption, flags, attributes, section)})


def argument(**attributes: Any) -> Any:
    """A field that is a positional argument. ``attributes``: as of ``click.argument``."""
    return field(metadata={"spec": ParameterSpec(click.Argument, (), attributes)})


def subgroup(section: str | None = None) -> Any:
    """A field that is a group itself. ``section``: in place of its own."""
    return field(metadata={"spec": SubgroupSpec(section)})


@dataclass(frozen=True)
class ArgumentGroup:
    """A group of options. Each field is made by ``option``, ``argument`` or ``subgroup``."""

    section: ClassVar[str] = "Options"

    @classmethod
    def options(cls, section: str | None = None) -> list[click.Parameter]:
        """The click parameters of this group and of the groups inside it. ``section``: in place of the group's own."""
        parameters: list[click.Parameter] = []
        for name, spec, inner in parameter_fields(cls):
            if isinstance(spec, SubgroupSpec):
                parameters += inner.options(spec.section)
                continue
            parameter = spec.kind([*spec.flags, name], **spec.attributes)
            if isinstance(parameter, SectionOption):
                parameter.section = spec.section or section or cls.section
            parameters.append(parameter)
        return parameters

    @classmethod
    def from_flags(cls: type[GroupT], flags: Mapping[str, object]) -> GroupT:
        """The group with the values that click parsed, by parameter name."""
        values = {
            name: inner.from_flags(flags) if isinstance(spec, SubgroupSpec) else flags[name]
            for name, spec, inner in parameter_fields(cls)
        }
        return cast("Callable[..., GroupT]", cls)(**values)


def parameter_fields(
    group: type[ArgumentGroup],
) -> Iterator[tuple[str, ParameterSpec | SubgroupSpec, type[ArgumentGroup]]]:
    """(name, specification, type) of each field."""
    types = get_type_hints(group)
    for item in fields(group):
        yield item.name, item.metadata["spec"], types[item.name]


# -- commands --------------------------------------------------------------------------------------------------------


class SectionedCommand(click.Command):
    """A command whose ``--help`` lists options by section, and that remembers its words (``TypedCommand``)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[WORDS_KEY] = tuple(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # arguments are in the usage line
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def command(name: str, refused: Collection[str] = ()) -> Callable[[Callable[..., None]], SectionedCommand]:
    """Make a command of a function whose parameters are argument groups. Its docstring is the help text. ``refused``:
    options of these groups that the function refuses with a reason; ``--help`` does not list them."""

    def decorate(function: Callable[..., None]) -> SectionedCommand:
        groups: dict[str, type[ArgumentGroup]] = get_type_hints(function)
        groups.pop("return")
        parameters = [parameter for group in groups.values() for parameter in group.options()]
        names = [parameter.name for parameter in parameters]
        if len(set(names)) != len(names):
            raise ValueError(f"{name}: two parameters have the same name, of {names}")
        for parameter in parameters:
            if isinstance(parameter, click.Option):
                parameter.hidden = not set(refused).isdisjoint(parameter.opts)

        def run(**flags: object) -> None:
            function(**{key: group.from_flags(flags) for key, group in groups.items()})

        return SectionedCommand(name, callback=run, params=parameters, help=function.__doc__)

    return decorate
