"""Insert errors into a copy of the package, one at a time, and list those that no test detects.

    python tools/mutants.py [--only N ...]

Each mutant is tested by the few tests that should detect it. These must pass without the mutant, so
run `make test` first. The working tree is not changed. The exit code is 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

LIBRARIES = ("torch", "nibabel", "scipy.ndimage", "scipy.optimize", "scipy.stats", "pandas",
             "dipy.reconst.shm", "pytest")
"""Libraries that are imported once, before the test processes are forked."""


class Mutant(NamedTuple):
    """An error that tests should detect.

    Parameters
    ----------
    file : str
        File below bidsapp/.
    text : str
        Text that occurs once in the file.
    replacement : str
        Text that replaces it.
    error : str
        Description of the error.
    tests : str
        Arguments of pytest that select the tests which should fail.
    """

    file: str
    text: str
    replacement: str
    error: str
    tests: str


MUTANTS = (
    # ---- files, frames and units
    Mutant("bids/btable.py", "flip = -1.0 if np.linalg.det(linear) > 0 else 1.0",
           "flip = -1.0 if np.linalg.det(linear) < 0 else 1.0",
           "b-vectors are flipped for the other handedness", "test_btable.py -k known_direction"),
    Mutant("bids/btable.py", "return u @ vt @ np.diag([flip, 1.0, 1.0])",
           "return linear / np.linalg.norm(linear, axis=0) @ np.diag([flip, 1.0, 1.0])",
           "axes of sheared voxels are not orthogonal",
           "test_btable.py -k 'known_direction or inverts or storage_order'"),
    Mutant("bids/btable.py", 'if frame == "bvec":', 'if frame == "world":',
           "b-tensors of a file are turned in the wrong frame",
           "test_btable.py -k 'tensors_of_dipy or written_tensors'"),
    Mutant("bids/btable.py", '"ms/um2": 1e3', '"ms/um2": 1.0',
           "b-tensors in ms/µm² are read as s/mm²", "test_btable.py -k tensors_of_dipy"),
    Mutant("bids/inherit.py", "for path in reversed(find_applicable(image, root, \".json\")):",
           "for path in find_applicable(image, root, \".json\"):",
           "the sidecar farthest away wins", "test_find.py -k inheritance"),
    Mutant("bids/batch.py", "key = (run.participant, run.session)",
           "key = (run.participant, None)", "sites of sessions are ignored",
           "test_batch.py -k sessions"),
    Mutant("methods/estimate_scnn2/outputs.json", '"SphericalHarmonicBasis": "descoteaux"',
           '"SphericalHarmonicBasis": "tournier"', "the sidecar names another basis",
           "test_orientation.py"),
    Mutant("methods/estimate_scnn3/outputs.json", '"Reference": "xyz"', '"Reference": "ijk"',
           "the sidecar names another frame", "test_orientation.py"),
    Mutant("acquisition.py", "b * ((1 - s) / 3 * np.eye(3) + s * outer)",
           "b * ((1 - s) / 2 * np.eye(3) + s * outer)", "the trace of a b-tensor is not b",
           "test_acquisition.py -k btensor"),
    Mutant("acquisition.py", "rotation @ self.bvecs[..., None]",
           "np.swapaxes(rotation, -1, -2) @ self.bvecs[..., None]",
           "axes turn the other way", "test_acquisition.py -k rotation"),
    Mutant("acquisition.py", "np.maximum(SHELL_GAP_MIN, SHELL_GAP * b[:-1])",
           "np.minimum(SHELL_GAP_MIN, SHELL_GAP * b[:-1])", "shells are split at small steps",
           "test_acquisition.py -k shell"),
    # ---- reading and writing
    Mutant("series.py", "if peak_memory(voxels, measurements) <= memory:", "if True:",
           "the memory limit is ignored", "test_mask_load.py -k memory_limit"),
    Mutant("series.py", "signal[:, part] *= reference / level",
           "signal[:, part] *= level / reference", "parts are scaled the wrong way",
           "test_mask_load.py -k parts_are_joined"),
    Mutant("dwi.py", "np.median(squares) / chi2.median(dof)", "np.median(squares) / dof",
           "the noise level is biased", "test_quality.py -k unbiased"),
    Mutant("evaluate/quality.py", "displacement = rotations @ centre + translations - centre",
           "displacement = translations", "head motion is that of the origin of the world",
           "test_quality.py -k head_motion"),
    Mutant("evaluate/quality.py", "np.fill_diagonal(distance, np.inf)",
           "np.fill_diagonal(distance, 0.0)", "each volume is its own neighbour",
           "test_quality.py -k neighbouring_correlation"),
    Mutant("report/corrections.py", "None if rotations is None else np.radians(rotations)",
           "rotations", "confounds have angles in degrees",
           "test_report_corrections.py -k names_and_units"),
    Mutant("report/corrections.py", '"xy", "xz", "yz")], eddy,', '"xy", "yz", "xz")], eddy,',
           "terms of eddy currents have each other's names",
           "test_report_corrections.py -k names_and_units"),
    Mutant("report/corrections.py", '(("before", ""), ("after", "-"))',
           '(("before", ""), ("after", ""))', "both images of the flicker move down",
           "test_report_corrections.py -k change_places"),
    Mutant("anatomy/mask.py", "for k in np.moveaxis(mask, 2, 0)], axis=2)",
           "for k in np.moveaxis(mask, 0, 0)], axis=0)", "holes are filled in other slices",
           "test_mask_load.py -k holes"),
    Mutant("blocks.py", "return min(limits)", "return max(limits)",
           "the limit of a control group is ignored", "test_blocks.py -k memory_limit"),
    Mutant("bids/writer.py", 'self._write_record("incomplete", both)',
           'self._write_record("complete", both)',
           "a record is complete before its files are in place", "test_writer.py -k in_place"),
    Mutant("bids/writer.py",
           "all((self.root / name).is_file() and sha256(self.root / name) in hashes",
           "all((self.root / name).is_file()", "an output that was changed counts as complete",
           "test_writer.py -k changed_by_hand"),
    Mutant("bids/writer.py", "for name in old.keys() - new.keys()})",
           "for name in old.keys() & new.keys()})", "new files are removed, old ones stay",
           "test_writer.py -k leftovers"),
    Mutant("checkpoint.py", '{**card, "sha256": ""}', '{**card, "metrics": {}, "sha256": ""}',
           "the digest of a card leaves its metrics out", "test_checkpoint.py -k changed_card"),
    Mutant("cli.py", "return 2 if isinstance(error, UsageError) else 1", "return 1",
           "unusable arguments exit with 1", "test_run.py -k group_needs"),
    Mutant("workers.py", "child.terminate()", "child.is_alive()",
           "workers outlive an interrupted parent", "test_workers.py"),
    # ---- the plan of a run
    Mutant("recipe/steps.py", '"takes": self.takes.fingerprint if self.takes else None}',
           '"takes": None}', "a step's fingerprint leaves its source out",
           "test_recipe.py -k fingerprints"),
    Mutant("recipe/steps.py", '"weights": hashes,', '"weights": [],',
           "new weights do not make an estimate anew",
           "test_recipe.py -k trained_for_an_acquisition"),
    Mutant("recipe/steps.py", "elif stage.widening > 1:", "elif stage.widening > 2:",
           "intervals are not widened by the harmonizer's error",
           "test_recipe.py -k intervals"),
    Mutant("recipe/steps.py", "return bool(self.context.options.estimate) or isinstance(",
           "return bool(self.context.options.harmonize) or isinstance(",
           "a refused method that was named exits with 0",
           "test_run.py -k refused_method_that_was_named"),
    Mutant("recipe/execute.py", "or self._lacks_signal(other)", "",
           "a refusal reaches the next step alone", "test_recipe.py -k reaches_all_later"),
    Mutant("recipe/steps.py", "rtol=0, atol=ROUNDING * taken.bvals.max()", "rtol=0, atol=1e9",
           "a signal is read back with the directions of another",
           "test_recipe.py -k its_own_directions"),
    Mutant("registration/resample.py", 'np.einsum("nij,nj->ni", rotations, axis)',
           'np.einsum("nji,nj->ni", rotations, axis)',
           "directions are rotated the wrong way in another space",
           "test_spaces.py -k direction"),
    Mutant("registration/resample.py", "to_image(nib.Nifti1Image(displacement,",
           "to_image(nib.Nifti1Image(-displacement,",
           "the written field points the other way", "test_spaces.py -k 'field or antspyx'"),
    Mutant("recipe/execute.py", 'or earlier["Id"] in [m.id for m in models]',
           'or earlier["Id"] not in [m.id for m in models]',
           "images of another model are replaced", "test_harmonize.py -k another_model"),
    Mutant("recipe/harmonize.py", '("" if dwi.noise_sd else UNKNOWN_NOISE)', '""',
           "intervals are given without a noise level", "test_harmonize.py -k without_a_noise"),
    Mutant("recipe/harmonize.py", "if len(knowing) == 1 and not of_reference:", "if knowing:",
           "one of several models that know a site is taken", "test_harmonize.py -k selected"),
    # ---- mathematics
    Mutant("sh.py", "points.T[half].copy(), 2 * weights[half]",
           "points.T[half].copy(), weights[half]",
           "weights of the half grid count once", "test_spherical.py -k half_grid"),
    Mutant("sh.py", "np.where(np.abs(z[upper]) < 1e-12, 1, 2)",
           "np.where(np.abs(z[upper]) < 1e-12, 2, 2)", "the equator counts twice",
           "test_sh.py -k quadrature"),
    Mutant("sh.py", "smoothing * np.diag((l * (l + 1.0)) ** 2)",
           "smoothing * np.diag(l * (l + 1.0))", "the penalty is that of the gradient",
           "test_sh.py -k laplace"),
    Mutant("sh.py", "return per_coefficient(scale.sqrt())", "return per_coefficient(scale)",
           "degrees are scaled by the square", "test_shresnet.py -k projection"),
    Mutant("networks/spherical.py", "torch.diag(1 / (2 * l + 1))", "torch.diag(1 / (l + 1))",
           "the power of a degree is no mean", "test_spherical.py -k power"),
    Mutant("tensor.py", "(use.sum(0) - TERMS)", "(use.sum(0) - TERMS + 1)",
           "one degree of freedom too many", "test_tensor.py -k few_measurements"),
    Mutant("tensor.py", "twice = 2 - diagonal", "twice = torch.ones_like(diagonal)",
           "off-diagonal entries count once in the error of FA", "test_tensor.py -k 'gradients or "
           "standard_errors'"),
    Mutant("tensor.py", "np.square(b[chosen]).sum() >= MIN_SUM_B2",
           "np.square(b[chosen]).sum() > 0",
           "a tensor is fitted to shells that leave it to the noise",
           "test_tensor.py -k volumes_of_a_tensor"),
    # ---- simulation
    Mutant("simulate/tissue.py", "kappa * uniform(fans)], 1)", "0 * kappa * uniform(fans)], 1)",
           "fans are bundles", "test_densities.py test_scnn.py -k 'draw or densities or fan'"),
    Mutant("simulate/tissue.py", "(torch.arange(3, device=device) < bundles[:, None])",
           "(torch.arange(3, device=device) <= bundles[:, None])",
           "hardly any density has a single bundle", "test_densities.py"),
    Mutant("simulate/forward.py", "torch.where(inside > 0, inside, 1) / 2",
           "torch.where(inside > 0, inside, 1)", "the tortuosity of soma is not halved",
           "test_simulate.py -k three_compartments"),
    Mutant("simulate/noise.py", "for _ in range(2 * coils - 1):", "for _ in range(2 * coils - 2):",
           "the magnitude lacks a channel of noise", "test_noise.py -k 'rician or noncentral'"),
    Mutant("simulate/protocols.py", "highest = torch.where(b_delta.abs() < ISOTROPIC, 0, highest)",
           "highest = torch.where(b_delta.abs() < 0, 0, highest)",
           "spherical encoding is fitted with directions",
           "test_scnn.py -k spherical_encoding"),
    # ---- networks that estimate
    Mutant("microstructure/learn.py", "seed + 3, device))", "seed + 2, device))",
           "coverage is measured on the voxels that calibrated it",
           "test_scnn.py -k of_different_voxels"),
    Mutant("microstructure/learn.py", "8 * recipe.held_out, seed + 2, device))",
           "8 * recipe.held_out, seed + 1, device))",
           "intervals are calibrated on the voxels of the validation",
           "test_scnn.py -k of_different_voxels"),
    Mutant("microstructure/learn.py", "value[(row == i) & (column == k)]",
           "value[(row == k) & (column == i)]", "cells of the calibration are swapped",
           "test_bands.py -m 'not slow'"),
    Mutant("microstructure/learn.py", "weight * (0.5 * error**2 * torch.exp(-2 * log_sd) + log_sd)",
           "weight * (error**2 * torch.exp(-2 * log_sd) + log_sd)",
           "the loss is no likelihood", "test_bands.py -k loss_is_least"),
    Mutant("microstructure/learn.py", "mean(weight) * bias**2).sum()",
           "mean(weight) * bias).sum()", "the mean error may be made negative",
           "test_bands.py -m 'not slow'"),
    Mutant("microstructure/maps.py", "return torch.lerp(upper, lower, down)",
           "return torch.lerp(lower, upper, down)", "factors of the neighbouring band are taken",
           "test_bands.py -m 'not slow'"),
    Mutant("microstructure/maps.py", "flag = torch.where(sigma > 1.001 * high, 2.0,",
           "flag = torch.where(sigma > 1001 * high, 2.0,", "noise out of range is not flagged",
           "test_scnn.py -k strange_signals"),
    Mutant("training.py", 'better = value < state["best"]', 'better = value > state["best"]',
           "the worst weights are kept", "test_training.py -k keeps_the_best"),
    Mutant("training.py", '[state["step"] - state["drawn"]:])', "[0:])",
           "a resumed training sees samples again", "test_training.py -k resumed"),
    Mutant("methods/estimate_freewater/method.py",
           "torch.where(fraction > MAX_WATER, 0, fraction) * s0", "fraction * s0",
           "water is removed where nothing else is left",
           "test_freewater.py -k signal_stays"),
    Mutant("microstructure/deconvolution.py", "share[:, 2] >= MIN_WHITE",
           "share[:, 1] >= MIN_WHITE", "densities are taken from grey matter",
           "test_deconvolution.py -k 'grey or peaks'"),
    # ---- harmonizers
    Mutant("harmonization/paired.py", "learned = set(people) - held", "learned = set(people)",
           "who validates is learned from", "test_paired.py -k who_validates"),
    Mutant("harmonization/paired.py", "quantiles = paired.quantiles(learned)",
           "quantiles = paired.quantiles(set(people))",
           "quantiles are those of validators, too", "test_paired.py -k who_validates"),
    Mutant("harmonization/paired.py", "fill_nearest(source, mask, margin=1), mask, device)",
           "np.pad(fill_nearest(source, mask), ((1, 1),) * 3 + ((0, 0),)), mask, device)",
           "the margin holds zeros where the network is applied",
           "test_paired.py -k patches_at_the_edge"),
    Mutant("harmonization/patches.py", "weight = weight / before.mean(1).clamp(min=1e-12)",
           "weight = weight / 1.0", "losses are not in units of what there is",
           "test_paired.py -k loss_of_the_hybrid"),
    Mutant("harmonization/harmonizer.py", "weighted = ~dwi.acquisition.b0\n    noise =",
           "weighted = np.ones(len(dwi.acquisition), bool)\n    noise =",
           "noise is added to b0 volumes, too", "test_harmonized_noise.py -k b0_volumes"),
    Mutant("harmonization/harmonizer.py", "return float(np.sqrt(1 + np.mean(ratios)))",
           "return float(np.sqrt(np.mean(ratios)))", "widened intervals leave the noise out",
           "test_harmonized_noise.py -k widen"),
    Mutant("domain.py",
           "(1 - DIRECTIONS) * fewest <= len(shell) <= (1 + DIRECTIONS) * most",
           "(1 - DIRECTIONS) * fewest <= len(shell)",
           "more directions than in training are accepted",
           "test_harmonize.py -k directions_within"),
    Mutant("methods/harmonize_mica/method.py",
           "return (len(people) * mean - people) / (len(people) - 1)",
           "return np.broadcast_to(mean, people.shape)",
           "people are compared with a mean that holds them",
           "test_harmonize.py test_intensity.py -k 'card or different or quantiles'"),
    Mutant("harmonization/intensity.py", "_warp(x[rows], source[k], reference[k])",
           "_warp(x[rows], reference[k], source[k])", "intensities are warped the other way",
           "test_intensity.py"),
    Mutant("registration/geometry.py", "return values[row[tuple(nearest)]]",
           "return values[row] * inside[..., None]", "the margin is filled with zeros",
           "test_pairs.py -k filled_takes"),
    Mutant("registration/deformable.py", "return (left @ right).swapaxes(-1, -2)",
           "return left @ right",
           "directions turn the other way in a deformation", "test_pairs.py -k local_rotations"),
    Mutant("harmonization/pairs.py", '*(["session"] if by_session else [])', '*([])',
           "pairs of different sessions are learned from", "test_pairs.py -k pairs_of_one_session"),
    Mutant("networks/cyclic.py", "return -gradients[0]", "return gradients[0]",
           "generator and critic pull together", "test_cyclic.py -k pull_apart"),
    Mutant("networks/cyclic.py", "(gradient.norm(dim=1) - 1).square().mean()",
           "gradient.norm(dim=1).square().mean()", "the slope of critics is pulled to 0",
           "test_cyclic.py -k 'pull_apart or losses or formula'"),
    Mutant("methods/harmonize_rish/method.py",
           "np.where(valid, upper, 1) / np.where(valid, lower, 1))",
           "np.where(valid, lower, 1) / np.where(valid, upper, 1))",
           "scales lead away from the reference", "test_rish.py -k scales_are"),
    Mutant("methods/harmonize_combat/equations.py", "z.var(axis=0, ddof=1)", "z.var(axis=0)",
           "the variance of a site is biased", "test_combat.py -k equations"),
    Mutant("methods/harmonize_combat/method.py",
           "effects = _learn(rows[~tested], features, design[~tested], batches,",
           "effects = _learn(rows, features, design, batches,",
           "ComBat's cross-validation learns from whom it tests",
           "test_combat.py -k what_others_teach"),
    # ---- denoising and upsampling
    Mutant("recipe/signals.py", "no_intervals=DENOISED", 'no_intervals=""',
           "maps of a denoised signal have intervals", "test_denoise_step.py -k no_intervals"),
    Mutant("methods/denoise_spherical/method.py", "out = 2 * out - x", "pass",
           "cohort models keep half of the noise",
           "test_denoise_spherical.py -k half_of_the_noise_that"),
    Mutant("methods/denoise_spherical/method.py", "sampler(test, 1024)", "sampler(train, 1024)",
           "denoisers are validated on those they learn from",
           "test_denoise_spherical.py -k validation_is_on"),
    Mutant("methods/upsample_unet/method.py", "slices.fit_linear(learned,",
           "slices.fit_linear(validated,", "the linear prediction is that of the validation",
           "test_upsample_unet.py -k knows_nothing"),
    Mutant("methods/upsample_scnn/method.py", "present &= valid[index]", "present &= index >= 0",
           "neighbours without b0 signal are used",
           "test_upsample_scnn.py -k neighbours_without_b0"),
    Mutant("methods/upsample_scnn/learn.py", "view(-1, 1, 1, 1), floor, clean)",
           "view(-1, 1, 1, 1), clean, clean)",
           "upsampled magnitudes are taught without a noise floor",
           "test_upsample_scnn.py -k training_teaches"),
    Mutant("simulate/patches.py", "rho[..., None, None] ** lag",
           "rho[..., None, None] ** (lag * lag)",
           "the correlation of simulated noise falls too fast",
           "test_patches.py -k falls_with_the_distance"),
    Mutant("report/upsampling.py", "shell[angles.argmin()]", "shell[angles.argmax()]",
           "a predicted volume is shown beside the farthest measured one",
           "test_report_upsampling.py"),
    # ---- statistics
    Mutant("evaluate/biology.py", "t.ppf((1 + CONFIDENCE) / 2, free) ** 2)",
           "t.ppf((1 + CONFIDENCE) / 2, len(before)) ** 2)",
           "Fieller's interval has too many degrees of freedom", "test_biology.py -k intervals"),
    Mutant("evaluate/biology.py", "if ratio.ratio < 1 - LOSS and ratio.high < 1:",
           "if ratio.ratio < 1 - LOSS:", "an uncertain loss counts as one",
           "test_biology.py -k verdicts"),
    Mutant("evaluate/agreement.py", "sums.std(ddof=1) / math.sqrt(len(sums))",
           "sums.std(ddof=1) / len(sums)", "intervals of differences are too narrow",
           "test_agreement.py -k differences"),
    Mutant("evaluate/agreement.py", "(parts**2 / (counts - 1)).sum()",
           "(parts**2 / counts).sum()", "Welch's degrees of freedom are too many",
           "test_agreement.py -k differences"),
    Mutant("evaluate/crossvalidation.py", "rest = method._fit(_without(cohort, people), settings)",
           "rest = method._fit(cohort, settings)",
           "folds learn from those they are tested on",
           "test_crossvalidation.py -k 'knows_nothing'"),
    Mutant("methods/synthesize/score.py", "rician(signal, sd / s0[:, None], generator)",
           "rician(signal, sd / s0.mean(), generator)", "noise is that of the mean voxel",
           "test_score.py -k noise_is_that_of_each"),
)


def copy_tree(folder: Path) -> None:
    """Copy the tracked and untracked, but not the ignored, files of the working tree."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def find_tests(name: str, folder: Path) -> list[str]:
    """List the paths of the test file of this name, relative to the tree: one, or none."""
    return [str(p.relative_to(folder)) for p in (folder / "tests").rglob(name)]


