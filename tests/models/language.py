"""A small language model, written by hand: causal or not, with caches or without."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser

Array = npt.NDArray[Any]

CACHES = ", float[B, 2, P, 8] past_0_key, float[B, 2, P, 8] past_0_value"
PRESENT = ", float[B, 2, S, 8] present_0_key, float[B, 2, S, 8] present_0_value"

GRAPH = """
    <ir_version: 8, opset_import: ["" : 17]>
    decoder (int64[B, {tokens}] input_ids, int64[B, {total}] attention_mask, int64[B, {tokens}] position_ids{caches})
        => (float[B, {tokens}, {vocabulary}] logits{present})
    <int64[4] split = {{0, 0, 2, 8}}, int64[3] merge = {{0, 0, 16}}, int64[1] one = {{1}}, int64[2] two = {{1, 2}},
     int64 first = {{0}}, int64 step = {{1}}, float hidden = {{-1e9}}>
    {{
        words = Gather(embedding, input_ids)
        places = Gather(positions, position_ids)
        x = Add(words, places)
        qf = MatMul(x, wq) kf = MatMul(x, wk) vf = MatMul(x, wv)
        qs = Reshape(qf, split) ks = Reshape(kf, split) vs = Reshape(vf, split)
        q = Transpose <perm = [0, 2, 1, 3]> (qs)
        kn = Transpose <perm = [0, 2, 1, 3]> (ks)
        vn = Transpose <perm = [0, 2, 1, 3]> (vs)
        {concat}
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul(q, kt)
        padding = Cast <to = 9> (attention_mask)
        seen = Unsqueeze(padding, two)
        {causal}
        sm = Where(allowed, s, hidden)
        p = Softmax <axis = -1> (sm)
        c = MatMul(p, v)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        cm = Reshape(ct, merge)
        o = MatMul(cm, wo)
        r = Add(o, x)
        h = MatMul(r, up)
        g = Relu(h)
        d = MatMul(g, down)
        z = Add(d, r)
        logits = MatMul(z, head)
        {hand_on}
    }}"""

WITH_CACHES = """k = Concat <axis = 2> (past_0_key, kn)
        v = Concat <axis = 2> (past_0_value, vn)"""
WITHOUT_CACHES = "k = Identity(kn) v = Identity(vn)"
CAUSAL = """
        ki = Shape <start = 2, end = 3> (k) kl = Squeeze(ki)
        qi = Shape <start = 2, end = 3> (q) ql = Squeeze(qi)
        start = Sub(kl, ql)
        rows = Range(start, kl, step) rowsu = Unsqueeze(rows, one)
        columns = Range(first, kl, step)
        earlier = LessOrEqual(columns, rowsu)
        allowed = And(seen, earlier)"""


def rename_caches(graph: onnx.GraphProto) -> None:
    """As exporters call them; the parser takes no dots."""
    new = {"past_0_": "past_key_values.0.", "present_0_": "present.0."}
    for value in (*graph.input, *graph.output):
        for old, name in new.items():
            value.name = value.name.replace(old, name)
    for node in graph.node:
        for names in (node.input, node.output):
            for index, text in enumerate(names):
                for old, name in new.items():
                    text = text.replace(old, name)
                names[index] = text


@dataclass(frozen=True)
class Language:
    """One layer of attention and feed-forward. ``cached``: past keys and values go in, all go out. ``causal``: tokens
    see earlier ones only. ``tokens``: a static number of them; None: any."""

    cached: bool = False
    causal: bool = True
    tokens: int | None = None
    vocabulary: int = 24
    sharpness: float = 1.0
    seed: int = 0

    def model(self) -> onnx.ModelProto:
        tokens = str(self.tokens or "T")
        text = GRAPH.format(
            tokens=tokens,
            total="S" if self.cached else tokens,
            vocabulary=self.vocabulary,
            caches=CACHES if self.cached else "",
            present=PRESENT if self.cached else "",
            concat=WITH_CACHES if self.cached else WITHOUT_CACHES,
            causal=CAUSAL if self.causal else "allowed = Identity(seen)",
            hand_on="present_0_key = Identity(k) present_0_value = Identity(v)" if self.cached else "",
        )
        model = parser.parse_model(text)
        for name, array in self.weights().items():
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        rename_caches(model.graph)
        onnx.checker.check_model(model)
        return model

    def weights(self) -> dict[str, Array]:
        rng = np.random.default_rng(self.seed)

        def draw(rows: int, columns: int, scale: float = 1.0) -> Array:
            return np.asarray(rng.standard_normal((rows, columns)) * scale / np.sqrt(rows), np.float32)

        width = 16
        return {
            "embedding": draw(self.vocabulary, width, np.sqrt(self.vocabulary)),
            "positions": draw(128, width, 8.0),
            **{name: draw(width, width) for name in ("wq", "wk", "wv", "wo")},
            "up": draw(width, 128),
            "down": draw(128, width, 2.0),
            "head": draw(width, self.vocabulary, self.sharpness),
        }

    def sample(self, samples: int, tokens: int, seed: int = 1) -> Array:
        """[samples, tokens]: ids that the model itself draws one after another, so that it knows their distribution."""
        import onnxruntime as ort

        plain = Language(False, self.causal, None, self.vocabulary, self.sharpness, self.seed).model()
        session = ort.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, self.vocabulary, (samples, 1))
        for length in range(1, tokens):
            feeds = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.tile(np.arange(length), (samples, 1)),
            }
            logits = session.run(["logits"], feeds)[0][:, -1].astype(np.float64)
            gumbel = rng.gumbel(size=logits.shape)  # the largest of logits and this is drawn by their softmax
            ids = np.concatenate([ids, (logits + gumbel).argmax(-1)[:, None]], 1)
        return ids


def write_tokenizer(folder: Path, vocabulary: int = 24, around: Literal["", "both"] = "") -> Path:
    """``tokenizer.json`` of the words ``w0``, ``w1``, ... in ``folder``. ``around`` "both": the first two words become
    tokens that begin and end every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="w0 $A w1", special_tokens=[("w0", 0), ("w1", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_language_folder(folder: Path, language: Language | None = None) -> Path:
    """``model.onnx`` and ``tokenizer.json`` in a new ``folder``. None: a sharp decoder with caches."""
    folder.mkdir(parents=True)
    onnx.save((language or Language(cached=True, sharpness=3)).model(), folder / "model.onnx")
    write_tokenizer(folder)
    return folder / "model.onnx"


def as_text(ids: Array) -> str:
    """The words of [samples, tokens], one sample per line."""
    return "\n".join(" ".join(f"w{number}" for number in row) for row in ids) + "\n"


def negative_log_likelihoods(logits: Array, ids: Array) -> Array:
    """[samples, tokens - 1]: of each token but the first, from the logits in front of it."""
    scores = logits[:, :-1].astype(np.float64)
    normalizer = np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)) + scores.max(-1)
    return np.asarray(normalizer - np.take_along_axis(scores, ids[:, 1:, None], -1)[..., 0])
