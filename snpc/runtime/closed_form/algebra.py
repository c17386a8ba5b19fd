"""Linear algebra of the closed forms: low-rank bases and refitted weights from second moments of activations.

Everything is float64 and knows no graph. A second moment is a sum over calibration rows, ``C = sum x x'``. Square roots
are symmetric and pseudo-inverted, so moments without full rank are allowed. ``elimination.py`` selects units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

from snpc.errors import UserError
from snpc.runtime.closed_form.dense_algebra import current_algebra
from snpc.types import FloatArray, IntArray

RANK_TOLERANCE = 1e-10  # eigenvalues below this share of the largest count as zero
DEFAULT_RIDGE = 1e-4  # share of the mean diagonal
SMALL_SAMPLE_RIDGE = 0.1  # share of the mean diagonal per unit and row


@contextmanager
def solving(subject: str) -> Iterator[None]:
    """Around linear algebra on statistics: where it does not converge, or a moment is not positive definite in spite of
    its ridge, the statistics are to blame. Raises UserError."""
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise UserError(
            f"{subject}: its closed form cannot be solved ({error}): the statistics are not those of real activations; "
            "measure them again, or leave the group out (--exclude)"
        ) from error


# -- ridge -----------------------------------------------------------------------------------------------------------


def relative_ridge(size: int, rows: float) -> float:
    """The ridge, as a share of the mean diagonal, for moments of ``size`` units over ``rows`` rows.

    It grows as rows get few, since few rows say little about other data (a last layer that only the class token passes
    sees one row per sample).
    """
    return max(DEFAULT_RIDGE, SMALL_SAMPLE_RIDGE * size / max(rows, 1.0))


def absolute_ridge(moment: FloatArray, ridge: float) -> float:
    """What a relative ridge adds to each diagonal entry of ``moment``."""
    return ridge * float(np.trace(moment)) / len(moment) + 1e-12


def add_ridge(moment: FloatArray, ridge: float = DEFAULT_RIDGE) -> FloatArray:
    """A copy of the moment with a relative ridge on its diagonal."""
    regularized = moment.copy()
    if ridge:
        regularized.flat[:: len(regularized) + 1] += absolute_ridge(moment, ridge)
    return regularized


# -- low-rank bases --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankBasis:
    """A change of basis in order of importance: rank r keeps the first r columns of ``encode`` and rows of ``decode``.

    ``encode`` [d, d] multiplies the weights that produce the units (W -> W encode). ``decode`` [d, d] multiplies those
    that consume them (W -> decode W); of queries and keys it multiplies the keys' (W_k -> W_k decode').
    ``loss`` [d + 1]: squared output error by rank.
    """

    encode: FloatArray
    decode: FloatArray
    loss: FloatArray


def symmetric_square_root(moment: FloatArray) -> tuple[FloatArray, FloatArray]:
    """(C^1/2, its pseudo-inverse) of a symmetric positive semi-definite C."""
    values, vectors = current_algebra().eigh((moment + moment.T) / 2)
    values = np.maximum(values, 0.0)
    nonzero = values > RANK_TOLERANCE * max(float(values[-1]), 1e-300)
    roots = np.sqrt(values)
    inverse = np.where(nonzero, 1.0 / np.where(nonzero, roots, 1.0), 0.0)
    product = current_algebra().product
    return product(vectors * roots, vectors.T), product(vectors * inverse, vectors.T)


def column_signs(vectors: FloatArray) -> FloatArray:
    """[columns]: the signs that make the largest entry of each column positive. Which of v and -v a library returns is
    up to it; with these, weights are the same from every one."""
    largest = np.take_along_axis(vectors, np.argmax(np.abs(vectors), axis=0)[None], axis=0)[0]
    return np.where(largest < 0, -1.0, 1.0)


def squared_tail_sums(singular: FloatArray) -> FloatArray:
    """[d + 1]: entry r is the sum of the squares from r on."""
    return np.concatenate([np.cumsum((singular**2)[::-1])[::-1], [0.0]])


def balance_norms(encode: FloatArray, decode: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The same product with columns of ``encode`` as long as rows of ``decode``, so that the weights of neither side
    become tiny (which training and quantization would suffer from)."""
    columns, rows = np.linalg.norm(encode, axis=0), np.linalg.norm(decode, axis=1)
    nonzero = (columns > 0) & (rows > 0)
    factor = np.sqrt(np.where(nonzero, rows, 1.0) / np.where(nonzero, columns, 1.0))
    return encode * factor, decode / factor[:, None]


