"""Running models under onnxruntime: sessions, feeds and memory.

Files
  cluster            Clusters of Dask workers: those of a scheduler, or processes of this machine.
  execution          The settings of everything that runs a model, as one value.
  feeds              Feeds for a model: shapes as users write them, seeded random arrays, and checks of arrays.
  machine            What is known of this machine: cores, the processor's name and vector registers, free memory.
  memory             Memory limits: sizes as users write them, arrays kept within a limit or in files, and the memory a
                     model needs.
  progress           Progress: how far the stages of a run are. Whoever shows it gives ``Execution`` an object with
                     ``Progress.stage``.
  random_data        Random data to calibrate on, where there is none.
  random_inputs      Random inputs for an analyzed model: one feed of them.
  runners            Runners: one interface to onnxruntime (.onnx, .ort) and OpenVINO IR, so that they run on the same
                     inputs.
  session            onnxruntime sessions: opening and running them, and the specs of their inputs and outputs.
  shape_runs         Shapes of a graph's values, read from one run on random inputs, for values that shape inference
                     knows nothing of.
  size_trial         Sizes of dynamic dimensions at which a model runs, found by running it: no shape inference knows
                     all that nodes demand.
  temporary_session  Sessions as functions: of models in memory, written to a temporary file, run, and deleted; and of
                     files.
  workers            Workers of an executor, of ``concurrent.futures`` or of Dask: how many they are, and tasks that run
                     near their data.
"""

from __future__ import annotations

from snpc.graph import register_shape_source
from snpc.runtime.execution.cluster import open_cluster, parse_cluster
from snpc.runtime.execution.execution import DEFAULT_EXECUTION, AlgebraName, Execution
from snpc.runtime.execution.feeds import RandomInputs, check_feeds, check_shape, parse_shapes, random_feeds
from snpc.runtime.execution.machine import available_cores, cpu_name, free_memory, vector_width
from snpc.runtime.execution.memory import (
    SpillableStore,
    format_bytes,
    memory_budget,
    model_weights,
    parse_bytes,
    release_free_memory,
    session_bytes,
    too_large_reason,
    weight_budget,
)
from snpc.runtime.execution.progress import (
    SILENT,
    TIMING_STAGE,
    Advance,
    Progress,
    SilentProgress,
    StageCost,
    announce,
    ignore_advance,
    track,
)
from snpc.runtime.execution.random_data import random_calibration
from snpc.runtime.execution.random_inputs import (
    embedding_rows,
    feed_sizes,
    id_limits,
    probe_batch,
    random_batch,
)
from snpc.runtime.execution.runners import (
    ARTIFACT_SUFFIXES,
    ENGINE_SUFFIXES,
    OPENVINO_SUFFIX,
    PRECISION_RT_INFO,
    Runner,
    import_openvino,
    open_runner,
    stored_metadata,
)
from snpc.runtime.execution.session import (
    MemoryMode,
    SessionLoadError,
    first_lines,
    onnxruntime_version,
    open_session,
    prepare_run,
    resolve_provider,
    run_session,
    save_optimized,
)
from snpc.runtime.execution.shape_runs import run_for_shapes
from snpc.runtime.execution.size_trial import find_running_sizes, sizes_text
from snpc.runtime.execution.temporary_session import (
    RunFunction,
    file_session,
    open_run,
    runs_in_float32,
    save_runnable,
    temporary_session,
)
from snpc.runtime.execution.workers import LostWorker, Reduction, Workers, workers_of

__all__ = [
    "ARTIFACT_SUFFIXES",
    "DEFAULT_EXECUTION",
    "ENGINE_SUFFIXES",
    "OPENVINO_SUFFIX",
    "PRECISION_RT_INFO",
    "SILENT",
    "TIMING_STAGE",
    "Advance",
    "AlgebraName",
    "Execution",
    "LostWorker",
    "MemoryMode",
    "Progress",
    "RandomInputs",
    "Reduction",
    "RunFunction",
    "Runner",
    "SessionLoadError",
    "SilentProgress",
    "SpillableStore",
    "StageCost",
    "Workers",
    "announce",
    "available_cores",
    "check_feeds",
    "check_shape",
    "cpu_name",
    "embedding_rows",
    "feed_sizes",
    "file_session",
    "find_running_sizes",
    "first_lines",
    "format_bytes",
    "free_memory",
    "id_limits",
    "ignore_advance",
    "import_openvino",
    "memory_budget",
    "model_weights",
    "onnxruntime_version",
    "open_cluster",
    "open_run",
    "open_runner",
    "open_session",
    "parse_bytes",
    "parse_cluster",
    "parse_shapes",
    "prepare_run",
    "probe_batch",
    "random_batch",
    "random_calibration",
    "random_feeds",
    "release_free_memory",
    "resolve_provider",
    "run_session",
    "runs_in_float32",
    "save_optimized",
    "save_runnable",
    "session_bytes",
    "sizes_text",
    "stored_metadata",
    "temporary_session",
    "too_large_reason",
    "track",
    "vector_width",
    "weight_budget",
    "workers_of",
]

register_shape_source(run_for_shapes)
