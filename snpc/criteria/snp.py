"""SNP: keep the attention scores, drop what others already say (ECCV 2024, arXiv 2404.11630)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from snpc.errors import UserError
from snpc.types import CriterionInputs, FloatArray, Role

Average = Literal["scores", "grams"]

_GRAMS = ("gram:query", "gram:key")
# Measured: half of Q/K removed from an ImageNet ViT-Tiny (d = 64; 64 calibration pictures, nothing
# trained, average=scores), top-1 on 400 others, dense 81.5:
#     terms   1     2     4     8     12    16    24    32    48    64
#     top-1   55.8  60.5  67.5  73.5  64.8  55.0  51.0  48.2  39.0  40.8
# 8 is also closest to the dense outputs (KL divergence) at a quarter and at three quarters removed. At half removed, a
# Llama with d = 8 is best at 4, and a BART with d = 128 hardly changes from 8 on. average=grams: 72.5 at 8 terms.
_TERMS = 8
_RANK_TOLERANCE = 1e-12
_CHUNK = 1 << 22  # entries of a similarity matrix held at once: 32 MiB


@dataclass(frozen=True)
class Snp:
    """SNP: attention scores kept for query and key, redundancy of the weights for everything else.

    **qk** (1a), per sample and head. Column i of Q and of K [N, d] make one rank-one term of the scores
    ``S = Q K^T = U diag(sigma) V^T``; it is kept for its likeness to the leading terms of S:

        omega[i] = sum_{j <= terms} |cos(sigma_j u_j v_j^T, q_i k_i^T)|
                 = sum_{j <= terms} |u_j.q_i| |v_j.k_i| / (|q_i| |k_i|)

    computed from ``Q^T Q`` and ``K^T K`` alone, see `qk_scores`. Query heads that share a key head share its units:
    their Grams arrive added up, which is the same as stacking their rows.

    **terms.** The paper leaves it open. It must stay well below d: sigma cancels in the cosines, so that with all d
    terms the score no longer knows which of them are strong, and where the columns are orthogonal every unit scores
    exactly 1. The default is 8, or half of d (rounded up) where heads are narrower than 16.

    **vo** (1b), **ffn** (1c) and what has no rule of its own, from the weights: the summed distance of a unit's
    producing weights w_i to those of all units of the group, in all heads,

        omega[i] = sum_l (1 - |cos(w_i, w_l)|)                                             see `distances`

    added over the weights where several make the unit (the two of a gated FFN).

    **residual** (1c): every producer's distances divided by their sum, then averaged over the producers.

    **head**: the paper's criterion is not published. snpc's choice is the same distance between whole heads,
    ``omega[h] = sum_j (1 - |cos(vec W_V^h, vec W_V^j)|)``, from the value weights.

    Where a formula's input does not exist: a missing Gram (a constant query is not measured) counts as the identity, as
    if that side were equally strong in all units and uncorrelated; with neither Gram, qk is scored like ffn; with no
    producing weights (value weights, for heads) the remaining ones serve, and with none at all every unit scores 0.
    """

    name: ClassVar[str] = "snp"

    terms: int = field(
        default=0,
        metadata={"help": "leading singular terms of the attention scores; 0: 8, or half of a head narrower than 16"},
    )
    average: Average = field(
        default="scores", metadata={"help": "scores: mean of the samples' scores; grams: score of their mean Grams"}
    )

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise UserError(f"criterion 'snp': terms={self.terms} is negative: give a number of terms, or 0 for 8")

    def probes(self, role: Role) -> tuple[str, ...]:
        """The Grams of query and key for qk; nothing else takes data."""
        return _GRAMS if role == "qk" else ()

    def observe(self, role: Role, batch: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """``{"score": [blocks, size]}``, or the Grams themselves with ``average=grams``; summed over the samples."""
        grams = {name: batch[name] for name in self.probes(role) if name in batch}
        if self.average == "grams" or not grams:
            return {name: gram.sum(axis=0) for name, gram in grams.items()}
        return {"score": self._qk(grams).sum(axis=0)}

    def score(self, inputs: CriterionInputs) -> FloatArray:
        """[blocks, size], finite and not negative. A unit with no query, no key or no weights scores 0, the lowest."""
        if inputs.role == "qk" and inputs.sums:
            return self._measured(inputs)
        per_weight = [cosine_distances(weight) for weight in _unit_weights(inputs)]
        if inputs.role == "residual":
            per_weight = [omega / (len(per_weight) * (omega.sum() or 1.0)) for omega in per_weight]
        return sum(per_weight, np.zeros(inputs.blocks * inputs.size)).reshape(inputs.blocks, inputs.size)

    def _measured(self, inputs: CriterionInputs) -> FloatArray:
        if "score" in inputs.sums:
            return inputs.sums["score"] / max(inputs.samples, 1)
        return self._qk(inputs.sums)  # of the summed Grams, as good as of their mean: the score has no scale

    def _qk(self, grams: Mapping[str, FloatArray]) -> FloatArray:
        known = next(iter(grams.values()))
        size = known.shape[-1]
        query, key = (grams.get(name, np.broadcast_to(np.eye(size), known.shape)) for name in _GRAMS)
        return qk_scores(query, key, self.terms or min(_TERMS, (size + 1) // 2))


def qk_scores(query: FloatArray, key: FloatArray, terms: int) -> FloatArray:
    """SNP's attention score from Grams: two [..., d, d] (Q^T Q and K^T K) -> [..., d], in [0, 1].

    Any R with R^T R = C holds the same inner products as the activations it came from, so with SVD(R_q R_k^T) =
    A diag(sigma) B^T: u_j.q_i = A[:, j].R_q[:, i], v_j.k_i = B[:, j].R_k[:, i].
    A unit whose query or key is zero on every row scores 0, and so does every unit where S is zero.
    """
    left, left_norms = _unit_roots(query)
    right, right_norms = _unit_roots(key)
    product = (left * left_norms[..., None, :]) @ np.swapaxes(right * right_norms[..., None, :], -1, -2)
    u, sigma, vt = np.linalg.svd(product)
    cosines = np.abs(np.swapaxes(u, -1, -2) @ left) * np.abs(vt @ right)  # [..., term, unit]
    real = sigma > _RANK_TOLERANCE * sigma[..., :1]  # past the rank of S a singular pair is any pair, not a term
    counted = real & (np.arange(sigma.shape[-1]) < terms)
    return np.asarray(np.einsum("...j,...ji->...i", counted.astype(np.float64), cosines))


def cosine_distances(weight: FloatArray) -> FloatArray:
    """[units, fan] -> [units]: sum_l (1 - |cos(w_i, w_l)|) over all units; low = redundant.

    A zero row is a multiple of every other one, so its distances are 0: it scores lowest and nothing scores it.
    """
    norms = np.linalg.norm(weight, axis=1, keepdims=True)
    unit = weight / np.where(norms > 0, norms, 1.0)
    alive = norms[:, 0] > 0
    rows = max(1, _CHUNK // max(len(unit), 1))
    likeness = [np.abs(unit[i : i + rows] @ unit.T).sum(axis=1) for i in range(0, len(unit), rows)]
    return np.where(alive, np.maximum(alive.sum() - np.concatenate(likeness), 0.0), 0.0)


def _unit_weights(inputs: CriterionInputs) -> list[FloatArray]:
    """What makes the units; for heads the value weights; failing that whatever else there is."""
    produced = [w for name, w in inputs.produce.items() if inputs.role != "head" or name.startswith("vo:")]
    return produced or list(inputs.produce.values()) or list(inputs.consume.values())


def _unit_roots(gram: FloatArray) -> tuple[FloatArray, FloatArray]:
    """C [..., d, d] -> (R, n), n the columns' norms and R of unit columns with (R diag(n))^T (R diag(n)) = C.

    Eigenvectors rather than Cholesky, because C is singular where there are fewer rows than units or a unit is dead.
    The root is taken of the correlations, so that a column far smaller than its neighbors keeps its digits.
    """
    norms = np.sqrt(np.maximum(np.einsum("...ii->...i", gram), 0.0))
    scale = np.where(norms > 0, norms, 1.0)
    values, vectors = np.linalg.eigh(gram / scale[..., :, None] / scale[..., None, :])
    values = np.where(values > _RANK_TOLERANCE * values[..., -1:], values, 0.0)
    return np.sqrt(values)[..., :, None] * np.swapaxes(vectors, -1, -2), norms
