"""Declares torchvision's C++ operators by name just before torchvision is imported.

Laid into an environment by setup_env.py only where torchvision's build does not match torch's.
"""

import sys
from importlib.abc import MetaPathFinder

_kept = []


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)
        return


sys.meta_path.insert(0, _BeforeTorchvision())
