"""Shared code of networks on whole volumes: grid and inputs, labels, scans, corruption, training,
application in overlapping blocks.

*Channels* are the inputs of a network, a linear function of the attenuations S/S0 of a voxel
(`bidsapp.networks.volumetric`). The *grid of a network* has cubic voxels of the size of its
training, along the axes of the image that are closest to those of the world (RAS+); gradient tables
and directions are relative to these axes.
"""
