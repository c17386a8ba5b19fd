"""The schema of the operator table. The entries are in the sibling modules.

A *label array* has the rank of the tensor it describes; an axis has size 1 where the labels do not vary. Labels are
integers, -1 where a position has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from snpc.types import AnyArray, PinKind, Shape

Labels = npt.NDArray[np.int32]

OpKind = Literal[
    "movement",  # positions move, values do not: run on the labels themselves
    "concat",  # movement of several inputs
    "pointwise",  # output position = f(the same position of every input)
    "contraction",  # sum over an index of a product of two inputs
    "normalize",  # statistics along axes, same shape out
    "reduce",  # axes disappear
    "attention",  # scores, softmax and context in one node
    "rotary",  # pairs of channels turned by tables
    "sample",  # channels of its first input, read at positions that others give
    "scatter",  # a tensor with parts of it written over by another
    "choose",  # the largest positions along an axis, and their indices
    "one_hot",  # indices become rows with one entry
    "experts",  # a mixture of experts in one node
    "shape",  # reads the shape only: labels end here, nothing is pinned
    "opaque",  # pinned, for the reason the entry gives
]
MICROSOFT = "com.microsoft"
SHAPE_MISMATCH = "the shapes of its operands do not fit each other"
Effect = Literal["add", "scale", "same", "nonlinear"]


SUMMED_OVER = "it is summed over"


class Blocked(Exception):
    """Raised by a movement rule: these labels cannot follow (axis, reason)."""

    def __init__(self, axis: int, reason: str) -> None:
        super().__init__(reason)
        self.axis = axis
        self.reason = reason


@dataclass(frozen=True)
class OpCall:
    """One node as the rules of the table see it: attributes, shapes of inputs and outputs, contents of known inputs."""

    op: str
    version: int
    attrs: Mapping[str, Any]
    shapes: tuple[Shape | None, ...]
    values: tuple[AnyArray | None, ...]
    out_shapes: tuple[Shape, ...]
    stored: tuple[bool, ...] = ()
    """Which inputs are stored in the file. One that is computed may depend on a dynamic axis, although it is known."""
    bits: tuple[int, ...] = ()
    """Bits of an entry of each input; 0 where its type is not known, or has no size."""

    def value(self, index: int) -> AnyArray | None:
        return self.values[index] if index < len(self.values) else None

    def stored_value(self, index: int) -> AnyArray | None:
        """As ``value``, but None for an input that may change with the sizes of dynamic axes."""
        return self.value(index) if index < len(self.stored) and self.stored[index] else None

    def shape(self, index: int) -> Shape:
        shape = self.shapes[index]
        assert shape is not None, f"{self.op}: the shape of input {index} is asked for but unknown"
        return shape

    def has(self, index: int) -> bool:
        return index < len(self.shapes) and self.shapes[index] is not None


@dataclass(frozen=True)
class TensorCut:
    """What slicing does to one tensor of a movement node.

    ``old``, ``new``: shapes before and after; ``before(axis, position)``: how many entries before a position stay (None
    where blocks differ); ``keep(axis)``: the positions that stay (None where all do, or blocks differ).
    """

    old: Shape
    new: Shape
    before: Callable[[int, int], int | None]
    keep: Callable[[int], AnyArray | None]


@dataclass(frozen=True)
class ParameterUpdate:
    """New parameters of a movement node: ``inputs`` by index (whole arrays; entries that equal the old ones stay as the
    graph computes them), ``attrs`` by name (None removes the attribute)."""

    inputs: Mapping[int, AnyArray] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)


MoveRule = Callable[[OpCall, Labels], list[Labels]]
ParameterRule = Callable[[OpCall, TensorCut, list[TensorCut]], ParameterUpdate]


HeadAttributesRule = Callable[[OpCall, str, Mapping[str, Shape], Mapping[int, Shape]], Mapping[str, Any]]


@dataclass(frozen=True)
class Letters:
    """A contraction in Einstein notation, one letter per axis: letters of both operands that are not in ``out`` are
    summed. ``windowed``: letters of the first operand that a window slides along (the spatial axes of a Conv)."""

    left: str
    right: str
    out: str
    windowed: str = ""


@dataclass(frozen=True)
class OpSpec:
    """One operator: what its rules are, and what they need to know. Indices are those of its inputs."""

    name: str
    kind: OpKind
    summary: str
    domain: str = ""
    data: tuple[int, ...] | None = None
    move: MoveRule | None = None
    recompute: ParameterRule | None = None
    effect: Effect = "nonlinear"
    letters: Callable[[OpCall], Letters] | None = None
    operands: tuple[int, int] = (0, 1)
    bias: int | None = None
    bias_letters: Callable[[OpCall], str] | None = None
    summand: int | None = None  # a further input of the output's shape that a contraction adds
    axes: Callable[[OpCall], tuple[int, ...]] | None = None
    per_axis: tuple[int, ...] = ()
    affine: tuple[int, ...] = ()  # of ``per_axis``: the scale behind a normalization, and its bias
    sum_outputs: tuple[int, ...] = ()  # outputs beside the first that have its positions
    statistic_parts: Callable[[OpCall], int] | None = None
    """Into how many parts the channels (axis 1) are divided for statistics; those of a part are removed together."""
    pins: PinKind = "hard"  # what taking statistics along ``axes`` means for them
    centered: bool = False  # a normalization that subtracts the mean
    epsilon: float = 1e-5  # what a normalization adds to the variance where no attribute says it
    reason: str = ""
    out_shapes: Callable[[OpCall], list[Shape]] | None = None
    resize_attributes: Callable[[OpCall, OpCall], Mapping[str, Any]] | None = None
    resize_head_attributes: HeadAttributesRule | None = None
    """New attributes of a node that splits heads inside, from the call before the cut, the domain, and the shapes of
    its parts (by name) and inputs (by index) after the cut."""
    tables: tuple[int, ...] = ()  # of ``data``: tables of which rows are looked up
    branches: tuple[str, str] | None = None  # attributes: the bodies for a true and for a false first input
    is_random: bool = False  # its output differs from run to run
    has_activation: bool = False
    windowed: bool = False  # a convolution: its outputs lie along axis 1
    dtype_input: int = 0
    macs: Callable[[OpCall], int] | None = None  # of an opaque node that multiplies by weights
    weights: tuple[int, ...] = ()
    """Of a node on quantized values: its inputs that hold weights. Beside them and ``bias`` stand scales, zero points
    and indices."""
    weight_count: Callable[[Mapping[str, Any], Shape, int], int] | None = None
    """(attributes, stored shape, bits of an entry) -> how many weights a packed constant of ``weights`` holds."""
    scale_output: int | None = None  # the output that is the scale of the first one
    int32_outputs: tuple[int, ...] = ()  # outputs that are int32, whatever the type of the input
    divides: bool = False
    subtracts: bool = False
    adds_up: bool = False  # a sum, in which an entry can be weighted
    expands: bool = False  # broadcasts its input to the shape in the second input
    makes_shares: bool = False  # a softmax: its outputs add up to 1
    makes_log_shares: bool = False  # the logarithm of a softmax
    chooses: bool = False  # each entry is that of one of its inputs
    selects: bool = False  # drops an axis by reading one position of it
    index_axis: Callable[[OpCall], int | None] | None = None
    """The axis that the indices of its second input name; None where they name positions of several."""
    counts_data: bool = False  # how many positions it returns depends on the data
