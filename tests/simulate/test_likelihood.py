"""The likelihood with densities integrated out, against the normal distribution written out."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.simulate import forward, protocols
from bidsapp.simulate.likelihood import (
    Likelihood,
    compute_hint,
    compute_posterior,
    maximise_likelihood,
)
from bidsapp.simulate.tissue import TWO_COMPARTMENTS, draw_odfs

POWER = torch.tensor([[0.018, 0.009, 0.004, 0.002]], dtype=torch.float64)
CASES = POWER * torch.tensor([[0.3], [1.0], [2.0]])


def likelihood(n=6, sigma=0.03, seed=0, b=(1000, 2200, 3000), counts=(30, 60, 90),
               power=POWER):
    g = np.concatenate([protocols.spread(k) for k in counts])
    acq = Acquisition(np.r_[0, np.repeat(b, counts)], np.r_[np.zeros((1, 3)), g])
    side = protocols.from_acquisition(acq, acq.shells, 8)
    generator = torch.Generator().manual_seed(seed)
    theta = TWO_COMPARTMENTS.draw(n, generator).double()
    densities = draw_odfs(n, generator, 8).double()
    s = side.coefficients(densities, TWO_COMPARTMENTS.compartments(theta))
    x, noise = protocols.measure(side, side.signals(s), torch.full((n,), sigma).double(),
                                 generator)
    return Likelihood(TWO_COMPARTMENTS, power, x, noise, side.shells), theta, x, noise, counts


def log_normal(theta, x, noise, counts, power):
    """Every coefficient's covariance as a matrix over the shells. x (coef, shell)."""
    parts = TWO_COMPARTMENTS.compartments(theta[None])
    k = forward.kernel(parts, np.array([1000.0, 2200, 3000]), np.ones(3), 8)[0].numpy()
    n = np.array(counts)
    p = k[:, 0] / (4 * np.pi)
    covariance = np.diag(noise[0] ** 2 / n) + noise[1] ** 2 * np.outer(p, p)
    total = multivariate_normal.logpdf(x[0] / np.sqrt(4 * np.pi), p, covariance)
    for i, l in enumerate((2, 4, 6, 8)):
        use = np.array([l <= 4, True, True])  # 30 directions determine degree 4
        cases = [np.diag(4 * np.pi * noise[0] ** 2 / n) + float(c) * np.outer(
            k[:, i + 1], k[:, i + 1]) for c in power[:, i]]
        total += logsumexp([sum(multivariate_normal.logpdf(row[use], cov=c[np.ix_(use, use)])
                                for row in x[sh.size(l - 2):sh.size(l)]) for c in cases])
    return total


@pytest.mark.parametrize("power", [POWER, CASES], ids=["one case", "three"])
def test_value_is_the_normal_density(power):
    """Differences between θ, since constants are left out; at a voxel's own points and at points
    that all share."""
    of, theta, x, noise, counts = likelihood(power=power)
    others = TWO_COMPARTMENTS.draw(6, torch.Generator().manual_seed(9)).double()
    found = of.value(of.kernel(torch.stack([theta, others], 1)))
    shared = of.value(of.kernel(torch.cat([theta, others])[None]))
    for v in range(6):
        expected = [log_normal(t[v], x[:, v].numpy(), noise[v].numpy(), counts, power)
                    for t in (theta, others)]
        difference = pytest.approx(expected[0] - expected[1], rel=1e-6, abs=1e-6)
        assert float(found[v, 0] - found[v, 1]) == difference
        assert float(shared[v, v] - shared[v, v + 6]) == difference


