"""Passes over calibration data: models that run on the values of every batch, and what is added up and kept.

Files
  batch_values  The named values of every calibration batch, and programs that run on them one after the other.
  program       A model that runs on the values of every batch: which outputs are added up, which are kept.
"""

from __future__ import annotations

from snpc.runtime.batches.batch_values import BatchValues, DenseValues, LocalBatchValues, add_up, dense_name
from snpc.runtime.batches.program import BatchProgram, BatchSums

__all__ = ["BatchProgram", "BatchSums", "BatchValues", "DenseValues", "LocalBatchValues", "add_up", "dense_name"]
