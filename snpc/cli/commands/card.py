"""``snpc card``: a model card for the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import click

from snpc.cli import tables
from snpc.cli.arguments import FILE_PATH, ArgumentGroup, argument, check_output_paths, command, option
from snpc.errors import UserError
from snpc.report import BaseModelRelation, CardOptions, model_card
from snpc.runtime.io import atomic_write


@dataclass(frozen=True)
class CardArguments(ArgumentGroup):
    """What the card says beside the report, and where it goes."""

    section: ClassVar[str] = "Output"

    report: Path = argument(type=FILE_PATH)
    base_model: str = option("--base-model", default="", metavar="ID", help="The original on the hub, as OWNER/NAME.")
    relation: BaseModelRelation = option(
        "--relation",
        type=click.Choice(get_args(BaseModelRelation)),
        default="finetune",
        show_default=True,
        help="How this model comes from --base-model. The hub has no word for pruning.",
    )
    license: str = option("--license", default="", metavar="NAME", help="License of the weights, such as apache-2.0.")
    output: Path | None = option("-o", "--output", type=FILE_PATH, help="The card to write.  [default: stdout]")


@command("card")
def card_command(card: CardArguments) -> None:
    """Write a Hugging Face model card from REPORT, which `snpc prune --json` wrote."""
    check_output_paths([card.output], card.report)
    try:
        text = model_card(read_report(card.report), CardOptions(card.base_model, card.relation, card.license))
    except UserError as error:
        raise UserError(f"{card.report}: {error}") from None
    if card.output is None:
        tables.print_text(text.rstrip("\n"))
        return
    with atomic_write(card.output) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    tables.print_line(f"model card written to {card.output}")


def read_report(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError("not JSON; `snpc prune --json` writes a report") from None
    if not isinstance(data, dict):
        raise UserError("not a report; `snpc prune --json` writes one")
    return data
