"""Sizes of dynamic dimensions at which a model runs, found by running it: no shape inference knows all that nodes
demand."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from snpc.errors import UserError
from snpc.graph import DimSizes, trial_dim_sizes
from snpc.passes import Analysis
from snpc.runtime.execution.random_inputs import random_batch
from snpc.runtime.execution.temporary_session import RunFunction

MOST_TRIALS = 48
MOST_TRIAL_SECONDS = 30.0
SHOWN_TRIALS = 4
SAMPLES = 2  # of a trial, where the model takes more than one
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\{[^}]*\}")


def find_running_sizes(analysis: Analysis, run: RunFunction) -> DimSizes:
    """The first sizes of dynamic dimensions at which ``run``, the original, runs on random inputs; those of the
    analysis where it has no dynamic axis.

    UserError: it runs at none that was tried; the message says which, and what to give.
    """
    if not analysis.traced_graph.dim_sizes:
        return analysis.traced_graph.dim_sizes
    graph, chosen, given = analysis.model.graph.graph, analysis.traced_graph.dim_sizes, analysis.given_sizes
    tried: list[DimSizes] = []
    told: list[int] = []
    last = ""
    start = time.monotonic()
    for sizes in trial_dim_sizes(graph, chosen, given, told):
        tried.append(sizes)
        try:
            run(random_batch(analysis, SAMPLES, dim_sizes=sizes))
        except UserError as error:
            last = str(error)
            told[:] = told_numbers(last)
        else:
            return sizes
        if len(tried) >= MOST_TRIALS or time.monotonic() - start > MOST_TRIAL_SECONDS:
            break
    shown = "; ".join(sizes_text(sizes) for sizes in tried[:SHOWN_TRIALS])
    raise UserError(
        f"{last}; {len(tried)} sizes of its dynamic dimensions were tried ({shown}"
        f"{'; ...' if len(tried) > SHOWN_TRIALS else ''}); give sizes that it takes with --dim-param NAME=N or "
        "--input-shapes INPUT:1,16, or inputs with --calib DATA"
    )


def told_numbers(message: str) -> list[int]:
    """Sizes that an error of onnxruntime names, without the numbers in names of nodes."""
    text = QUOTED.sub(" ", message.partition("Status Message:")[2] or message.partition("]")[2])
    return [int(number) for number in re.findall(r"(?<![\w.])\d{1,4}(?![\w.])", text)][:6]


def sizes_text(sizes: Mapping[str, int]) -> str:
    """``batch=2 sequence=7``, as --dim-param takes them."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())
