"""mmdet without the compiled operators of mmcv, which have no wheels on the package index: mmcv-lite and a stand-in for them.

The stand-in holds every name, so that `mmcv.ops` can be imported, and non-maximum suppression from torchvision. All else raises.
The networks of mmdet, its data pipeline and RetinaNet's losses on a CPU use no other operator.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec

import pytest
import torchvision
from torch import Tensor

try:
    import cv2  # noqa: F401 - imported by mmdet
except ImportError as error:
    pytest.skip(f"OpenCV needs Debian's packages libgl1 and libglib2.0-0 ({error})", allow_module_level=True)


class CompiledOperators(types.ModuleType):
    """A stand-in for `mmcv._ext`."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)

        def not_compiled(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"mmcv-lite has no operator {name}")

        return not_compiled

    @staticmethod
    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        assert offset == 0
        return torchvision.ops.nms(boxes, scores, iou_threshold)


if importlib.util.find_spec("mmcv._ext") is None:
    operators = CompiledOperators("mmcv._ext")
    operators.__spec__ = ModuleSpec("mmcv._ext", loader=None)
    sys.modules["mmcv._ext"] = operators
