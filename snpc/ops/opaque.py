"""Operators that snpc knows and will not look through, each with its reason. Unknown operators end the same way."""

from __future__ import annotations

from snpc.ops.spec import OpSpec

SUBGRAPH = "control flow: its body is not analysed"

REASONS = {
    "quantised values: prune the float model first, then quantise": (
        "DequantizeLinear QuantizeLinear DynamicQuantizeLinear QLinearMatMul QLinearConv MatMulInteger ConvInteger"
    ),
    SUBGRAPH: "If Loop Scan SequenceMap",
    "which positions are read or written depends on the data or on an index array": (
        "GatherElements ScatterElements ScatterND Scatter TopK Unique Compress ReverseSequence GridSample "
        "RoiAlign NonMaxSuppression MaxUnpool MaxRoiPool AffineGrid"
    ),
    "positions along its axes are compared with each other": "Trilu",
    "a recurrence over its input": "LSTM GRU RNN",
    "a transform over whole axes": "DFT STFT MelWeightMatrix Det",
    "it draws random numbers": "Bernoulli Multinomial RandomNormal RandomUniform",
    "it works on sequences or optionals, not on tensors": (
        "SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence "
        "ConcatFromSequence Optional OptionalGetElement OptionalHasElement"
    ),
    "groups of channels are normalised together": "GroupNormalization LRN MeanVarianceNormalization",
    "rotates pairs inside the node": "RotaryEmbedding",
    "it works on text or images": (
        "StringConcat StringNormalizer StringSplit RegexFullMatch TfIdfVectorizer ImageDecoder"
    ),
}


def entries() -> list[OpSpec]:
    return [
        OpSpec(name, "opaque", f"pinned: {reason}", reason=reason)
        for reason, names in REASONS.items()
        for name in names.split()
    ]
