"""Operators that snpc knows and will not look through, each with its reason. Unknown operators end the same way."""

from __future__ import annotations

from dataclasses import replace

from snpc.ops.quantization import COSTS, NCHWC
from snpc.ops.spec import MICROSOFT, OpSpec

SUBGRAPH = "control flow: its body is not analyzed"
QUANTIZED = "quantized values, which are not looked into: `--dequantize` takes the float model"
LEARNED = "it holds a learned classifier, regressor or feature map in its attributes"
TRAINED = "it belongs to training"
DRAWS_RANDOM = "it draws random numbers"

REASONS = {
    QUANTIZED: (
        "DequantizeLinear QuantizeLinear DynamicQuantizeLinear QLinearMatMul QLinearConv MatMulInteger ConvInteger"
    ),
    SUBGRAPH: "Loop Scan SequenceMap",
    "which positions are read or written depends on the data": (
        "Unique Compress ReverseSequence NonMaxSuppression MaxUnpool MaxRoiPool AffineGrid DeformConv"
    ),
    "a cache of fixed length that it writes into": "TensorScatter",
    "a recurrence over its input": "LSTM GRU RNN",
    "a transform over whole axes": "DFT STFT MelWeightMatrix Det",
    "channels and window positions are folded into one axis": "Col2Im",
    "it cuts or pads every axis to given sizes": "CenterCropPad",
    "neighboring channels are normalized together": "LRN",
    TRAINED: "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "it works on sequences or optionals, not on tensors": (
        "SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence "
        "ConcatFromSequence Optional OptionalGetElement OptionalHasElement"
    ),
    "it works on text or images": (
        "StringConcat StringNormalizer StringSplit RegexFullMatch TfIdfVectorizer ImageDecoder"
    ),
}

RANDOM_OPERATORS = "Bernoulli Multinomial RandomNormal RandomUniform RandomNormalLike RandomUniformLike"

CLASSICAL_OPERATORS = (
    "ArrayFeatureExtractor Binarizer CastMap CategoryMapper DictVectorizer FeatureVectorizer Imputer LabelEncoder "
    "LinearClassifier LinearRegressor Normalizer OneHotEncoder SVMClassifier SVMRegressor Scaler TreeEnsemble "
    "TreeEnsembleClassifier TreeEnsembleRegressor ZipMap"
)
TRAINING_OPERATORS = "Adagrad Adam Gradient Momentum"

MICROSOFT_REASONS = {
    QUANTIZED: (
        "DequantizeLinear QuantizeLinear DynamicQuantizeMatMul MatMulInteger16 MatMulIntegerToFloat MatMulNBits "
        "MatMulBnb4 MatMulFpQ4 QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearMul QLinearConcat "
        "QLinearAveragePool QLinearGlobalAveragePool QLinearLeakyRelu QLinearReduceMean QLinearSigmoid QLinearSoftmax "
        "QLinearWhere QLinearConv QMoE GatherBlockQuantized DynamicQuantizeLSTM"
    ),
    "a search whose decoder is in its attributes": "BeamSearch GreedySearch Sampling WhisperBeamSearch",
    "keys and values are kept in pages": "PagedAttention SparsePagedAttention",
    "which scores are computed depends on a layout": "SparseAttention LongformerAttention DynamicSparseAttention",
    "its queries, keys and values come packed in five axes": "PackedAttention DecoderMaskedSelfAttention",
}


def opaque_entries() -> list[OpSpec]:
    specs = [
        _opaque_entry(name, reason, domain)
        for domain, table in (("", REASONS), (MICROSOFT, MICROSOFT_REASONS))
        for reason, names in table.items()
        for name in names.split()
    ]
    specs += [
        OpSpec(name, "opaque", f"pinned: {DRAWS_RANDOM}", reason=DRAWS_RANDOM, is_random=True)
        for name in RANDOM_OPERATORS.split()
    ]
    specs += [_opaque_entry(name, LEARNED, "ai.onnx.ml") for name in CLASSICAL_OPERATORS.split()]
    specs += [_opaque_entry(name, TRAINED, "ai.onnx.preview.training") for name in TRAINING_OPERATORS.split()]
    specs.append(replace(_opaque_entry("If", SUBGRAPH, ""), branches=("then_branch", "else_branch")))
    specs.append(_opaque_entry("Conv", "channels lie in blocks, as one processor wants them", NCHWC))
    return [
        *specs,
        _opaque_entry("FlexAttention", "its scores are changed by a graph in its attributes", "ai.onnx.preview"),
    ]


def is_quantized_operator(domain: str, name: str) -> bool:
    """Whether an operator works on quantized values, or makes them, or makes floats of them."""
    table = {"": REASONS, MICROSOFT: MICROSOFT_REASONS}.get(domain, {})
    return name in table.get(QUANTIZED, "").split()


def _opaque_entry(name: str, reason: str, domain: str) -> OpSpec:
    spec = OpSpec(name, "opaque", f"pinned: {reason}", domain=domain, reason=reason)
    cost = COSTS.get((domain, name))
    if cost is None:
        return spec
    return replace(
        spec,
        macs=cost.macs,
        weights=cost.weights,
        bias=cost.bias,
        weight_count=cost.count,
        scale_output=1 if name == "DynamicQuantizeLinear" else None,
        out_shapes=cost.out_shapes,
        dtype_input=cost.dtype_input,
    )