def test_gradient_and_information():
    """The gradient against differences of the value; the information against the mean outer
    product of gradients over noise and densities from the model itself, within 6 %."""
    of, *_ = likelihood(40)
    of.b0_noise = 0 * of.b0_noise  # how b0 noise depends on θ is left out of the gradient
    theta = TWO_COMPARTMENTS.draw(40, torch.Generator().manual_seed(9)).double()

    def value(at):
        return of.value(of.kernel(at[:, None]))[:, 0]

    gradient, _ = of.scoring(theta, of.kernel(theta[:, None])[:, 0])
    for j in range(2):
        step = torch.zeros_like(theta)
        step[:, j] = 1e-5
        slope = (value(theta + step) - value(theta - step)) / 2e-5
        assert float((slope - gradient[:, j]).abs().median() / slope.abs().median()) < 0.01
    n, at = 20_000, torch.tensor([1.7, 0.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shells = torch.tensor([[[1.0, 1, 30**-0.5], [2.2, 1, 60**-0.5]]], dtype=torch.float64)
    sd = torch.cat([POWER[0, i].sqrt().expand(2 * l + 1) for i, l in enumerate((2, 4, 6, 8))])
    densities = torch.cat([torch.full((n, 1), (4 * np.pi) ** -0.5), normal(n, 44) * sd], 1)
    k = forward.kernel(TWO_COMPARTMENTS.compartments(at[None]), np.array([1e3, 2.2e3]),
                       np.ones(2), 8)
    x = forward.convolve(densities, k.expand(n, -1, -1))
    x = x + 0.03 * (4 * np.pi) ** 0.5 * shells[0, :, 2:] * normal(n, 2, 45)
    many = Likelihood(TWO_COMPARTMENTS, POWER, x.permute(2, 0, 1),
                      torch.tensor([[0.03, 0.0]]).double().expand(n, 2), shells)
    theta = at.expand(n, 2)
    gradient, fisher = many.scoring(theta, many.kernel(theta[:, None])[:, 0])
    scale = torch.diagonal(fisher[0]).sqrt()
    empirical = (gradient.mT @ gradient / n) / scale / scale[:, None]
    np.testing.assert_allclose(empirical, fisher[0] / scale / scale[:, None], atol=0.06)
    assert (gradient.mean(0).abs() < 5 * scale / n**0.5).all()


def test_maximum_is_found():
    """Without noise to speak of it is the truth; with noise no less likely than the truth."""
    of, theta, *_ = likelihood(300, 1e-4)
    starts = torch.cartesian_prod(*[torch.tensor([0.12, 0.35, 0.6, 0.88]).double()] * 2)
    inside = (theta[:, 0] > 0.5) & (theta[:, 1] > 0.15)
    found = maximise_likelihood(of, starts * torch.tensor([3.0, 1.0]))[0]
    close = ((found - theta).abs() < torch.tensor([0.06, 0.04])).all(1)
    assert close[inside].double().mean() > 0.9
    of, theta, *_ = likelihood(300, 0.03)
    best = maximise_likelihood(of, starts * torch.tensor([3.0, 1.0]))[2]
    assert (best >= of.value(of.kernel(theta[:, None]))[:, 0] - 1e-3).double().mean() > 0.85


@pytest.mark.parametrize("sigma,share", [(0.1, 0.95), (0.03, 0.95), (0.01, 0.8)])
def test_posterior_is_the_integral(sigma, share):
    """Mean and SD against sums over 400 × 400 points, which no peak escapes: within a quarter of
    the SD in most voxels. Where that is 0.002 of the range, ridges are lost now and then."""
    of, *_ = likelihood(50, sigma, power=CASES)
    mean, covariance = compute_posterior(of)
    at = (torch.arange(400).double() + 0.5) / 400
    unit = torch.cartesian_prod(at, at)
    weight = torch.cat([of.value(of.kernel(of.low + (of.high - of.low) * part[None]))
                        for part in unit.split(20_000)], 1).softmax(1)
    wanted = weight @ unit
    sd = (weight @ unit.square() - wanted.square()).sqrt()
    assert float(((mean - wanted).abs() < sd / 4).double().mean()) > share
    own = torch.diagonal(covariance, dim1=1, dim2=2).sqrt()
    assert float((own / sd).log().abs().median()) < 0.1


def test_posterior_covers_what_its_model_draws():
    """Densities and noise from the model itself, θ from the prior: squared errors are as large as
    the variances, within three standard errors."""
    n, generator = 4000, torch.Generator().manual_seed(2)
    theta = TWO_COMPARTMENTS.draw(n, generator).double()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    case = torch.randint(3, (n, 4), generator=generator)
    sd = torch.cat([CASES[case[:, i], i].sqrt()[:, None].expand(-1, 2 * l + 1)
                    for i, l in enumerate((2, 4, 6, 8))], 1)
    densities = torch.cat([torch.full((n, 1), (4 * np.pi) ** -0.5), normal(n, 44) * sd], 1)
    shells = torch.tensor([[[1.0, 1, 60**-0.5], [2.2, 1, 60**-0.5]]]).double()
    k = forward.kernel(TWO_COMPARTMENTS.compartments(theta), np.array([1e3, 2.2e3]), np.ones(2), 8)
    x = forward.convolve(densities, k)
    x = (x + 0.05 * (4 * np.pi / 60) ** 0.5 * normal(n, 2, 45)).permute(2, 0, 1)
    of = Likelihood(TWO_COMPARTMENTS, CASES, x, torch.tensor([[0.05, 0.0]]).double().expand(n, 2),
                    shells)
    mean, covariance = compute_posterior(of)
    error = (theta - of.low) / (of.high - of.low) - mean
    z = error / torch.diagonal(covariance, dim1=1, dim2=2).sqrt()
    for own in z.T:
        assert abs(float(own.square().mean()) - 1) < 3 * float(own.square().std()) / n**0.5
        assert abs(float(own.mean())) < 3 / n**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hint_does_not_turn(dtype):
    _, _, x, noise, counts = likelihood(40)
    shells = torch.tensor([[[b, 1, n**-0.5] for b, n in zip((1, 2.2, 3), counts, strict=True)]])
    turned = sh.rotate(x.movedim(0, 2), torch.tensor(Rotation.random(random_state=1).as_matrix()))
    turned = torch.where(x == 0, 0, turned.movedim(2, 0))  # degrees that were not determined
    one, other = (compute_hint(Likelihood(TWO_COMPARTMENTS, CASES.to(dtype), c.to(dtype),
                                          noise.to(dtype), shells.to(dtype)))
                  for c in (x, turned))
    np.testing.assert_allclose(other, one, atol=1e-6 if dtype == torch.float64 else 1e-3)


def test_hint_is_finite_everywhere():
    """Signals of 0, far too large, negative."""
    _, _, x, noise, counts = likelihood(8)
    x = x.clone()
    x[:, 0], x[:, 1], x[:, 2] = 0, 50 * x[:, 1], -x[:, 2]
    shells = torch.tensor([[[b, 1, n**-0.5] for b, n in zip((1, 2.2, 3), counts, strict=True)]])
    found = compute_hint(Likelihood(TWO_COMPARTMENTS, POWER.float(), x.float(), noise.float(),
                                    shells.float()))
    assert found.shape == (8, 5)
    assert torch.isfinite(found).all()
