"""Batched, differentiable diffusion tensor fit for b-tensors of any shape.

    log S_i = log S0 − B_i : D = x_i · β,   x = (−B11, −2B12, −2B13, −B22, −2B23, −B33, 1)

Ordinary least squares gives β_ols. Weighted least squares uses w_i = exp(2 x_i·β_ols), the squared
predicted signal, because Var(log S) ≈ σ²/S² (Salvador et al. 2005, doi:10.1002/hbm.20076; Chung
et al. 2006, doi:10.1016/j.neuroimage.2006.07.001). These are the weights of dipy. Then

    Cov(β) = σ² (Xᵀ W X)⁻¹,   σ² = Σ w_i r_i² / (n − 7)   in signal units,

and the delta method gives the standard errors of FA and MD. Measurements that are not positive and
finite have weight 0. Inside this module b is in ms/µm² and D in µm²/ms, so that all numbers are
near 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float

from bidsapp.acquisition import SHELL_GAP, Acquisition

TERMS = 7
"""Number of unknowns of the fit: six tensor entries and log S0."""

MIN_EXPONENT = 1e-6
"""Smallest product of an eigenvalue and the largest entry of the design: b·D at the highest b (as
in dipy)."""

LEAST_RATIO = 0.01
"""Value to which lower S/S0 are raised in `fa_and_md`, since they are noise alone."""

SATURATED_FA = 0.999
"""FA above which a tensor counts as saturated."""

B_MAX = 1500.0
"""Highest b-value of the shells that a tensor is fitted to, in s/mm². Beyond it kurtosis lowers MD.
"""

MIN_SUM_B2 = 6 * 900.0**2
"""Smallest sum of b² over the volumes of a tensor, in (s/mm²)². The variance of its entries falls
with this sum. Six directions of b = 900 s/mm², the clinical minimum, reach it."""

B_TOLERANCE = 0.05
"""Share by which the b-value of a shell may exceed the highest, since scanners report b-values with
the deviations of their gradients."""

INDEPENDENT = 0.01
"""Smallest singular value of the design, its columns scaled to unit length, that counts as an
unknown that is determined."""


def design(btensors: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "n 7"]:
    """Make the design matrix x of the fit.

    Parameters
    ----------
    btensors : (n, 3, 3)
        b-tensors, s/mm².

    Returns
    -------
    (n, 7)
        Entries in ms/µm², and a column of 1.
    """
    b = np.asarray(btensors, dtype=np.float64) / 1000
    return np.stack([-b[:, 0, 0], -2 * b[:, 0, 1], -2 * b[:, 0, 2], -b[:, 1, 1],
                     -2 * b[:, 1, 2], -b[:, 2, 2], np.ones(len(b))], axis=1)


def rank(btensors: Float[np.ndarray, "n 3 3"]) -> int:
    """Count the unknowns of the fit (six tensor entries and S0) that b-tensors determine."""
    x = design(btensors)
    length = np.linalg.norm(x, axis=0)
    values = np.linalg.svd(x / np.where(length > 0, length, 1), compute_uv=False)
    return int((values > INDEPENDENT).sum())


def volumes(acquisition: Acquisition, b_max: float = B_MAX) -> np.ndarray:
    """Select the volumes that a tensor is fitted to.

    These are the b0 volumes and the shells up to `b_max`. If they do not determine a tensor, or
    determine it so poorly that noise dominates (Σ b² below MIN_SUM_B2), the next higher shells are
    added one by one until they suffice. An example is an acquisition with six directions of
    b = 200 s/mm² and a shell of b = 2000 s/mm². A measurement has the b-value of its shell unless
    it differs from it by more than SHELL_GAP, as in acquisitions without shells.

    Parameters
    ----------
    acquisition : Acquisition
        Acquisition with b-tensors of any shape.
    b_max : float
        Highest b-value, s/mm². Shells that exceed it by up to B_TOLERANCE are used as well.

    Returns
    -------
    (n,) int
        Indices of the volumes, ascending; all volumes if no selection suffices.
    """
    b = acquisition.bvals.copy()
    for shell in acquisition.shells:
        near = np.abs(acquisition.bvals[shell.indices] - shell.b) <= SHELL_GAP * shell.b
        b[shell.indices[near]] = shell.b
    limit = (1 + B_TOLERANCE) * b_max
    # imaging gradients give b0 volumes a tiny b-tensor, which determines nothing
    weighted = np.where(acquisition.b0[:, None, None], 0, acquisition.btensors)
    for highest in (limit, *np.unique(b[b > limit])):
        chosen = np.flatnonzero(b <= highest)
        if (len(chosen) >= TERMS and rank(weighted[chosen]) == TERMS
                and np.square(b[chosen]).sum() >= MIN_SUM_B2):
            return chosen
    return np.arange(len(acquisition))


def attenuation_fit(btensors: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "6 n"]:
    """Make the matrix of an ordinary least squares fit with known S0.

    Parameters
    ----------
    btensors : (n, 3, 3)
        b-tensors, s/mm².

    Returns
    -------
    (6, n)
        Matrix from log S/S0 to D11, D12, D13, D22, D23, D33 (µm²/ms).
    """
    return np.linalg.pinv(design(btensors)[:, :6])


def fa_and_md(ratio: Float[torch.Tensor, "*batch n"], fit: Float[torch.Tensor, "*fits 6 n"]
              ) -> tuple[Float[torch.Tensor, "*batch"], Float[torch.Tensor, "*batch"]]:
    """Compute FA and MD of attenuations, with finite gradients everywhere, including isotropy.

        FA² = 3/2 ‖D − MD 1‖² / ‖D‖²,  MD = tr D / 3.

    It serves as a loss of networks. For maps use `fit`, which weights the measurements and flags
    those that it cannot use.

    Parameters
    ----------
    ratio : (…, n)
        S/S0; lower values count as LEAST_RATIO.
    fit : (6, n) or (…, 6, n)
        `attenuation_fit`, one for all signals or one for each.

    Returns
    -------
    fa, md : (…,)
        FA, and MD in µm²/ms.
    """
    d = (fit @ torch.log(ratio.clamp(min=LEAST_RATIO))[..., None])[..., 0]
    diagonal, off = d[..., [0, 3, 5]], d[..., [1, 2, 4]]
    md = diagonal.mean(-1)
    deviation = (diagonal - md[..., None]).square().sum(-1) + 2 * off.square().sum(-1)
    # the small constants avoid the infinite slope of a root at 0
    return torch.sqrt(1.5 * deviation / (deviation + 3 * md.square() + 1e-6) + 1e-8), md


def fit(signal: Float[torch.Tensor, "voxel n"], x: Float[np.ndarray, "n 7"], *,
        weighted: bool = True) -> dict[str, torch.Tensor]:
    """Fit one tensor to each row of a signal.

    Parameters
    ----------
    signal : (voxel, n)
        float32 or float64, in any unit.
    x : (n, 7)
        Matrix from `design`, of full rank.
    weighted : bool
        Weighted least squares with the weights of this module; otherwise ordinary least squares,
        where sigma and the standard errors refer to log S.

    Returns
    -------
    dict of (voxel,)
        `fa`; `md`, `ad`, `rd` (mm²/s); `direction` (voxel, 3), unit vectors of arbitrary sign in
        the frame of the b-tensors; `s0` and `sigma` (signal units); `fa_std` and `md_std` (mm²/s),
        standard errors that refer to the tensor before clamping; `fa_std` is at most ½, the largest
        possible SD of a value within 0–1. With n = 7, sigma and the standard errors are 0. The
        flags are `failed` (no tensor: all values are 0), `clamped` (an eigenvalue was raised to the
        smallest allowed) and `saturated` (FA ≥ 0.999).
    """
    columns = torch.as_tensor(x, dtype=signal.dtype, device=signal.device)
    signal = signal.T.contiguous()
    use, incomplete = torch.ones_like(columns[:, :1]), None
    low, high = torch.aminmax(signal.detach())
    if not bool((low > 0) & (high < torch.inf)):
        valid = (signal > 0) & (signal < torch.inf)
        use, incomplete = valid.to(signal.dtype), (~valid).any(0).nonzero()[:, 0]
        signal = torch.where(valid, signal, 1)
    log_s = torch.log(signal)
    beta = torch.linalg.pinv(columns) @ log_s  # right for voxels without missing values
    if incomplete is not None:
        some = use[:, incomplete]
        solved = _solve(*_ldl(_normal(columns, some)), columns.T @ (some * log_s[:, incomplete]))
        beta = beta.index_copy(1, incomplete, solved)
    predicted = columns @ beta
    residual = log_s - predicted
    # weights and errors are relative to exp(top), the largest predicted signal of each voxel
    top = predicted.amax(0) if weighted else torch.zeros_like(predicted[0])
    weight = (torch.exp(2 * (predicted - top)) if weighted else torch.ones_like(predicted)) * use
    # solving for the change from OLS keeps the accuracy in float32
    weighted_residual = weight * residual
    right = columns.T @ weighted_residual
    lower, pivots, deficient = _ldl(_normal(columns, weight))
    change = _solve(lower, pivots, deficient, right)
    beta = beta + change
    dof = (use.sum(0) - TERMS).clamp(min=0)
    squares = ((weighted_residual * residual).sum(0) - (right * change).sum(0)).clamp(min=0)
    error = torch.sqrt(squares / dof.clamp(min=1) + 1e-30) * (dof > 0)
    return _maps(beta, error, top, lower, pivots, deficient,
                 smallest=MIN_EXPONENT / float(-x[:, :6].min()))


def _maps(beta: Float[torch.Tensor, "7 voxel"], error: Float[torch.Tensor, " voxel"],
          top: Float[torch.Tensor, " voxel"], lower: list[torch.Tensor],
          pivots: Float[torch.Tensor, "7 voxel"], deficient: Bool[torch.Tensor, " voxel"],
          smallest: float) -> dict[str, torch.Tensor]:
    """Compute the maps of `fit`. error: sigma / exp(top); smallest: eigenvalue, µm²/ms."""
    d = beta[:6].double()
    eigenvalues, direction = _eigen(d)
    clamped = eigenvalues[2] < smallest
    e1, e2, e3 = eigenvalues.clamp(min=smallest)
    difference = (e1 - e2) ** 2 + (e2 - e3) ** 2 + (e3 - e1) ** 2
    fa = torch.sqrt(difference / (2 * (e1**2 + e2**2 + e3**2)) + 1e-30)
    trace = torch.zeros_like(beta)
    trace[[0, 3, 5]] = 1
    maps = {
        "fa": fa, "md": (e1 + e2 + e3) / 3e3, "ad": e1 / 1e3, "rd": (e2 + e3) / 2e3,
        "direction": direction.T, "s0": torch.exp(beta[6]), "sigma": error * torch.exp(top),
        "fa_std": (error * _spread(lower, pivots, _fa_gradient(beta[:6]))).clamp(max=0.5),
        "md_std": error * _spread(lower, pivots, trace) / 3e3,
    }
    finite = sum(value if value.ndim == 1 else value.sum(1) for value in maps.values())
    failed = deficient | ~torch.isfinite(finite)
    out = {k: torch.where(failed if v.ndim == 1 else failed[:, None], 0, v).to(beta.dtype)
           for k, v in maps.items()}
    return out | {"failed": failed, "clamped": clamped & ~failed,
                  "saturated": (fa >= SATURATED_FA) & ~failed}


def _normal(columns: Float[torch.Tensor, "n 7"], weight: Float[torch.Tensor, "n _"]
            ) -> Float[torch.Tensor, "7 7 _"]:
    """Xᵀ W X of all voxels, (7, 7, voxel), for weights (n, voxel)."""
    products = columns[:, :, None] * columns[:, None, :]
    return (products.flatten(1).T @ weight).unflatten(0, (TERMS, TERMS))


def _ldl(normal: Float[torch.Tensor, "7 7 voxel"]) -> tuple[
        list[torch.Tensor], Float[torch.Tensor, "7 voxel"], Bool[torch.Tensor, " voxel"]]:
    """Factorise symmetric matrices (7, 7, voxel) as L D Lᵀ.

    Returns the columns of L below its diagonal, D (7, voxel), and the singular matrices. A pivot
    below 32 ε of its diagonal entry means that a column depends on those before it.
    """
    tolerance = 32 * torch.finfo(normal.dtype).eps
    least = tolerance * torch.diagonal(normal).T
    deficient = torch.zeros_like(least[0], dtype=torch.bool)
    lower, pivots = [], []
    for smallest in least:
        pivot = normal[0, 0]
        small = ~(pivot > smallest)
        deficient = deficient | small
        pivot = torch.where(small, 1, pivot)
        lower.append(normal[1:, 0] / pivot)
        pivots.append(pivot)
        normal = torch.addcmul(normal[1:, 1:], lower[-1][:, None], normal[0, 1:], value=-1)
    return lower, torch.stack(pivots), deficient


def _forward(lower: list[torch.Tensor], right: Float[torch.Tensor, "7 voxel"]
             ) -> Float[torch.Tensor, "7 voxel"]:
    """Solve L z = right, (7, voxel)."""
    z = []
    for column in lower:
        z.append(right[0])
        right = torch.addcmul(right[1:], column, right[0], value=-1)
    return torch.stack(z)


def _solve(lower: list[torch.Tensor], pivots: Float[torch.Tensor, "7 voxel"],
           deficient: Bool[torch.Tensor, " voxel"], right: Float[torch.Tensor, "7 voxel"]
           ) -> Float[torch.Tensor, "7 voxel"]:
    """Solve L D Lᵀ β = right, (7, voxel); β is 0 if the matrix is singular."""
    scaled = _forward(lower, right) / pivots
    beta = scaled[:0]
    for column, value in zip(reversed(lower), reversed(scaled), strict=True):
        beta = torch.cat([(value - (column * beta).sum(0))[None], beta])
    return torch.where(deficient, 0, beta)


def _spread(lower: list[torch.Tensor], pivots: Float[torch.Tensor, "7 voxel"],
            gradient: Float[torch.Tensor, "7 voxel"]) -> Float[torch.Tensor, " voxel"]:
    """sqrt(gᵀ (Xᵀ W X)⁻¹ g) for the gradient g (7, voxel) of a quantity with respect to β."""
    return torch.sqrt((_forward(lower, gradient) ** 2 / pivots).sum(0) + 1e-30)


def _fa_gradient(d: Float[torch.Tensor, "6 voxel"]) -> Float[torch.Tensor, "7 voxel"]:
    """∂FA/∂β, (7, voxel), from FA² = 3/2 (1 − T²/(3Q)) with T = tr D and Q = ‖D‖².

    ∂FA/∂D_ij = T/(2 FA Q) (T D_ij/Q − δ_ij); off-diagonal entries count twice.
    """
    diagonal = torch.tensor([1, 0, 0, 1, 0, 1], dtype=d.dtype, device=d.device)[:, None]
    twice = 2 - diagonal
    t = (diagonal * d).sum(0)
    q = (twice * d**2).sum(0) + 1e-30
    fa = torch.sqrt(1.5 * (1 - t**2 / (3 * q)).clamp(min=1e-12))
    gradient = t / (2 * fa * q) * twice * (t * d / q - diagonal)
    return torch.cat([gradient, torch.zeros_like(gradient[:1])])


def _eigen(d: Float[torch.Tensor, "6 voxel"]
           ) -> tuple[Float[torch.Tensor, "3 voxel"], Float[torch.Tensor, "3 voxel"]]:
    """Eigenvalues in descending order (3, voxel) and first eigenvector (3, voxel) of tensors.

    The tensors are (6, voxel) D11, D12, D13, D22, D23, D33 in float64. The eigenvalues are the
    trigonometric solution of the cubic (Smith 1961, doi:10.1145/355578.366316). By Cayley–Hamilton
    (D − e2)(D − e3) = (e1 − e2)(e1 − e3) v1 v1ᵀ, whose longest column gives v1; it is (1, 0, 0) if
    all eigenvalues are equal.
    """
    xx, xy, xz, yy, yz, zz = d
    mean = (xx + yy + zz) / 3
    a, b, c = xx - mean, yy - mean, zz - mean
    p = torch.sqrt((a**2 + b**2 + c**2 + 2 * (xy**2 + xz**2 + yz**2)) / 6 + 1e-60)
    determinant = a * (b * c - yz**2) - xy * (xy * c - yz * xz) + xz * (xy * yz - b * xz)
    angle = torch.acos((determinant / (2 * p**3)).clamp(-1 + 1e-15, 1 - 1e-15)) / 3
    e1 = 2 * p * torch.cos(angle)
    e3 = 2 * p * torch.cos(angle + 2 * math.pi / 3)
    s, t = e1, e3 * (-e1 - e3)  # −(e2 + e3) and e2 e3 of the traceless part
    matrix = (
        a * a + xy * xy + xz * xz + s * a + t, xy * (a + b) + xz * yz + s * xy,
        xz * (a + c) + xy * yz + s * xz, xy * xy + b * b + yz * yz + s * b + t,
        yz * (b + c) + xy * xz + s * yz, xz * xz + yz * yz + c * c + s * c + t)
    xx, xy, xz, yy, yz, zz = matrix
    first, second = (xx >= yy) & (xx >= zz), yy >= zz
    column = torch.stack([torch.where(first, i, torch.where(second, j, k))
                          for i, j, k in ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))])
    length = torch.sqrt((column**2).sum(0) + 1e-60)
    axis = torch.tensor([1, 0, 0], dtype=d.dtype, device=d.device)[:, None]
    direction = torch.where(length > 1e-20, column / length, axis)
    return torch.stack([mean + e1, mean - e1 - e3, mean + e3]), direction
