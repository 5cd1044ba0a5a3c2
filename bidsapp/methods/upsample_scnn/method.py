"""More directions from few by a spherical network with spatial context.

The network (`networks.upsampling`) is trained on simulated patches of random tissue for all
protocols of a range (`simulate.patches`, `learn`), not on brains: it fills in directions of what
was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import nn

from bidsapp import sh, training
from bidsapp.acquisition import SAME_B, SAME_SHAPE, Acquisition, Shell, describe_shells
from bidsapp.blocks import map_voxels
from bidsapp.checkpoint import Checkpoint, load
from bidsapp.domain import OVERRIDE, RANGE_TOLERANCE, TrainingDomain
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.kinds import Predicted, Upsampler
from bidsapp.methods.upsample_scnn import learn
from bidsapp.methods.upsample_scnn.shells import ShellFits, fit_shells
from bidsapp.networks.shresnet import CENTRE, neighbours
from bidsapp.networks.upsampling import L_MAX, Neighbourhoods
from bidsapp.selection import WEIGHTS
from bidsapp.simulate import protocols
from bidsapp.upsample import determines

GRID = 95
"""Degree of the half grids of the applied network: 1537 points, with which the prediction turns
with the head within 1e-4 of S0."""

BLOCK = 1024
"""Voxels per block, so that the layers fit in the cache."""

ASSUMED_SNR = 20.0
"""S0 over the noise SD, assumed if the noise could not be measured."""

MIN_DIRECTIONS = 8
"""Smallest number of directions of a shell. With six, FA of white matter is further from the truth
after upsampling than before, in simulated tissue as rough as real tissue and, where it is above
0.3, in four of five real shells (README)."""

ENOUGH_DIRECTIONS = 20
"""Number of directions from which on FA of given and predicted volumes is at least as close to the
truth as that of the given ones, at that roughness (README)."""

WIDENING = 2.0
"""Exponent of the factor of the SD for b outside the trained range, relative to its limit."""

TRANSFER = 0.1
"""SD that is added for a b that was not measured, as a share of S0, per unit of log b from the
nearest measured shell. The dependence on b is that of the tissue of the training; other tissue has
such errors (README)."""


@dataclass(frozen=True)
class Query:
    """One shell of the target, and the fits of the measured shells for it.

    Parameters
    ----------
    volumes : (m,) array
        Measured volumes of the shells, one after another.
    targets : (k,) array
        Positions in the target.
    fits : ShellFits
        One group, on the directions of `volumes`, shell by shell.
    counts : list of int
        Directions of each shell.
    basis : (1, k, 45) tensor
        SH functions along the target directions.
    bands : (2,) tensor
        As in `learn.PatchMinibatch`.
    widening : float
        Factor of the SD, above 1 outside the trained range.
    transfer : float
        SD of the error from another b, as a share of S0; 0 if the shell was measured.
    """

    volumes: np.ndarray
    targets: np.ndarray
    fits: ShellFits
    counts: list[int]
    basis: torch.Tensor
    bands: torch.Tensor
    widening: float
    transfer: float


class SphericalUpsampler(Upsampler):
    """Network with 3×3×3 neighbourhoods that predicts any direction, with bundled weights."""

    intended_use = (
        "Predicts the signal of brain tissue in further directions from a b0 and one or more "
        "shells of linear encoding, within the ranges under trained_for. Predicted volumes hold no "
        "information that was not measured. Not for diagnosis.")

    def recipe(self) -> learn.Recipe:
        """Read the recipe of the training (training.toml)."""
        table = self.settings("training")
        return learn.Recipe(**{**table, "schedule": training.Schedule(**table["schedule"]),
                               "trained_for": TrainingDomain(**table["trained_for"])})

    @cached_property
    def weights(self) -> Checkpoint:
        """The bundled weights, loaded once."""
        return load(WEIGHTS / self.name, self.name)

    @cached_property
    def network(self) -> nn.Module:
        """The applied network."""
        return self.weights.into(learn.build(self.weights.card.network, grid=GRID))

    def check(self, acquisition: Acquisition) -> None:
        """Check that there are b0 volumes and a shell from which directions can be predicted.

        Raises
        ------
        Refusal
            There is no b0 volume, or no shell of linear encoding with enough directions.
        """
        self._require(acquisition, self._fewest if self.context.allow_extrapolation
                      else MIN_DIRECTIONS)

    def shells(self, acquisition: Acquisition) -> list[Shell]:
        """List the shells of linear encoding in the training domain, or all linear ones if
        extrapolation is allowed; in both cases those whose directions span the sphere."""
        if self.context.allow_extrapolation:
            return self._linear(acquisition, self._fewest)
        linear = self._linear(acquisition, MIN_DIRECTIONS)
        return self._inside(linear) or linear

    def check_target(self, acquisition: Acquisition, target: Acquisition) -> None:
        """Raise Refusal if a target has another b-tensor than a linear one."""
        if any(abs(shell.b_delta - 1) > SAME_SHAPE for shell in target.shells):
            raise Refusal(f"directions of {describe_shells(target.shells)} s/mm² are to be added, "
                          "but only linear encoding (b_delta 1) was trained. Remove the others "
                          "from the target table.")

    def violations(self, acquisition: Acquisition, target: Acquisition,
                   voxel_size: Sequence[float] | None = None) -> list[str]:
        most = max(map(len, self._linear(acquisition, self._fewest)), default=MIN_DIRECTIONS)
        return self._outside(acquisition, target) + (
            [f"no shell has more than {most} directions, {MIN_DIRECTIONS} are needed"]
            if most < MIN_DIRECTIONS else [])

    def _outside(self, acquisition: Acquisition, target: Acquisition) -> list[str]:
        """List what lies outside the training, in which shells had six directions or more."""
        domain = self.weights.card.trained_for
        low, high = domain.shells[0].b
        outside = [shell for shell in target.shells if not self._inside([shell])]
        return domain.violations(acquisition) + (
            [f"directions of {describe_shells(outside)} s/mm² are to be added, trained was "
             f"b = {low:.0f}–{high:.0f} s/mm²"] if outside else [])

    def predict(self, dwi: Dwi, target: Acquisition, device: str, seed: int = 0) -> Predicted:
        # the round trip of MIN_DIRECTIONS leaves one out
        self._require(dwi.acquisition, self._fewest)
        self.check_target(dwi.acquisition, target)
        violations = self._outside(dwi.acquisition, target)
        if violations and not self.context.allow_extrapolation:
            raise Refusal(f"outside the training of {self.name}: {'; '.join(violations)}. "
                          f"{OVERRIDE}")
        b0 = dwi.mean_b0
        weighted = np.flatnonzero(~dwi.acquisition.b0)
        valid = np.isfinite(b0) & (b0 > 0)
        typical = float(np.median(b0[valid])) if valid.any() else 1.0
        sigma = dwi.noise_of(weighted) or typical / ASSUMED_SNR
        queries = [self._query(dwi, shell, target, sigma / typical) for shell in target.shells]
        b0_share = 0.0 if dwi.s0_known else float(dwi.acquisition.b0.sum()) ** -0.5
        rows = RowGrid(dwi.mask)
        network, factors = self.network.to(device), self.weights.card.constants["sd"]

        def predict_block(block: torch.Tensor) -> dict[str, torch.Tensor]:
            index, present = rows.around(block[:, 0].cpu().numpy())
            present &= valid[index]
            used, inverse = np.unique(index, return_inverse=True)
            like = block.new_zeros((), dtype=torch.float32)
            # as in training, signals are not divided by less than the noise
            s0 = like.new_tensor(np.where(valid[used], b0[used], typical)).clamp(min=sigma)
            level = sigma / s0
            around = Neighbourhoods(torch.from_numpy(inverse.reshape(index.shape)).to(device),
                                    torch.from_numpy(present).to(device))
            centre = around.rows[:, CENTRE]
            around.present[:, CENTRE] = True
            scale = s0[centre, None]
            signal = like.new_zeros(len(block), len(target))
            sd = torch.zeros_like(signal)
            for q in queries:
                y = torch.from_numpy(dwi.signal[used[:, None], q.volumes]).to(device) / s0[:, None]
                parts = y.split(q.counts, 1)
                x = torch.stack([part @ matrix[:, :part.shape[1]].T.to(like) for part, matrix in
                                 zip(parts, q.fits.matrix[0], strict=True)], 1)
                left = torch.stack([(part @ matrix[:part.shape[1], :part.shape[1]].T.to(like)
                                     ).square().sum(1) for part, matrix in
                                    zip(parts, q.fits.remainder[0], strict=True)]).sum(0)
                misfit = (left / level.square() + 0.01).log()
                noise = torch.stack([level, level * b0_share, misfit], 1)
                shells = type(q.fits.shells)(*(v.to(like) for v in q.fits.shells))
                coefficients = network(x, noise, s0.log(), around, shells)
                factor = q.fits.scale.to(like)
                value, log_sd = learn.evaluate(coefficients, factor, q.basis.to(like))
                described = learn.features(
                    coefficients, log_sd, noise[centre, 0],
                    q.bands.to(like).expand(len(block), -1), factor.expand(len(block), -1))
                log_sd = log_sd + learn.log_factor(described, factors)
                signal[:, q.targets] = (value.clamp(min=0) if dwi.magnitude else value) * scale
                error = (log_sd.clamp(-9, 3).exp().square() + q.transfer**2).sqrt()
                sd[:, q.targets] = error * scale * q.widening
            there = torch.from_numpy(valid[block[:, 0].cpu().numpy()]).to(device)[:, None]
            return {"signal": torch.where(there, signal, 0), "sd": torch.where(there, sd, 0)}

        results = map_voxels(predict_block, np.arange(len(b0))[:, None], device, BLOCK)
        return Predicted(
            results["signal"], results["sd"],
            counts={"upsample_voxels_without_b0": int((~valid).sum())},
            parameters={"Weights": self.weights.card.sha256,
                        "NoiseSD": sigma, "NoiseMeasured": dwi.noise_sd is not None},
            warnings=self._warnings(typical / sigma, dwi.noise_sd is not None,
                                    min(int(q.bands[1]) for q in queries)))

    def _warnings(self, snr: float, measured: bool, directions: int) -> list[str]:
        """Give reasons to doubt a prediction; directions: of the shell it is made from."""
        warnings = []
        if directions < ENOUGH_DIRECTIONS:
            warnings.append(
                f"Upsampling: a shell of {directions} directions was filled. From fewer than "
                f"{ENOUGH_DIRECTIONS}, tensors of the upsampled signal had a lower FA, with more "
                "error than those of the measured signal alone. Take FA from the measured signal.")
        if not measured:
            warnings.append("Upsampling: the noise could not be measured, and an SNR of "
                            f"{ASSUMED_SNR:.0f} was assumed. The SD depends on it.")
            return warnings
        return warnings + [f"Upsampling: {text}" for text in
                           self.weights.card.trained_for.warnings(snr, {})]

    @property
    def _fewest(self) -> int:
        return self.weights.card.trained_for.shells[0].directions[0]

    def _require(self, acquisition: Acquisition, fewest: int) -> None:
        """Raise Refusal unless there is a b0, and a linear shell of `fewest` directions."""
        if not acquisition.b0.any():
            raise Refusal("the run has no volume without diffusion weighting. Needed is a b0 (b < "
                          "50 s/mm²), by which the signal is divided. Add it to the run.")
        if not self._linear(acquisition, fewest):
            raise Refusal(
                f"the run has {describe_shells(acquisition.shells)} s/mm². Needed is a shell of "
                f"linear encoding (b_delta 1) with {fewest} or more directions that are spread "
                "over the sphere. FA of a signal that was upsampled from six has more error than "
                "that of the measured one. Acquire more directions, or use upsample_sh.")

    def _linear(self, acquisition: Acquisition, fewest: int) -> list[Shell]:
        """Select the shells of linear encoding with enough directions, spread over the sphere."""
        return [s for s in acquisition.shells if abs(s.b_delta - 1) <= SAME_SHAPE
                and len(s) >= fewest and determines(2, acquisition.bvecs[s.indices])]

    def _inside(self, shells: Sequence[Shell]) -> list[Shell]:
        """Select the shells whose b lies in the trained range."""
        trained = self.weights.card.trained_for.shells[0]
        return [s for s in shells if trained.holds(s, RANGE_TOLERANCE)]

    def _query(self, dwi: Dwi, shell: Shell, target: Acquisition, sigma: float) -> Query:
        """Prepare the prediction of one shell of the target."""
        domain = self.weights.card.trained_for
        assert domain.shell_count
        low, high = domain.shells[0].b
        measured = self._linear(dwi.acquisition, self._fewest)
        if self._inside([shell]):
            measured = self._inside(measured) or measured
        nearest = sorted(measured, key=lambda s: abs(math.log(s.b / shell.b)))
        # a shell within 5 % is that of the target
        distance = abs(math.log(shell.b / nearest[0].b))
        same = distance <= math.log(1 + SAME_B)
        b = nearest[0].b if same else shell.b
        used = sorted(nearest[:domain.shell_count[1]], key=lambda s: s.b)
        # outside of the trained range all b are divided by one factor, which keeps their ratios
        factor = max(b, nearest[0].b, high) / high * min(b, nearest[0].b, low) / low
        stack = protocols.from_acquisition(dwi.acquisition, used, L_MAX, s0_known=dwi.s0_known)
        stack = replace(stack, b=(stack.b / factor).clamp(low / 1000, high / 1000))
        told = torch.tensor([b / factor / 1000], dtype=torch.float64).clamp(low / 1000, high / 1000)
        fits = fit_shells(stack, told, torch.tensor([sigma], dtype=torch.float64),
                          torch.tensor([dwi.magnitude]))
        directions = torch.from_numpy(target.bvecs[shell.indices])
        beyond = max(factor, 1 / factor)
        return Query(
            np.concatenate([s.indices for s in used]), shell.indices, fits, [len(s) for s in used],
            sh.evaluate(L_MAX, directions)[None],
            torch.tensor([float(told), len(nearest[0])], dtype=torch.float64),
            beyond**WIDENING if beyond > 1 + RANGE_TOLERANCE else 1.0,
            0.0 if same else TRANSFER * distance)


class RowGrid:
    """Rows of the voxels of a mask, to find the neighbours of voxels."""

    def __init__(self, mask: np.ndarray) -> None:
        padded = np.pad(mask, 1)
        self.rows = np.full(padded.size, -1)
        self.places = np.flatnonzero(padded)
        self.rows[self.places] = np.arange(len(self.places))
        self.steps = neighbours(padded.shape)

    def around(self, block: Int[np.ndarray, " voxel"]
               ) -> tuple[Int[np.ndarray, "voxel 27"], Bool[np.ndarray, "voxel 27"]]:
        """Find the 27 rows around each voxel of a block, and whether they are in the mask; where
        they are not, the row is that of the voxel itself."""
        index = self.rows[self.places[block][:, None] + self.steps]
        present = index >= 0
        return np.where(present, index, block[:, None]), present
