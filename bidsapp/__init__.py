"""QSphere: diffusion MRI from many scanners, made comparable and useful.

The map of the house, in the order a run flows through it:

    cli.py, cli_phantom.py  argv → options.py: one frozen dataclass of options
    run.py          participant(options), group(options): two linear recipes
    phantom.py      phantom(options): a multi-site dataset with known ground truth
    recipe/         plan.py: the steps of a run, in order; steps.py, harmonize.py, spaces.py: what
                    each does; execute.py: do those that are not complete; outputs.py: their files
    report/         figures and HTML pages
    bids/           find runs and what corrects them, read b-tables and sidecars; the one writer of
                    derivatives
    evaluate/       quality, implausible input, agreement of sites, biology, cross-validation
    methods/        one folder per published method: check, apply, outputs.json, README.md
    harmonization/  what harmonizers share: pairs of scans, patches, intensity, cohorts
    preprocess/     raw images to clean signal: noise, Gibbs ringing, distortion, motion, eddy
                    currents, bias field
    microstructure/ what spherical estimators share: trained, calibrated, applied; fibre densities
    volumetric/     what networks on whole volumes share: grid and inputs, labels, corruption,
                    training, application in blocks
    selection.py    which weights serve a run: of group level, or bundled
    kinds.py        the kinds of method: what each takes and returns
    training.py     the only optimisation loop
    simulate/       forward models, noise, people, sites: signals with known truth
    anatomy/        brain mask, tissues from the T1w image or the DWI
    registration/   rigid, affine, deformable, template; grids and their places in the world
    networks/       torch modules: tensors in, tensors out; the one builder
    blocks.py       device choice, blocks of voxels, slabs of a grid with a halo
    checkpoint.py   trained weights and their card
    progress.py     progress of what takes minutes
    spaces.py       output spaces, and where their templates are
    stage.py        a signal on its way through the steps of a run
    series.py       Series: the volumes of a run on their grid, read lazily; Series → Dwi
    dwi.py          Run: paths and entities; Dwi: signal inside a mask, float32
    tensor.py       batched, differentiable diffusion tensor fit
    gp.py           Gaussian process over b-tensors: a volume predicted from the others
    sh.py           spherical harmonics
    domain.py       what trained weights may be used for
    hyperparameters.py  training.toml of a method, and --set over it
    acquisition.py  b-values, directions, b-tensors, shells (world RAS+, s/mm²)
    workers.py      processes side by side, and what ends them
    scratch.py      temporary folders that outlive nobody
    errors.py       the few exceptions a user meets

    weights/        bundled checkpoints, no code

Imports go one way, from the top of this list to the bottom; import-linter enforces it.
"""

__version__ = "0.1.0"
