"""Model files: loading, checking, and writing them atomically.

Files
  atomic         Atomic writes: a file is written in a temporary folder beside its place, flushed to the disk, and
                 renamed.
  duplicate_constants
                 Names that several constants of a graph define, which onnxruntime takes and onnx-ir refuses.
  examples       The trained examples that ship inside the package, and how they reach a user's folder.
  graph_checks   Checks of a graph against the rules of ONNX that later stages rely on: attributes, numbers of inputs,
                 producers.
  in_memory      Models in memory: written to a temporary file that can be run, and read back as the type that came in.
  load           Loading models: tensors checked, external data found, the graph in canonical form.
  mapped_npz     Arrays of .npz files. Large ones are mapped into memory, so that only rows that are used are read.
  protobuf       Reading ONNX files without their weights: tensors of a kilobyte and more stay where they are in the
                 file.
  publish        Publishing: finished files of a staging folder get their names, so that a fault at any step leaves
                 old or new files.
  save           Writing models: weights inside the file, or in a file beside it.
  spill_files    Arrays in temporary files that are mapped into memory: the kernel moves them to the disk where memory
                 gets short.
  tensor_checks  Checks of the tensors in a model file: types, shapes, numbers of bytes, and where external data may
                 lie.
  work_folder    Work folders: results of finished stages in files, so that a run that was killed goes on from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snpc.runtime.io.atomic import atomic_write, check_target, recorded_publications, staging_folder, write_errors
from snpc.runtime.io.examples import write_example
from snpc.runtime.io.in_memory import read_back
from snpc.runtime.io.load import file_bytes, load, local_model, model_files, read_model, refuse_branches
from snpc.runtime.io.mapped_npz import ArrayHeader, map_npz, read_array_header
from snpc.runtime.io.protobuf import read_without_weights
from snpc.runtime.io.publish import discard_model, publish_files
from snpc.runtime.io.save import PROTOBUF_LIMIT, external_data_path, save
from snpc.runtime.io.spill_files import SpillFiles
from snpc.runtime.io.work_folder import NOT_STORED, StageEntry, StoredStage, WorkFolder, digest_of

if TYPE_CHECKING:
    from snpc.runtime.io.in_memory import InMemoryModel as InMemoryModel
    from snpc.runtime.io.load import ModelSource as ModelSource

__all__ = [
    "NOT_STORED",
    "PROTOBUF_LIMIT",
    "ArrayHeader",
    "SpillFiles",
    "StageEntry",
    "StoredStage",
    "WorkFolder",
    "atomic_write",
    "check_target",
    "digest_of",
    "discard_model",
    "external_data_path",
    "file_bytes",
    "load",
    "local_model",
    "map_npz",
    "model_files",
    "publish_files",
    "read_array_header",
    "read_back",
    "read_model",
    "read_without_weights",
    "recorded_publications",
    "refuse_branches",
    "save",
    "staging_folder",
    "write_errors",
    "write_example",
]