def run_tests(tests: str, folder: Path, output: Path) -> None:
    """Run tests of the tree in a folder, and end this process with their exit code."""
    import pytest

    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    os.environ.setdefault("QSPHERE_TEST_DATA", str(ROOT / "../shared/data"))
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    arguments = [path for a in shlex.split(tests)
                 for path in (find_tests(a, folder) if a.endswith(".py") else [a])]
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])
    os._exit(int(code))


def judge(mutant: Mutant, folder: Path) -> str:
    """Apply a mutant to the tree in a folder, test it, undo it, and describe the result."""
    path, output = folder / "bidsapp" / mutant.file, folder / ".output"
    text = path.read_text()
    path.write_text(text.replace(mutant.text, mutant.replacement))
    process = multiprocessing.get_context("fork").Process(
        target=run_tests, args=(mutant.tests, folder, output))
    try:
        process.start()
        process.join()
    finally:
        path.write_text(text)
    if process.exitcode == 0:
        return "SURVIVED"
    failure = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output.read_text(), re.MULTILINE)
    return f"killed by {failure[1]}" if process.exitcode == 1 and failure else (
        f"NOT TESTED, exit code {process.exitcode}: {output.read_text()[-300:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", choices=range(len(MUTANTS)),
                        help="numbers of the mutants, as in the output")
    numbers = parser.parse_args().only or range(len(MUTANTS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in LIBRARIES:
        importlib.import_module(name)
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_tree(folder)
        for number in numbers:
            mutant, start = MUTANTS[number], time.monotonic()
            verdict = judge(mutant, folder)
            survivors += not verdict.startswith("killed")
            print(f"{number:2} {mutant.file}: {mutant.error}: {verdict} "
                  f"({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(numbers)} mutants, {survivors} not killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
