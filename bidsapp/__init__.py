"""QSphere: diffusion MRI from many scanners, made comparable and useful.

The map of the house, in the order a run flows through it:

    cli.py          argv → options.py: one frozen Options
    run.py          participant(options), group(options): two linear recipes
    phantom.py      phantom(options): a multi-site dataset with known truth (cli_phantom.py)
    recipe/         plan.py: the steps of a run, in order; steps.py: what each does;
                    execute.py: those that are not complete; outputs.py: the files they leave
    report/         figures and HTML pages
    bids/           find runs and what corrects them, read b-tables and sidecars; the one writer of
                    derivatives
    evaluate/       quality, what cannot be right, agreement of sites, cross-validation
    harmonize.py    select, check and apply the harmonizer of a run
    methods/        one folder per published method: check, apply, outputs.json, README.md
    microstructure/ spherical networks: trained, calibrated, applied
    training.py     the only optimisation loop
    progress.py     how far what takes minutes is
    simulate/       forward models, noise, people, sites: signals with known truth
    preprocess/     where tissues are, how fibres lie, one head on another
    networks/       torch modules: tensors in, tensors out
    blocks.py       device choice, blocks of voxels, slabs of a grid with a halo
    checkpoint.py   trained weights and their card
    mask.py         the brain mask of a run, given or made of its b0
    stage.py        a signal on its way through the steps of a run
    series.py       Series: the volumes of a run on their grid, read lazily; Series → Dwi
    dwi.py          Run: paths and entities; Dwi: signal inside a mask, float32
    tensor.py       batched, differentiable diffusion tensor fit
    sh.py           spherical harmonics
    domain.py       what trained weights may be used for
    hyperparameters.py  training.toml of a method, and --set over it
    acquisition.py  b-values, directions, b-tensors, shells (world RAS+, s/mm²)
    workers.py      processes side by side, and what ends them
    scratch.py      temporary folders that outlive nobody
    errors.py       the few exceptions a user meets

Imports go one way, from the top of this list to the bottom; import-linter enforces it.
"""

__version__ = "0.1.0"