def solve_low_rank_qk(query: FloatArray, key: FloatArray, ridges: tuple[float, float] = (0.0, 0.0)) -> LowRankBasis:
    """The best rank-r approximation of the attention scores on the data, for every r at once.

    ``query`` [d, d] = sum q q'. ``key`` [d, d] = sum (k - mean)(k - mean)' with the mean of each sequence, since
    softmax ignores what all keys have in common. With C_q^1/2 C_k^1/2 = U S V', T_q = C_q^-1/2 U S^1/2 and
    T_k = C_k^-1/2 V S^1/2, the scores q T_q (k T_k)' with r columns have the least squared error over all pairs of rows
    (A3, arXiv 2505.12942, in the space of q and k). ``encode`` = T_q and ``decode`` = T_k', balanced. ``ridges`` are
    added to the moments first; ``loss`` is the error on the moments without them.
    """
    q_root, q_inverse = symmetric_square_root(add_ridge(query, ridges[0]))
    k_root, k_inverse = symmetric_square_root(add_ridge(key, ridges[1]))
    left, singular, right = current_algebra().svd(q_root @ k_root)
    half = np.sqrt(singular) * column_signs(left)
    encode, decode = balance_norms(q_inverse @ (left * half), (k_inverse @ (right.T * half)).T)
    if not any(ridges):
        return LowRankBasis(encode, decode, squared_tail_sums(singular))
    query_root, key_root = symmetric_square_root(query)[0], symmetric_square_root(key)[0]
    return LowRankBasis(encode, decode, truncation_errors(query_root, encode, decode, key_root))


def solve_shared_qk(query: FloatArray, key: FloatArray, ridges: tuple[float, float] = (0.0, 0.0)) -> LowRankBasis:
    """As ``solve_low_rank_qk``, where one weight produces queries and keys, so that both change basis alike.

    The basis is orthogonal, the principal directions of the sum of both moments, each at a trace of 1. Where the two
    are proportional, no other basis of r columns T has a smaller error of q T (k T)'.
    """
    moments = [add_ridge(moment, ridge) for moment, ridge in zip((query, key), ridges, strict=True)]
    total = sum(moment / max(float(np.trace(moment)), 1e-300) for moment in moments)
    basis = current_algebra().eigh(np.asarray(total))[1][:, ::-1]
    basis = basis * column_signs(basis)
    roots = [symmetric_square_root(moment)[0] for moment in (query, key)]
    return LowRankBasis(basis, basis.T.copy(), truncation_errors(roots[0], basis, basis.T, roots[1]))


def solve_low_rank_vo(context: FloatArray, weight: FloatArray, ridge: float = 0.0) -> LowRankBasis:
    """The best rank-r approximation of value and output projection on the data, for every r at once.

    ``context`` [d, d] = sum (c - mean)(c - mean)' of the context c = P V; ``weight`` [d, D]: the output projection.
    With C^1/2 W = U S V', V -> V C^-1/2 U_r and W -> U_r' C^1/2 W (A3's OV, with the attended input), balanced.
    ``ridge`` is added to C first; ``loss`` is the error without it.
    """
    c_root, c_inverse = symmetric_square_root(add_ridge(context, ridge))
    left, singular, _ = current_algebra().svd(c_root @ weight)
    basis = np.zeros((len(context), len(context)))
    basis[:, : left.shape[1]] = left * column_signs(left)
    if left.shape[1] < len(context):
        singular = np.concatenate([singular, np.zeros(len(context) - len(singular))])
    encode, decode = balance_norms(c_inverse @ basis, basis.T @ c_root)
    if not ridge:
        return LowRankBasis(encode, decode, squared_tail_sums(singular))
    context_root = symmetric_square_root(context)[0]
    return LowRankBasis(encode, decode, truncation_errors(context_root, encode, decode, weight))


def refit_decoder(context: FloatArray, encode: FloatArray, weight: FloatArray, ridge: float = 0.0) -> FloatArray:
    """[r, D]: the output projection for values in the basis ``encode`` [d, r] that best replaces ``weight`` [d, D].

    ``context`` as in ``solve_low_rank_vo``. Where one head reads the values this is ``decode[:r] @ weight`` of their
    basis. Query heads that share values share the basis, but each has its own best projection.
    """
    used = np.linalg.norm(encode, axis=0) > 0  # a reader of fewer outputs than units leaves some of them unused
    projected = encode[:, used].T @ add_ridge(context, ridge)
    fitted = np.zeros((encode.shape[1], weight.shape[1]))
    fitted[used] = np.linalg.solve(projected @ encode[:, used], projected @ weight)
    return fitted


def shared_value_loss(
    contexts: Sequence[FloatArray], weights: Sequence[FloatArray], encode: FloatArray, ridge: float
) -> FloatArray:
    """[d + 1]: squared output error by rank of query heads that share values in the basis ``encode`` [d, d], each with
    its own output projection in ``weights``."""
    loss = np.zeros(len(encode) + 1)
    for rank in range(len(encode)):
        basis = encode[:, :rank]
        for context, weight in zip(contexts, weights, strict=True):
            error = weight - basis @ refit_decoder(context, basis, weight, ridge) if rank else weight
            loss[rank] += float(np.sum(error * (context @ error)))
    return np.maximum.accumulate(loss[::-1])[::-1]


def truncation_errors(left: FloatArray, encode: FloatArray, decode: FloatArray, right: FloatArray) -> FloatArray:
    """[d + 1]: entry r is | left (1 - encode_r decode_r) right |^2 with the first r columns and rows."""
    columns, rows, full = left @ encode, decode @ right, left @ right
    quadratic = (columns.T @ columns) * (rows @ rows.T)  # inner products of the rank-one terms
    linear = np.einsum("ij,ij->j", columns, full @ rows.T)
    by_rank = np.diag(quadratic.cumsum(0).cumsum(1)) - 2 * np.cumsum(linear)
    errors = float(np.sum(full**2)) + np.concatenate([[0.0], by_rank])
    errors[-1] = 0.0  # exact at full rank, but for rounding
    return np.maximum.accumulate(np.maximum(errors, 0.0)[::-1])[::-1]


