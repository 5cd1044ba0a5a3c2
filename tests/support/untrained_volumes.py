"""Networks on volumes as a training would leave them, but with random weights."""

from bidsapp import kinds, methods
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.domain import TrainingDomain
from bidsapp.volumetric import learn, scans
from support import travelling_heads

DOMAIN = TrainingDomain(
    ({"b": (500.0, 3500.0), "b_delta": 1.0, "directions": (6, 90)},), b0=(1, 16),
    shell_count=(1, 4))


def checkpoint(name, voxel=2.0, **network):
    """Weights of a task, for any table."""
    method = methods.get(name, context=kinds.MethodContext(sloppy=True))
    cohort, settings = travelling_heads.study()
    recipe = learn.read_recipe(method.settings("training"))
    recipe.network.update({"width": 4, "channels": 8, "levels": 2, **network})
    channels = scans.Channels(voxel)
    built, description = learn.initial_network(
        recipe, method.task(cohort, settings).outputs, channels, 1, None)
    return Checkpoint(dict(built.state_dict()), Card(
        method=name, network=description, trained_for=DOMAIN,
        training={"patch": 32, "data": "none", "runs": 1, "steps": 1}, intended_use="tests",
        seed=1, versions={},
        constants={"channels": {"voxel": voxel, "directions": [], "b": 0.0}}))
