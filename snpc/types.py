"""Every value that crosses a stage border. All are frozen; a value holds its predecessor.

    path -load-> Model -analyze-> Analysis -score-> Scores -plan-> Plan -rewrite-> Pruned -verify-> Verdict

Words: a *unit* is what must go together; units with the same sites form a *group* of ``blocks x size`` (heads x head
width); a *site* is one axis of one constant that is sliced with the group; a *pin* says why an axis stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from snpc.temporary import TemporaryFolder

if TYPE_CHECKING:
    import onnx_ir as ir

FloatArray = npt.NDArray[np.float64]
AnyArray = npt.NDArray[Any]

Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")

Role = Literal["qk", "vo", "ffn", "head", "experts", "conv", "residual", "other", "layer"]
ROLES: tuple[Role, ...] = ("qk", "vo", "ffn", "head", "experts", "conv", "residual", "other", "layer")
RANKED_ROLES: tuple[Role, ...] = ("qk", "vo", "ffn", "conv", "other")
"""Those whose widths a target, a drift or a perplexity can rank by measured losses."""
LAYER_ROLE: Role = "layer"
"""The role of whole sublayers, which are no groups: they go or stay."""

SiteKind = Literal["produce", "consume", "pointwise", "norm"]
Freedom = Literal["basis", "pairs", "select"]
PinKind = Literal["hard", "norm", "head_norm", "sum", "choice"]
ProbeKind = Literal["query", "key", "value", "context", "hidden", "normalized", "expert"]
ClosedFormKind = Literal["low_rank_qk", "low_rank_vo", "refit", "score_selection", "score_refit"]
"""How a group is pruned in closed form: a low-rank basis of queries and keys, or of values; selected units with
refitted consumer weights; or a selection by the error of the attention scores, with no weight changed, or with the
gains of the norms on queries and keys refitted to the scores."""

IntArray = npt.NDArray[np.int64]

BoolArray = npt.NDArray[np.bool_]


APPROXIMATE_REASON = "normalization statistics over it change: `--roles residual` prunes it approximately"
QUANTIZED_TOKENS_REASON = "nodes of a quantized file stay as they are: `--dequantize` takes the float model"
NORMALIZED_INSIDE_REASON = "normalized inside: statistics over it change, so it is cut approximately"
NORMALIZED_HEADS_REASON = "queries and keys are normalized: statistics over it change, so it is cut approximately"

Feeds = Mapping[str, AnyArray]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: ``shape`` holds an int where static and a name (or "") where dynamic. ``capacity``: the
    fewest tokens that a cache of a sliding window has room for; 0 of any other input."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]
    capacity: int = 0


def shape_text(shape: Sequence[int | str]) -> str:
    """For messages: ``(1, "seq", "")`` -> ``[1,seq,?]``."""
    return "[" + ",".join(str(dim) or "?" for dim in shape) + "]"


ModelKind = Literal["file", "onnx", "onnx_ir", "graphsurgeon"]


@dataclass(frozen=True)
class Dequantization:
    """How a float model was made of a quantized file.

    ``source``: the quantized file. ``replaced`` and ``left``: operator -> nodes on quantized values that became float,
    and that did not. ``differences``: outputs of the float model against those of the quantized one, on the inputs that
    ``compared`` describes; where they could not be compared there are none, and it says why.
    """

    source: Path
    replaced: Mapping[str, int]
    left: Mapping[str, int]
    differences: tuple[Difference, ...] = ()
    compared: str = ""


@dataclass(frozen=True)
class StoredConstant:
    """What a quantized file holds for a constant of the float graph.

    ``parts``: "codes", "scale", "zero" (a bias has the "input_scale" of its node too) -> the initializer. ``places``:
    (part, node, index of the input) wherever one is read. ``layout``: see ``ops.quantization.layouts``; ``attributes``:
    of the node that reads it. ``reader``: the node whose output the constant is, where it is one of its own.
    """

    layout: Literal["tensor", "product", "table", "experts", "bias"]
    parts: Mapping[str, str]
    places: tuple[tuple[str, str, int], ...]
    attributes: Mapping[str, Any]
    axis: int
    block: int
    reader: str = ""


@dataclass(frozen=True)
class QuantizedForm:
    """The canonical ``graph`` of a quantized file, and how the float graph that is analyzed was made of it, by name.

    ``nodes``: node of the float graph -> the stored one, of those that both have. ``stand_ins``: stored node -> the
    float node in its place, where it has one. ``values``: stored value of a node that is not in the float graph -> the
    float value behind it; ``quantized``: those that hold codes. ``constants``: float constant -> what is stored.
    ``made``: all nodes of the float graph.
    """

    graph: ir.Model
    nodes: Mapping[str, str]
    stand_ins: Mapping[str, str]
    values: Mapping[str, str]
    quantized: frozenset[str]
    constants: Mapping[str, StoredConstant]
    made: frozenset[str]


@dataclass(frozen=True)
class Restriction:
    """What a model says of that which its ``source`` does.

    ``vocabulary``: [kept] token ids of the source, ascending; each id of the model is a position here. None: all.
    ``last_logits``: there are logits of the last position only. ``differences``: of the outputs from those of the
    source, at what both have, on inputs that ``compared`` describes.
    """

    source: Path
    vocabulary: IntArray | None = field(default=None, repr=False)
    entries: int = 0
    last_logits: bool = False
    differences: tuple[Difference, ...] = ()
    compared: str = ""

    def describe(self) -> str:
        """In words."""
        parts = []
        if self.vocabulary is not None:
            parts.append(f"{len(self.vocabulary)} of {self.entries} entries of the vocabulary")
        if self.last_logits:
            parts.append("logits of the last position only, which give no perplexity")
        return f"{self.source.name}: {', '.join(parts)}"


@dataclass(frozen=True)
class Model:
    """A loaded, canonicalised model. ``graph`` is never changed after loading; ``digest`` names the file's content;
    ``external`` says that its weights lie in other files. ``nodes``: those of the file, constants included. ``kind``:
    what it was loaded from; of a model in memory, ``path`` is a copy of it in ``folder``."""

    path: Path
    graph: ir.Model
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    external: bool = False
    nodes: int = 0
    kind: ModelKind = "file"
    folder: TemporaryFolder | None = field(default=None, repr=False, compare=False)
    dequantization: Dequantization | None = None
    """How it was made of a quantized file, if it was."""
    restriction: Restriction | None = None
    """What it says of its source, if not all."""
    quantized: QuantizedForm | None = field(default=None, repr=False, compare=False)
    """Where ``graph`` is the float graph that the file stands for: the file's own, in which pruned models are
    written."""
    companions: tuple[Model, ...] = field(default=(), repr=False)
    """Models with the same weights, which are cut alike: a decoder that goes on from the caches of this one."""
    merged: Path | None = None
    """The file that holds this model and its only companion as branches, if one does; ``path`` is a copy then."""

    @property
    def source(self) -> Path:
        """The user's file: that which was dequantized or restricted, or that holds both branches, if any."""
        if self.restriction is not None:
            return self.restriction.source
        if self.dequantization is not None:
            return self.dequantization.source
        return self.merged or self.path


