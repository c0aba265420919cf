"""Images on their way from a disk to the device: data sets, decoding, loaders and samplers.

Public names are imported on first use, so that `python -m data.convert --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.datasets import COLLECTIONS as COLLECTIONS
    from data.datasets import ImageDataset as ImageDataset
    from data.datasets import Transform as Transform
    from data.datasets import build_dataset as build_dataset
    from data.datasets import layout_of as layout_of
    from data.layouts.shards import ShardStream as ShardStream
    from data.layouts.shards import build_stream as build_stream
    from data.loader import Batch as Batch
    from data.loader import DeviceTransform as DeviceTransform
    from data.loader import FailureTally as FailureTally
    from data.loader import build_eval_loader as build_eval_loader
    from data.loader import build_train_loader as build_train_loader

_MODULE_OF = {
    **dict.fromkeys(("COLLECTIONS", "ImageDataset", "Transform", "build_dataset", "layout_of"), ".datasets"),
    **dict.fromkeys(("ShardStream", "build_stream"), ".layouts.shards"),
    **dict.fromkeys(("Batch", "DeviceTransform", "FailureTally", "build_eval_loader", "build_train_loader"), ".loader"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'data' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
