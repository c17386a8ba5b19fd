"""Argument groups: a frozen dataclass for each subject, with its click options and the values that they describe.

Files
  building     What a runtime target is built with.
  calibration  Calibration data, evaluation data and statistics.
  group        What an argument group is, and commands made of groups.
  metric       How outputs are judged.
  model        MODEL, and its analysis.
  output       Files that are written.
  parsers      Texts of options to values.
  planning     What to cut, how much, and the tokens: the groups that ``prune``, ``plan`` and ``sweep`` share.
  running      How models are run, and the workload of a latency.
  text         How text becomes token ids.
  torch_package  snpc.torch, which is imported only when it is needed.
  tracking     Where runs are logged.
  training     What a model is finetuned with: the fields of ``snpc.torch.TrainingOptions``, the data, and checkpoints.
  typed        The command as it was typed, and other commands made of it: for advice that can be pasted into a shell.
"""

from __future__ import annotations

from snpc.cli.arguments.building import BuildArguments, PruneBuildArguments
from snpc.cli.arguments.calibration import (
    CalibrationArguments,
    ImageArguments,
    SavedStatisticsArguments,
    ScoredCalibrationArguments,
    StatisticsArguments,
)
from snpc.cli.arguments.group import FILE_PATH, ArgumentGroup, argument, command, option, subgroup
from snpc.cli.arguments.metric import METRIC_HELP, MetricArguments
from snpc.cli.arguments.model import (
    ModelArguments,
    ModelPath,
    PrunableModelArguments,
    PrunedModelArguments,
    QuantizedModelArguments,
    SizeArguments,
    WatchedModelArguments,
    load_and_analyze,
)
from snpc.cli.arguments.output import DumpArguments, JsonArguments, check_output_paths
from snpc.cli.arguments.parsers import parse_precisions, parse_target_name
from snpc.cli.arguments.planning import PlanningArguments
from snpc.cli.arguments.running import (
    ExecutionArguments,
    LimitedExecutionArguments,
    QuietArguments,
    SpreadExecutionArguments,
    WorkloadArguments,
)
from snpc.cli.arguments.text import TextArguments
from snpc.cli.arguments.torch_package import import_gradient_provider, import_torch_package
from snpc.cli.arguments.tracking import TrackingArguments
from snpc.cli.arguments.training import CheckpointArguments, ScheduleArguments, TrainingArguments, TrainingDataArguments
from snpc.cli.arguments.typed import TypedCommand

__all__ = [
    "FILE_PATH",
    "METRIC_HELP",
    "ArgumentGroup",
    "BuildArguments",
    "CalibrationArguments",
    "CheckpointArguments",
    "DumpArguments",
    "ExecutionArguments",
    "ImageArguments",
    "JsonArguments",
    "LimitedExecutionArguments",
    "MetricArguments",
    "ModelArguments",
    "ModelPath",
    "PlanningArguments",
    "PrunableModelArguments",
    "PruneBuildArguments",
    "PrunedModelArguments",
    "QuantizedModelArguments",
    "QuietArguments",
    "SavedStatisticsArguments",
    "ScheduleArguments",
    "ScoredCalibrationArguments",
    "SizeArguments",
    "SpreadExecutionArguments",
    "StatisticsArguments",
    "TextArguments",
    "TrackingArguments",
    "TrainingArguments",
    "TrainingDataArguments",
    "TypedCommand",
    "WatchedModelArguments",
    "WorkloadArguments",
    "argument",
    "check_output_paths",
    "command",
    "import_gradient_provider",
    "import_torch_package",
    "load_and_analyze",
    "option",
    "parse_precisions",
    "parse_target_name",
    "subgroup",
]