@dataclass(frozen=True)
class Site:
    """One axis of one constant that follows a group.

    ``units``: [axis length], the unit (``block * size + position``) that each index belongs to, -1 for none.
    ``kind``: how the constant meets the group (``produce``: output axis of a weight, ``consume``: input axis).
    """

    tensor: str
    axis: int
    kind: SiteKind
    units: IntArray = field(repr=False)


@dataclass(frozen=True)
class Probe:
    """An activation that shows a group's units during calibration.

    ``units`` has the tensor's rank, is 1 on axes the units do not vary on, and holds unit numbers (-1: none).
    Of kind "expert": what experts add to their tokens, a row each. All rows are of the one unit in ``units``, or
    ``chosen`` is the tensor that names the expert of each row, whose number ``units`` [experts] translates.
    """

    kind: ProbeKind
    tensor: str
    units: IntArray = field(repr=False)
    chosen: str = ""


@dataclass(frozen=True)
class Pin:
    """Why ``axis`` of ``tensor`` (``size`` entries) keeps its width.

    ``kind`` "norm": a normalization takes means over it, which fewer positions approximate; "head_norm": the same
    within each head; "sum": it is summed or compared over, possibly within a head only; "choice": some of its positions
    are chosen for each token, as experts are.
    """

    tensor: str
    axis: int
    size: int
    reason: str
    operator: str
    kind: PinKind = "hard"


