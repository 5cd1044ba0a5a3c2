"""People scanned at two sites, for tests of harmonizers that learn from pairs.

The head of `synthetic_head` at half its resolution. At site B every degree of the signal's
spherical harmonics is scaled by a factor of its own, so that the right answer is known in every
voxel. Any other site but A differs from A by its noise alone.
"""

from dataclasses import fields

import numpy as np
import pandas as pd

from bidsapp import kinds, methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from support import bids_tree, synthetic_head

SCALE = {0: 0.92, 2: 0.75, 4: 1.3}
NOISE = 0.005
ZOOMS = 2 * np.array(synthetic_head.ZOOMS)
AFFINE = np.diag([*ZOOMS, 1.0])
AFFINE[:3, 3] = -60, -70, -50
BVALS, AXES = bids_tree.table(((0, 3), (1000, 30)))
PEOPLE = ("01", "02", "03")


def head(person, site, noise=NOISE):
    """Simulate the Dwi of a person, a number as text, at a site, with an S0 of 800.

    Every person has diffusivities of their own. noise: SD relative to S0.
    """
    labels = synthetic_head.tissues()[::2, ::2, ::2]
    rng = np.random.default_rng(int(person))
    clean, _ = synthetic_head.signal(labels, BVALS, AXES, rng, noise=0)
    mask = labels > 0
    weighted = clean[mask][:, 3:] / synthetic_head.S0
    basis = sh.basis(4, AXES[3:])
    c = weighted @ np.linalg.pinv(basis).T
    if site == "B":
        c = c * np.array([SCALE[l] for l in sh.degrees(4)])
    values = np.concatenate([np.ones((len(c), 3)), c @ basis.T], 1)
    values += noise * np.random.default_rng([int(person), ord(site)]).standard_normal(values.shape)
    return Dwi((800 * values).astype(np.float32), mask, AFFINE, Acquisition(BVALS, AXES))


def load_head(run):
    """Simulate a scan by its name, as "01A"."""
    return head(run[:2], run[2])


def study(people=PEOPLE, sites="AB", load=None, acquisitions=None, **more):
    """Make the Cohort and the TrainingSettings of people scanned at every one of `sites`.

    Runs are called by person and site, as "01A". more: fields of either.
    """
    rows = [(p, s, f"{p}{s}", 30.0) for p in people for s in sites]
    table = pd.DataFrame(rows, columns=["participant", "batch", "run", "snr_b0"])
    known = {r: Acquisition(BVALS, AXES) for r in table["run"]} | (acquisitions or {})
    own = {f.name for f in fields(kinds.TrainingSettings)}
    settings = kinds.TrainingSettings(seed=1, **{k: more.pop(k) for k in own & more.keys()})
    return kinds.Cohort(
        table, reference_batch=more.pop("reference_batch", "A"), acquisitions=known,
        load=load or load_head,
        voxel_sizes={r: tuple(ZOOMS) for r in table["run"]}, **more), settings


def sloppy_method(name="harmonize_shresnet", **context):
    """Make a method that trains briefly; context: fields of its MethodContext."""
    return methods.get(name, context=kinds.MethodContext(sloppy=True, **context))
