"""An estimator with every kind of map, for reports and texts; it estimates nothing."""

from typing import ClassVar

from bidsapp.kinds import Estimator, MethodContext

OUTPUTS = {
    "model": {"name": "tensor", "Description": "A tensor (Doe et al. 2020)",
              "URL": "https://doi.org/10.1000/tensor"},
    "maps": {
        "fa": {"entities": {"param": "fa"}, "Description": "Fractional anisotropy",
               "Units": "unitless", "range": [0, 1], "cmap": "gray", "report": True},
        "md": {"entities": {"param": "md"}, "Description": "Mean diffusivity; of the tensor",
               "Units": "mm^2/s", "range": [0, None], "report": True},
        "fa_std": {"entities": {"param": "fa", "stat": "std"}, "Description": "Standard error",
                   "Units": "unitless", "range": [0, None], "display": [0, 0.2], "report": True},
        "s0": {"entities": {"param": "s0"}, "Description": "S0", "Units": "arbitrary",
               "range": [0, None], "report": False},
        "direction": {"entities": {"param": "direction"}, "Description": "Direction",
                      "Units": "unitless", "range": [-1, 1], "report": False}}}


class Tensor(Estimator):
    """An estimator whose `outputs` are OUTPUTS, with every kind of map."""

    OUTPUTS: ClassVar[dict] = OUTPUTS

    def __init__(self, folder=None):
        self.folder, self.context = folder, MethodContext()

    @property
    def name(self):
        return "estimate_tensor"

    @property
    def outputs(self):
        return self.OUTPUTS

    def check(self, acquisition):
        """Applies to everything."""

    def apply(self, dwi, device, seed=0):
        raise NotImplementedError