@dataclass(frozen=True)
class Group:
    """``blocks x size`` units that are sliced at the same sites; every block keeps the same number of units.

    ``macs`` and ``params`` are what the group accounts for in the whole model (removing half of the units saves about
    half of them). A group with ``pins`` is shown but never cut. ``approximate``: normalization statistics are taken
    over the units, so removing some changes the statistics of the others. The residual stream (role "residual") is cut
    only on request; a hidden layer that is normalized inside, and queries and keys that are, are cut as others are.

    ``channels``: of one head that a unit stands for, 2 for a rotary pair. ``step``: kernels take widths in multiples of
    so many units. Groups of the same ``tie``, which is not empty, keep equally many channels per head: keys and values
    of a fused node whose kernel takes one width. Each has its own units. ``least``: units of a block that must stay:
    of experts as many as a router chooses. ``owned``: by unit, constants that go with it as a whole: the weights of an
    expert that has nodes of its own. ``cached``: the units lie in a KV cache.
    """

    id: str
    role: Role
    layer: int
    blocks: int
    size: int
    sites: tuple[Site, ...] = field(repr=False)
    probes: tuple[Probe, ...] = field(repr=False)
    freedom: Freedom
    freedom_reason: str
    macs: int
    params: int
    pins: tuple[Pin, ...] = ()
    approximate: bool = False
    channels: int = 1
    step: int = 1
    tie: str = ""
    least: int = 1
    owned: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    cached: bool = False

    @property
    def prunable(self) -> bool:
        return not self.pins

    @property
    def normalized_inside(self) -> bool:
        """Is it a hidden layer, or are they queries and keys, over which a normalization takes statistics?"""
        return self.approximate and self.role != "residual"


@dataclass(frozen=True)
class SharedProduct:
    """A product, or a weight, of which groups cut several axes: what two of them save is less than what each saves.

    ``kind`` and ``count``: its MACs, or the parameters of the constant ``tensor``. ``axes``: for each axis, group id ->
    the share of the axis that its units are. Whole heads have an axis of their own beside that of their channels, which
    go of the heads that stay. ``counted``: group id -> the share of ``count`` that ``Group.macs`` or ``Group.params``
    has.
    """

    kind: Literal["macs", "params"]
    count: int
    axes: tuple[Mapping[str, float], ...]
    counted: Mapping[str, float]
    tensor: str = ""

    def counted_twice(self, gone: Mapping[str, float]) -> float:
        """By how much the savings of the groups add up to more than what goes. ``gone``: group id -> share of its units
        that goes."""
        left = math.prod(1 - sum(share * gone.get(name, 0.0) for name, share in axis.items()) for axis in self.axes)
        alone = sum(share * gone.get(name, 0.0) for name, share in self.counted.items())
        return self.count * (alone - (1 - left))


