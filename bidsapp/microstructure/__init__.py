"""Shared code of the methods that estimate microstructure by a network.

A network is trained on simulated voxels (`simulate`), either for one acquisition or for all
protocols of a range, and its posterior SDs are calibrated on held-out simulation. Training and
application use the same preparation: an SH fit of every shell, normalised by the mean b0.

Terms
-----
density, ODF
    Distribution of fibre orientations: SH coefficients whose integral over the sphere is 1.
power
    Mean square of a density's coefficients of one degree.
hint
    Estimate of the parameters and their covariance from the likelihood of the SH coefficients,
    under a normal distribution of densities of given power (`simulate.likelihood`). It is an input
    of the spherical network.
protocol
    Shells of an acquisition as a network needs them (`simulate.protocols`). Voxels of several
    protocols are ordered by protocol (group), with the same number of voxels in each.
"""
