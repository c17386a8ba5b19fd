"""Rotation: residual streams in another orthogonal basis, with the same outputs.

Files
  enter Entries: a weight in front of a residual stream where something other than weights writes it.
  find  Residual streams that can be turned: everything that touches their channels is linear, or normalizes them alike.
  turn  Turns residual streams: the same function, with every value x of a stream replaced by x Q for an orthogonal Q.
"""

from __future__ import annotations

from snpc.passes.rotation.enter import entered_graph, entry_weight
from snpc.passes.rotation.find import ResidualStream, StreamKeepsChannels, StreamReader, find_stream
from snpc.passes.rotation.turn import first_basis, norm_vector, reader_weight, turned_graph

__all__ = [
    "ResidualStream",
    "StreamKeepsChannels",
    "StreamReader",
    "entered_graph",
    "entry_weight",
    "find_stream",
    "first_basis",
    "norm_vector",
    "reader_weight",
    "turned_graph",
]