@dataclass(frozen=True)
class StreamBasis:
    """A residual stream (of group ``group``), with what its width costs by channels and by directions of a basis.

    ``channels``, ``rotation``: [size + 1], the share of what the weights behind its normalizations read that is lost,
    after a refit, by the width that is kept: of the best channels, and of principal directions. Empty where the stream
    cannot be rotated, for ``reason``. ``rotated``: is it? ``digest``: of the basis. ``norms``: how many normalizations
    weights read it behind.
    """

    group: str
    size: int
    rotated: bool
    reason: str = ""
    channels: tuple[float, ...] = field(default=(), repr=False)
    rotation: tuple[float, ...] = field(default=(), repr=False)
    digest: str = ""
    norms: int = 0


SublayerKind = Literal["attention", "feed-forward", "convolution"]


@dataclass(frozen=True)
class Sublayer:
    """A layer beside the residual stream: it reads ``stream``, and its output ``branch`` is added in ``summed``, all
    three names of values. ``read``: what all of it is computed from, as the stream behind its normalization.

    ``macs`` and ``params``: what goes with it. ``reason``: why it cannot go; "" where it can.
    """

    name: str
    kind: SublayerKind
    stream: str
    branch: str
    summed: str
    read: str
    macs: int
    params: int
    reason: str = ""

    @property
    def removable(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class QuantizedWeights:
    """How many of a model's parameters are quantized in one ``form``, such as "MatMulNBits int4, blocks of 32"."""

    form: str
    params: int


@dataclass(frozen=True)
class Cost:
    """What a model costs. ``macs`` is at batch 1 with dynamic axes bound as ``Analysis.binding`` says; the products of
    ``not_counted`` (number and operator) are not in it. ``quantized``: which of the parameters are no floats."""

    params: int
    macs: int
    bytes: int
    nodes: int
    not_counted: tuple[str, ...] = ()
    quantized: tuple[QuantizedWeights, ...] = ()

    @property
    def quantized_params(self) -> int:
        return sum(entry.params for entry in self.quantized)


@dataclass(frozen=True)
class CriterionInputs:
    """All that a criterion sees of one group: arrays, no graph.

    ``produce``/``consume``: weight name -> [blocks*size, fan], row ``block*size + position`` is what makes / what reads
    that unit (float64). ``sums``: what ``Criterion.observe`` returned, summed over ``samples`` calibration samples.
    """

    role: Role
    blocks: int
    size: int
    produce: Mapping[str, FloatArray]
    consume: Mapping[str, FloatArray]
    sums: Mapping[str, FloatArray]
    samples: int


MetricFunction = Callable[[AnyArray, AnyArray], Any]
"""(original, pruned) of one output -> a distance from 0 on, or one per sample."""


@dataclass(frozen=True)
class ChosenMetric:
    """How the user wants an output to be judged: by name, or by ``function``. ``axis``: that of the classes."""

    name: str
    axis: int | None = None
    function: MetricFunction | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Perplexity:
    """Of the next token, by the original (``before``) and the written file (``after``), over so many ``tokens``.
    ``error``: standard error of the factor over samples; 0 where it is not known."""

    before: float
    after: float
    tokens: int
    error: float = 0.0

    @property
    def factor(self) -> float:
        """How many times as large it is."""
        return self.after / self.before


@dataclass(frozen=True)
class TaskChange:
    """The score on labels by ``metric``, from 0 to 1, of the original (``before``) and the written file (``after``).
    ``error``: standard error of the change; 0 where it is not known."""

    metric: str
    before: float
    after: float
    samples: int
    source: str
    error: float = 0.0

    @property
    def drop(self) -> float:
        """By how many points the score is lower: 1 is one in a hundred."""
        return 100 * (self.before - self.after)


@dataclass(frozen=True)
class Difference:
    """Two outputs of the same name compared: largest difference, and root mean square relative to the reference."""

    output: str
    max_abs_diff: float
    relative: float
    cosine: float
    agreement: float | None = None
    """Share of rows whose largest entry is the same; only for scores of classes."""
    metric: str = "none"
    """How it is judged: "kl", "relative", "cosine", "mismatch" or a function of the user; "none": not at all."""
    distance: float = 0.0
    """In that metric; 0: equal. "kl" is in nats."""
    drift: float = 0.0
    """What ``--max-drift`` limits: the relative change of what counts, or the distance where the user chose a metric; 0
    where the output is not judged."""
    error: float = 0.0
    """Standard error of the distance over samples; 0 where it is not known."""
    interval: tuple[float, float] | None = None
    """95 % interval of the agreement, over samples."""
    rows: int = 1
    """Rows of one sample, as the tokens of a text."""
    perplexity: Perplexity | None = None
    """Of a language model's logits; None for any other output."""

    @property
    def grade(self) -> Grade:
        """By the limits of the metric, which docs/quality.md derives; "unknown" where there are none."""
        limits = GRADE_LIMITS.get(self.metric)
        if limits is None:
            return "unknown"
        good, fair = limits
        return "good" if self.distance <= good else "fair" if self.distance <= fair else "poor"


@dataclass(frozen=True)
class Requantization:
    """How the constants of a quantized file were cut: ``sliced`` are made of stored codes and scales, bit for bit;
    ``requantized`` were rounded anew, in the same scheme. ``differences``: what that rounding changes in the outputs of
    the pruned float model; none where nothing was rounded, or nothing was run."""

    sliced: int
    requantized: int
    differences: tuple[Difference, ...] = ()

    @property
    def relative(self) -> float:
        """The largest relative change of an output."""
        return max((difference.relative for difference in self.differences), default=0.0)


Grade = Literal["good", "fair", "poor", "unknown"]
GRADES: tuple[Grade, ...] = ("unknown", "good", "fair", "poor")
GRADE_LIMITS: Mapping[str, tuple[float, float]] = {
    "kl": (0.1, 0.3),
    "relative": (0.1, 0.3),
    "cosine": (0.02, 0.1),
    "mismatch": (0.02, 0.1),
}
"""Metric -> the largest distance that is good, and the largest that is fair."""


@dataclass(frozen=True)
class Quality:
    """How close the outputs of a written file are to the original's. It says nothing of whether the rewrite is right.

    ``differences``: written against original, an entry per output; empty where outputs could not be compared.
    ``samples``: how many were run. ``held_out``: nothing was fitted to them. ``source``: the data in words.
    ``random_inputs``: noise was run, which says nothing of real inputs.
    """

    differences: tuple[Difference, ...]
    samples: int
    held_out: bool
    source: str
    random_inputs: bool

    @property
    def drift(self) -> float:
        """The largest ``Difference.drift`` of an output: what ``--max-drift`` limits."""
        return max((d.drift for d in self.differences), default=0.0)

    @property
    def perplexity(self) -> Perplexity | None:
        """Of a language model; None for any other."""
        return next((d.perplexity for d in self.differences if d.perplexity is not None), None)

    @property
    def grade(self) -> Grade:
        """The worst grade of an output; "unknown" on random inputs, and where no output could be judged."""
        if self.random_inputs:
            return "unknown"
        return max((d.grade for d in self.differences), key=GRADES.index, default="unknown")


@dataclass(frozen=True)
class Verdict:
    """What ``verify`` found: that the rewrite is right, and apart from that the ``quality`` of the result.

    ``structure``: checks of the file that hold. ``equals_mask``: sliced against masked, on the inputs that ``compared``
    describes; at most ``tolerance`` apart, relative to the output.
    ``not_run``: why no outputs were compared, so that nothing was verified but the structure; "" where they were.
    """

    structure: tuple[str, ...]
    equals_mask: tuple[Difference, ...]
    quality: Quality
    compared: str
    tolerance: float
    not_run: str = ""
    requantization: Requantization | None = None
    """How the codes of a quantized file were cut; None of a float file, or of one whose plan is not known."""

    @property
    def max_abs_diff(self) -> float | None:
        """Largest difference between sliced and masked, over all outputs; None where that was not compared."""
        return max((d.max_abs_diff for d in self.equals_mask), default=None)
