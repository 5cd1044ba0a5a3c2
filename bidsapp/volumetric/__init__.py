"""Shared code of the networks on whole volumes: 3-D U-Nets whose channels are S/S0.

They are pretrained without labels (`pretrain_artifacts`), and estimate tissue, crossings and
directions of fibres.
"""
