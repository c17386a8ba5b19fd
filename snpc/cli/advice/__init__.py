"""Advice: what a request is likely to do, said before it is done, and commands to try.

Files
  after     What is said of a result that lost much, and what follows any command.
  before    What is said before the long part: what goes, and whether that is thought safe.
  commands  Commands with another amount to cut.
  try_next  Commands to try on a model.
"""

from __future__ import annotations

from snpc.cli.advice.after import print_better_command, print_loss_first, print_next
from snpc.cli.advice.before import announce_cost, announce_plan, warn_without_data
from snpc.cli.advice.try_next import print_commands_to_try

__all__ = [
    "announce_cost",
    "announce_plan",
    "print_better_command",
    "print_commands_to_try",
    "print_loss_first",
    "print_next",
    "warn_without_data",
]
