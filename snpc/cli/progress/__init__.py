"""Progress on stderr: one bar for a run on a terminal, lines in a pipe.

Files
  displays      Displays: how the state of a run is shown. A bar on a terminal; plain lines in a pipe.
  run_progress  The progress of one command: what its stages say goes to one display, drawn by a thread of its own.
  time_left     How long a run still takes: an estimate over the stages that are under way and those that have
                not begun.
  training      The progress of training: a bar with the loss on a terminal, lines in a pipe.
"""

from __future__ import annotations

from snpc.cli.progress.run_progress import RunProgress, command_progress
from snpc.cli.progress.training import print_round, training_progress

__all__ = ["RunProgress", "command_progress", "print_round", "training_progress"]
