"""How text becomes token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import snpc
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, option
from snpc.cli.tables import print_note
from snpc.errors import UserError
from snpc.runtime.calibration import Calibration, describe_filled, find_tokenizer, is_text


@dataclass(frozen=True)
class TextArguments(ArgumentGroup):
    """How text becomes inputs."""

    section: ClassVar[str] = "Calibration"

    tokenizer: Path | None = option(
        "--tokenizer",
        type=FILE_PATH,
        metavar="PATH",
        help="tokenizer.json for .txt and .jsonl, or the folder that holds it.  [default: the one beside the model]",
    )
    seq_len: int | None = option(
        "--seq-len", type=int, metavar="N", help="Tokens of a sample of text.  [default: the model's, else 128]"
    )
    text_field: str | None = option(
        "--text-field", metavar="NAME", help="Field of a .jsonl that holds the text.  [default: text]"
    )

    def load(self, model: Path) -> snpc.TextOptions:
        """The options as ``load_calibration`` takes them; without --tokenizer, the tokenizer beside ``model``."""
        return snpc.TextOptions(
            self.tokenizer or find_tokenizer(model),
            self.seq_len,
            self.text_field if self.text_field is not None else snpc.TextOptions.field,
        )

    def check(self, *sources: str | None) -> None:
        """Refuse options that none of the data can use."""
        given = (self.tokenizer, self.seq_len, self.text_field) != (None,) * 3
        if given and not any(is_text(source) for source in sources):
            raise UserError("--tokenizer, --seq-len and --text-field are for data in .txt or .jsonl: leave them out")

    def print_format(self, calibration: Calibration) -> None:
        """Say how text became tokens, and what was filled in beside the ids."""
        if calibration.token_format:
            print_note(f"{calibration.source}: {calibration.available} {calibration.token_format}")
        if calibration.filled:
            filled = describe_filled(calibration.filled)
            print_note(f"{calibration.source} lacks inputs that follow from its ids; filled in: {filled}")
