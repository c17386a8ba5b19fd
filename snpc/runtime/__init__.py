"""What runs models or reads and writes files: calibration, statistics, closed forms, sensitivity, evaluation.

Files
  batches/      Passes over calibration data: models that run on every batch, and what is added up and kept.
  calibration/  Calibration data: from the forms that users have it in to batches that fit the model.
  closed_form/  Closed-form compression: rotations and least-squares refits, and the weights they give.
  evaluation/   Measuring written models: latency, equality of outputs, accuracy.
  execution/    Running models under onnxruntime: sessions, feeds and memory.
  io/           Model files: loading, checking, and writing them atomically.
  sensitivity/  Sensitivity analysis: how much the outputs change as each group gets narrower.
  statistics/   Statistics of activations, collected inside onnxruntime over calibration data.
"""

from __future__ import annotations

__all__: list[str] = []
