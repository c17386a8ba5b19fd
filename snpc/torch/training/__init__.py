"""Training of graphs in torch: loop, losses, data order, checkpoints, several processes.

Files
  adapters      Adapters: instead of every matrix, a low-rank update of it is trained, and merged into the matrix at the
                end.
  checkpoints   Checkpoints: the state of a run in one file, replaced atomically, so that a kill leaves a whole one.
  distributed   The process that a run computes in: a single one, or one of several that torchrun started (torch's DDP).
  fsdp          Fully sharded data parallelism (torch's FSDP2): weights, gradients and optimizer state, sharded over
                processes.
  labels        Labels of calibration data: one whole number, or a row of them, per sample of the source.
  loop          The training loop: a module, a loss, batches and a number of steps.
  losses        Losses.
  options       Options of a training run, and its progress.
  reinitialize  New random weights for a pruned model: training from scratch is a baseline (Liu et al.
  sampling      Calibration data as training data: shuffled, split, or sharded over processes.
  sparsity      Unstructured sparsity: decay of weights that the loss does not feel, and the smallest weights set to
                zero.
  teacher       The dense model as a teacher: run by onnxruntime on a CPU, as a torch module where the student is on a
                GPU.
"""

from __future__ import annotations

from snpc.torch.training.adapters import add_adapters, merge_adapters
from snpc.torch.training.checkpoints import (
    CheckpointFile,
    CheckpointOptions,
    invalid_checkpoint_error,
    make_checkpoint_folder,
    open_checkpoint,
    other_run_error,
    run_fingerprint,
    unexpected_checkpoint_error,
)
from snpc.torch.training.distributed import Worker, distributed_worker, wait_for_workers
from snpc.torch.training.fsdp import copy_gathered_weights
from snpc.torch.training.labels import load_labels
from snpc.torch.training.loop import TrainingHooks, TrainingResult, train
from snpc.torch.training.losses import Batch, cross_entropy, distillation_loss
from snpc.torch.training.options import TrainingCallback, TrainingOptions, TrainingProgress
from snpc.torch.training.reinitialize import reinitialize
from snpc.torch.training.sampling import (
    hold_out,
    one_sample_batches,
    sample_ids,
    shard_batches,
    shuffle_samples,
    skip_batches,
)
from snpc.torch.training.sparsity import Sparsifier, Sparsity
from snpc.torch.training.teacher import Teacher, TeacherOutputs, mean_squares, teacher_function

__all__ = [
    "Batch",
    "CheckpointFile",
    "CheckpointOptions",
    "Sparsifier",
    "Sparsity",
    "Teacher",
    "TeacherOutputs",
    "TrainingCallback",
    "TrainingHooks",
    "TrainingOptions",
    "TrainingProgress",
    "TrainingResult",
    "Worker",
    "add_adapters",
    "copy_gathered_weights",
    "cross_entropy",
    "distillation_loss",
    "distributed_worker",
    "hold_out",
    "invalid_checkpoint_error",
    "load_labels",
    "make_checkpoint_folder",
    "mean_squares",
    "merge_adapters",
    "one_sample_batches",
    "open_checkpoint",
    "other_run_error",
    "reinitialize",
    "run_fingerprint",
    "sample_ids",
    "shard_batches",
    "shuffle_samples",
    "skip_batches",
    "teacher_function",
    "train",
    "unexpected_checkpoint_error",
    "wait_for_workers",
]
