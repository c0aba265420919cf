"""The keys of a config: those common to all networks, and a registry of those that each architecture adds.

Architectures live in `models/` and register an `ArchSpec` there, so this package holds no table by architecture.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from config.ranges import PIXELS, SHARE, Range, integer, number

SCHEMA: dict[str, Any] = {
    "MODEL": {"NAME": "swin_transformer", "IMAGE_SIZE": [224, 224]},
    "INPUT": {
        "MEAN": [0.485, 0.456, 0.406],
        "STD": [0.229, 0.224, 0.225],
        "RANGE": [],  # [black, white] of images with more than 8 bits, where their type does not define it
    },
}

# Keys and groups of the published files that configure their supervised training, not this one; accepted and ignored.
PUBLISHED_UNUSED = {
    *("AMP", "AUG", "CUDNN", "DATASET", "DEBUG", "FINETUNE", "LOSS", "OUTPUT_DIR", "PRINT_FREQ", "TEST", "TRAIN"),
    *("WORKERS", "MODEL.NUM_CLASSES", "MODEL.INIT_WEIGHTS", "MODEL.PRETRAINED", "MODEL.PRETRAINED_LAYERS"),
    *("INPUT.IMAGE_SIZE", "INPUT.CROP_PCT", "INPUT.INTERPOLATION"),
}

# Published files give the size for which learned tables are made as that of the training images.
KEY_ALIASES = {"TRAIN.IMAGE_SIZE": "MODEL.IMAGE_SIZE"}

# Allowed numbers, or entries of a list, by the last part of the key.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("PATCH_SIZE", "WINDOW_SIZE"), integer(1, 1024)),
    **dict.fromkeys(("DEPTH", "DEPTHS"), integer(1, 1000)),
    **dict.fromkeys(("DROP_RATE", "ATTN_DROP_RATE", "DROP_PATH_RATE"), SHARE),
    "IMAGE_SIZE": PIXELS,
    "MEAN": number(-1e6, 1e6),
    "STD": number(1e-6, 1e6),
    "IN_CHANS": integer(1, 1024),
    "DIM_EMBED": integer(1, 65_536),
    "NUM_HEADS": integer(1, 1024),
    "MLP_RATIO": number(0, 1000, above_low=True),
}


@dataclass(frozen=True)
class ArchSpec:
    """The part of the schema that belongs to one architecture, and how published files write it.

    Attributes:
        name: the value of MODEL.NAME.
        defaults: the keys below MODEL.SPEC with their default values.
        ranges: allowed numbers of keys that `RANGES` does not have, by the last part of the key.
        name_aliases: other values of MODEL.NAME in published files.
        key_aliases: other (dotted) keys in published files, mapped to the keys of `defaults`.
        fixed_choices: (dotted) keys by which published files select a variant, with the values that select the only one
            implemented here; they are accepted and have no effect.
        per_stage: let a file give one value for all stages, or a list of equal values for a key with a single one.
    """

    name: str
    defaults: Mapping[str, Any]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    name_aliases: tuple[str, ...] = ()
    key_aliases: Mapping[str, str] = field(default_factory=dict)
    fixed_choices: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    per_stage: bool = False


_ARCH_SPECS: dict[str, ArchSpec] = {}


def register_spec(spec: ArchSpec) -> None:
    """Make an architecture's part of the schema known under its MODEL.NAME."""
    _ARCH_SPECS[spec.name] = spec


def arch_specs() -> Mapping[str, ArchSpec]:
    """Return the specs of all architectures by MODEL.NAME.

    The package `models` registers them when it is imported. It is imported here, by name, because it depends on this package;
    the name is relative to this module's because hubconf.py imports all modules inside a package.
    """
    importlib.import_module(__name__.removesuffix("config.schema") + "models")
    return _ARCH_SPECS
