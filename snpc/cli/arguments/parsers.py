"""Texts of options to values. Each parser refuses a text that it cannot read, and says what it must look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from snpc.errors import UserError
from snpc.types import RANKED_ROLES, ROLES, Role

if TYPE_CHECKING:
    from snpc.runtime.execution import AlgebraName

Number = TypeVar("Number", int, float)


def parse_given_roles(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[Role, ...] | None:
    """As ``parse_roles``; None where none are given."""
    return None if text is None else parse_roles(ctx, param, text)


def parse_roles(ctx: click.Context, param: click.Parameter, text: str) -> tuple[Role, ...]:
    """``qk,ffn`` -> ("qk", "ffn"); ``all,layer`` -> ``RANKED_ROLES`` and "layer"; ``none`` -> ()."""
    if text.strip() == "none":
        return ()
    roles: dict[str, tuple[Role, ...]] = {**{role: (role,) for role in ROLES}, "all": RANKED_ROLES}
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in roles]
    if unknown or not names:
        raise click.BadParameter(
            f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(roles)}, separated by commas"
        )
    return tuple(dict.fromkeys(role for name in names for role in roles[name]))


def parse_provider(ctx: click.Context, param: click.Parameter, name: str) -> str:
    """Refuse at once a provider that this onnxruntime does not have; the CPU is always there."""
    if name != "cpu":
        from snpc.runtime.execution import resolve_provider

        resolve_provider(name)
    return name


def parse_algebra(ctx: click.Context, param: click.Parameter, name: AlgebraName) -> AlgebraName:
    """Import the package that brings an algebra other than numpy's."""
    if name == "torch":
        from snpc.cli.arguments.torch_package import import_torch_package

        import_torch_package("--algebra torch", ", or leave --algebra out")
    return name


def parse_width_multiple(ctx: click.Context, param: click.Parameter, text: str) -> int | str:
    """A number, or ``auto``."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text}: a number, or auto") from None


def parse_target_name(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    """Refuse at once a name that no target has."""
    if name is not None:
        from snpc.targets import find_target

        find_target(name)
    return name


def parse_precisions(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...]:
    """``fp16,q8`` -> ("fp16", "q8"). Refuses at once what is no precision."""
    if text is None:
        return ()
    from snpc.targets import check_precisions

    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise click.BadParameter("nothing: give precisions, separated by commas")
    check_precisions(names)
    return names


def parse_memory_size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """``2GB`` or ``512MiB`` -> bytes."""
    from snpc.runtime.execution import parse_bytes

    return None if text is None else parse_bytes(text)


def parse_cluster_address(ctx: click.Context, param: click.Parameter, text: str | None) -> str | None:
    """Refuse at once what is no cluster."""
    from snpc.runtime.execution import parse_cluster

    if text is not None:
        parse_cluster(text)
    return text


def parse_shard(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """``2/8`` -> (2, 8)."""
    if text is None:
        return None
    numbers = [int(part) for part in text.split("/") if part.isascii() and part.isdigit()]
    if text.count("/") != 1 or len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise click.BadParameter(f"{text}: must look like 2/8, the second of eight parts")
    return numbers[0], numbers[1]


def parse_dim_sizes(texts: Sequence[str]) -> dict[str, int]:
    """``["batch=1"]`` -> ``{"batch": 1}``."""
    sizes = {}
    for text in texts:
        name, equals, size = text.rpartition("=")
        if not equals or not (size.isascii() and size.isdigit()) or len(size) > 12 or not int(size):
            raise UserError(f"--dim-param {text[:50]!r}: must look like batch=1")
        sizes[name] = int(size)
    return sizes


def parse_numbers(
    text: str | None, flag: str, kind: Callable[[str], Number], counts: Sequence[int]
) -> tuple[Number, ...] | None:
    """The numbers in ``text``, separated by commas, as many as one of ``counts``; None where the option is absent."""
    if text is None:
        return None
    try:
        numbers = tuple(kind(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in counts:
        raise UserError(f"{flag} {text!r}: {' or '.join(map(str, counts))} numbers separated by commas are needed")
    return numbers
