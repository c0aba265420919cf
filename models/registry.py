"""The registry of architectures: build a backbone from its name and a config.

To add an architecture, subclass `Backbone` (models/base.py) in a new module, decorate its builder with `@register`, and import the
module in models/__init__.py.

backbone = build_model("swin_tiny", load_config("experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml"))
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from yacs.config import CfgNode

from config.choices import PATCH_SIZE
from config.loading import SavedConfig, load_config
from config.schema import ArchSpec, register_spec
from models.base import Backbone
from utils import UsageError, logger

ROOT = Path(__file__).parent.parent
SIZE_KEYS = ("DIM_EMBED", "DEPTH", "DEPTHS", "NUM_HEADS")


class Builder(Protocol):
    """Builds a headless backbone."""

    def __call__(self, arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> Backbone: ...


class Entry(NamedTuple):
    """A registered name."""

    build: Builder
    spec: ArchSpec
    # A yaml relative to the repository; "" for the schema's defaults, None if --cfg is required.
    default_config: str | None


_REGISTRY: dict[str, Entry] = {}


def register(names: Mapping[str, str | None], spec: ArchSpec) -> Callable[[Builder], Builder]:
    """Register a builder and the part of the config that it reads.

    Args:
        names: values of --arch, each with its `Entry.default_config`.
        spec: the keys below MODEL.SPEC.
    """

    def decorate(build: Builder) -> Builder:
        register_spec(spec)
        _REGISTRY.update({name: Entry(build, spec, default) for name, default in names.items()})
        return build

    return decorate


def list_models() -> list[str]:
    """Return all registered names, sorted."""
    return sorted(_REGISTRY)


def lookup(arch: str) -> Entry:
    """Return the entry of a name.

    Raises:
        UsageError: unknown name.
    """
    if arch not in _REGISTRY:
        nearest = difflib.get_close_matches(arch, _REGISTRY, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise UsageError(f"unknown arch '{arch}'; choose one of {', '.join(list_models())}{hint}")
    return _REGISTRY[arch]


def load_arch_config(
    arch: str,
    path: str | SavedConfig | None,
    overrides: Sequence[str] = (),
    drop_path: float | None = None,
    defaults: Sequence[str] = (),
) -> CfgNode:
    """Load the config of `arch` from `path`, or from the default yaml of that name.

    Args:
        arch: a registered name.
        path, overrides, defaults: as in `load_config`.
        drop_path: overrides MODEL.SPEC.DROP_PATH_RATE.

    Raises:
        UsageError: an unknown name, a name that needs a yaml and got none, a yaml of another architecture, or stochastic depth
            for an architecture without it.
    """
    entry = lookup(arch)
    has_drop_path = "DROP_PATH_RATE" in entry.spec.defaults
    if drop_path and not has_drop_path:
        raise UsageError(f"--drop_path {drop_path}: {arch} has no stochastic depth; set it to 0")
    if drop_path is not None and has_drop_path:
        overrides = [*overrides, "MODEL.SPEC.DROP_PATH_RATE", str(drop_path)]
    default = str(ROOT / entry.default_config) if entry.default_config else None
    if path is None and entry.default_config is None:
        raise UsageError(f"arch '{arch}' has no default yaml; pass one with --cfg (see experiments/)")
    source = default if path is None else path
    if source is None:
        overrides = ["MODEL.NAME", entry.spec.name, *overrides]
    config = load_config(source, overrides, defaults)
    _check_architecture(arch, entry, config, str(source or "the command line"))
    if path is not None and default is not None:
        _warn_of_other_size(arch, load_config(default), config, path)
    return config


def _warn_of_other_size(arch: str, default: CfgNode, config: CfgNode, path: str | SavedConfig) -> None:
    different = [key for key in SIZE_KEYS if default.MODEL.SPEC.get(key) != config.MODEL.SPEC.get(key)]
    if default.MODEL.SPEC.get("MSVIT", {}).get("ARCH") != config.MODEL.SPEC.get("MSVIT", {}).get("ARCH"):
        different.append("MSVIT.ARCH")
    if different:
        logger.warning("%s overrides %s of --arch %s", path, " and ".join(different), arch)


def _check_architecture(arch: str, entry: Entry, config: CfgNode, source: str) -> None:
    if entry.spec.name != config.MODEL.NAME:
        raise UsageError(
            f"arch '{arch}' needs a yaml of MODEL.NAME '{entry.spec.name}', {source} describes '{config.MODEL.NAME}'; "
            "change --arch or --cfg"
        )


def build_model(
    arch: str,
    config: CfgNode | None = None,
    *,
    dense: bool = False,
    is_teacher: bool = False,
    patch_size: int = PATCH_SIZE,
) -> Backbone:
    """Build a backbone whose `head` (and `head_dense` when dense) are empty.

    Args:
        arch: a registered name, see `list_models`.
        config: a loaded config, which is not modified; None for the default yaml of that name.
        dense: also return region outputs.
        is_teacher: build without stochastic depth.
        patch_size: pixels, for architectures whose config has no patch size.

    Raises:
        UsageError: an unknown name, a config of another architecture, or inconsistent values.
    """
    entry = lookup(arch)
    if config is None:
        config = load_arch_config(arch, None)
    _check_architecture(arch, entry, config, "the config")
    if is_teacher and "DROP_PATH_RATE" in config.MODEL.SPEC:
        config = config.clone()
        config.defrost()
        config.MODEL.SPEC.DROP_PATH_RATE = 0.0
    return entry.build(arch, config, dense=dense, patch_size=patch_size)
