"""Shared code of the methods that estimate microstructure by a spherical network.

A network is trained on simulated voxels (`simulate`), either for one acquisition or for all
protocols of a range, and its posterior SDs are calibrated on held-out simulation. Training and
application use the same preparation: an SH fit of every shell, normalised by the mean b0.
"""