# -- normalizations over fewer units --------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalizedMoments:
    """Of the n units of a normalization's output before gain and bias: ``mean`` [n] and ``covariance`` [n, n] over
    rows."""

    mean: FloatArray
    covariance: FloatArray

    @classmethod
    def before_affine(
        cls, mean: FloatArray, covariance: FloatArray, gain: FloatArray, bias: FloatArray
    ) -> NormalizedMoments:
        """From the moments behind gain and bias. Of a unit whose gain is nil nothing is seen: it is taken to be
        independent of the others, with a variance of 1."""
        seen = np.abs(gain) > 1e-6 * max(float(np.abs(gain).max()), 1e-300)
        scale = np.where(seen, 1 / np.where(seen, gain, 1.0), 0.0)
        inner = covariance * np.outer(scale, scale)
        inner[np.diag_indices(len(gain))] = np.where(seen, np.diag(inner), 1.0)
        return cls((mean - bias) * scale, inner)


def affine_for_fewer_units(moments: NormalizedMoments, keep: IntArray, centered: bool) -> tuple[FloatArray, FloatArray]:
    """(scale, shift), each [kept]: over the units ``keep`` alone a normalization gives z, over all units n, and scale z
    + shift is n per unit in least squares.

    Over fewer units the mean of a row is m and its deviation s in units of the row's own, so that z = (n - m) / s. The
    moments say how n and n - m vary together; for s stands the root of its mean square.
    """
    count = len(keep)
    weights = np.full(count, 1.0 / count) if centered else np.zeros(count)
    mean, covariance = moments.mean[keep], moments.covariance[np.ix_(keep, keep)]
    common = covariance @ weights  # of each unit with m
    spread, middle = float(weights @ common), float(weights @ mean)
    square = float(np.mean(np.diag(covariance) + mean**2)) - (spread + middle**2)
    deviation = np.sqrt(max(square, 1e-12))
    variance = np.diag(covariance) - 2 * common + spread
    varies = variance > 1e-9 * max(float(np.diag(covariance).mean()), 1e-300)
    slope = np.where(varies, (np.diag(covariance) - common) / np.where(varies, variance, 1.0), 1.0)
    return slope * deviation, mean - slope * (mean - middle)


def statistic_variances(moments: NormalizedMoments, positions: int) -> FloatArray:
    """[n]: by how much the deviation over the other units comes to vary between rows when one unit goes, relative and
    squared.

    The squares of a row add up to n, so those over fewer units vary as the lost ones do. The variance of a square is
    taken as that of a normal variable; a mean over ``positions`` of them varies by so much less.
    """
    variance = np.diag(moments.covariance)
    squares = 2 * variance**2 + 4 * moments.mean**2 * variance
    return np.asarray(squares / positions / (2 * len(variance)) ** 2)


# -- refitted weights ------------------------------------------------------------------------------------------------


def unit_columns(units: IntArray, columns: int) -> IntArray:
    """Indices of the ``columns`` adjacent columns of each of these units."""
    return (units[:, None] * columns + np.arange(columns)).reshape(-1)


def refit_rows(moment: FloatArray, weight: FloatArray, keep: IntArray, ridge: float = DEFAULT_RIDGE) -> FloatArray:
    """[kept, D]: rows for the kept units that best replace ``weight`` [units, D] (ridge least squares, with the ridge
    on the difference from the rows as they were)."""
    hessian, removed = moment[np.ix_(keep, keep)], weight.copy()
    removed[keep] = 0.0
    if ridge:
        hessian.flat[:: len(keep) + 1] += absolute_ridge(moment, ridge)
    return weight[keep] + solve_symmetric(hessian, current_algebra().product(moment[keep], removed))


def solve_ridge(moment: FloatArray, cross: FloatArray, ridge: float) -> FloatArray:
    """[kept, D]: ridge least squares from the second moment and the cross moment with the targets."""
    with suppress(np.linalg.LinAlgError):
        return current_algebra().solve_positive_definite(add_ridge(moment, ridge), cross, overwrite=True)
    return np.linalg.solve(add_ridge(moment, ridge), cross).astype(np.float64)


def solve_symmetric(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """X with ``matrix`` X = ``right``. A moment is positive definite but for rounding, where its ridge is tiny."""
    try:
        return current_algebra().solve_positive_definite(matrix, right)
    except np.linalg.LinAlgError:
        return np.linalg.solve(matrix, right).astype(np.float64)


def refit_loss(moment: FloatArray, weight: FloatArray, keep: IntArray, refitted: FloatArray) -> float:
    """Squared output error of the refitted rows on centered activations."""
    error = weight.copy()
    error[keep] -= refitted
    return float(np.sum(error * (moment @ error)))
