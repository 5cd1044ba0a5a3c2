"""Spherical networks from simulation to maps: what the methods of this family share.

A network is trained on simulated voxels (`simulate`), for one acquisition or for protocols at
large, and its posterior SDs are calibrated on held-out simulation. The same preparation, an SH fit
of every shell over the mean b0, serves training and application.
"""
