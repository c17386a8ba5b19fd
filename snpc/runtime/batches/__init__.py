"""Passes over calibration data: models that run on the values of every batch, and what is added up and kept.

Files
  batch_values      The named values of every calibration batch, and programs that run on them one after the other.
  block_worker      What a worker does: it runs programs on blocks of batches, and keeps the values of these batches in
                    files.
  distributed       Batches whose values lie on the workers of an executor: what moves is programs and sums, never
                    values.
  packed_symmetric  Symmetric matrices packed without their lower half: strips of rows, each from its diagonal on,
                    concatenated.
  pairwise_sum      Sums whose result does not depend on who adds which part: numbered arrays are added in pairs of
                    neighbors, pairs of these, and so on, in float64.
  partition         Where a model is cut so that no segment's weights take more memory than there is for them.
  program           A model that runs on the values of every batch: which outputs are added up, which are kept.
  streamed_model    Weight streaming: a model whose weights do not fit into memory runs one segment after the other.
"""

from __future__ import annotations

from snpc.runtime.batches.batch_values import BatchValues, DenseValues, LocalBatchValues, add_up, dense_name
from snpc.runtime.batches.distributed import DistributedBatchValues
from snpc.runtime.batches.packed_symmetric import packed_length, row_strips, unpack_symmetric, unpacked_size
from snpc.runtime.batches.program import BatchProgram, BatchSums
from snpc.runtime.batches.streamed_model import (
    StreamedModel,
    border_store,
    check_runs_whole,
    must_stream,
    open_file,
    open_graph,
    run_each,
    stream_segments,
    too_large_to_stream,
)

__all__ = [
    "BatchProgram",
    "BatchSums",
    "BatchValues",
    "DenseValues",
    "DistributedBatchValues",
    "LocalBatchValues",
    "StreamedModel",
    "add_up",
    "border_store",
    "check_runs_whole",
    "dense_name",
    "must_stream",
    "open_file",
    "open_graph",
    "packed_length",
    "row_strips",
    "run_each",
    "stream_segments",
    "too_large_to_stream",
    "unpack_symmetric",
    "unpacked_size",
]
