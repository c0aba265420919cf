"""The registry of architectures: a name and a config in, a backbone of the common contract out.

    backbone = build_model("swin_tiny", load_config("experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml"))

This is the only place that knows which name belongs to which family.

Origin: this project's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from yacs.config import CfgNode

from config.choices import PATCH_SIZE
from config.loading import SavedConfig, load_config
from config.schema import SPECS
from models.base import Backbone
from utils import UsageError, logger

SIZE_KEYS = ("DIM_EMBED", "DEPTH", "DEPTHS", "NUM_HEADS")


class Builder(Protocol):
    """Makes a headless backbone of a registered name from a config."""

    def __call__(self, arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> Backbone: ...


class Entry(NamedTuple):
    """What the registry knows of a name.

    `default_config` is the yaml used when none is given, relative to the project's root; an empty one stands for the schema's
    defaults, None for a yaml that must be given.
    """

    build: Builder
    config_name: str  # the MODEL.NAME its yaml must have
    default_config: str | None


_REGISTRY: dict[str, Entry] = {}


def register(names: Mapping[str, str | None], *, config_name: str) -> Callable[[Builder], Builder]:
    """Register a builder under `names`, each with its default yaml; see `Entry`."""

    def decorate(build: Builder) -> Builder:
        _REGISTRY.update({name: Entry(build, config_name, default) for name, default in names.items()})
        return build

    return decorate


def list_models() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def _lookup(arch: str) -> Entry:
    if arch not in _REGISTRY:
        near = difflib.get_close_matches(arch, _REGISTRY, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"unknown arch '{arch}', the registered ones are {', '.join(list_models())}{hint}")
    return _REGISTRY[arch]


def config_name(arch: str) -> str:
    """The MODEL.NAME that a yaml for `arch` must have.

    Raises:
        UsageError: unknown arch.
    """
    return _lookup(arch).config_name


def default_config(arch: str) -> str | None:
    """The yaml that `arch` has of its own; see `Entry`.

    Raises:
        UsageError: unknown arch.
    """
    return _lookup(arch).default_config


def load_arch_config(
    arch: str,
    path: str | SavedConfig | None,
    overrides: Sequence[str] = (),
    drop_path: float | None = None,
    defaults: Sequence[str] = (),
) -> CfgNode:
    """The config for `arch`: the yaml at `path`, or the published one of that name when `path` is None.

    `drop_path` stands for an override of MODEL.SPEC.DROP_PATH_RATE; `defaults`: see `load_config`.

    Raises:
        UsageError: unknown arch, no yaml where the arch needs one, one that describes another architecture, or stochastic
            depth for a network that has none.
    """
    entry, given = _lookup(arch), path
    has_drop_path = "DROP_PATH_RATE" in SPECS.get(entry.config_name, {})
    if drop_path and not has_drop_path:
        raise UsageError(f"--drop_path {drop_path}: {arch} has no stochastic depth; set it to 0")
    if drop_path is not None and has_drop_path:
        overrides = [*overrides, "MODEL.SPEC.DROP_PATH_RATE", str(drop_path)]
    if path is None:
        if entry.default_config is None:
            raise UsageError(f"arch '{arch}' has no yaml of its own; name one with --cfg (see experiments/)")
        path = str(Path(__file__).parent.parent / entry.default_config) if entry.default_config else None
    config = load_config(path, overrides if path else ["MODEL.NAME", entry.config_name, *overrides], defaults)
    _check_family(arch, entry, config, str(path or "the command line"))
    if given is not None and entry.default_config:
        _report_other_size(arch, load_config(Path(__file__).parent.parent / entry.default_config), config, given)
    return config


def _report_other_size(arch: str, named: CfgNode, given: CfgNode, path: str | SavedConfig) -> None:
    """Say so where a yaml describes a network of another size than the name: the yaml counts."""
    different = [key for key in SIZE_KEYS if named.MODEL.SPEC.get(key) != given.MODEL.SPEC.get(key)]
    if "MSVIT" in named.MODEL.SPEC and named.MODEL.SPEC.MSVIT.ARCH != given.MODEL.SPEC.MSVIT.ARCH:
        different.append("MSVIT.ARCH")
    if different:
        logger.warning("%s has another %s than --arch %s; the yaml counts", path, " and ".join(different), arch)


def _check_family(arch: str, entry: Entry, config: CfgNode, source: str) -> None:
    if entry.config_name != config.MODEL.NAME:
        raise UsageError(
            f"arch '{arch}' needs a yaml of MODEL.NAME '{entry.config_name}', {source} describes '{config.MODEL.NAME}'; "
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
    """Build a backbone whose `head` (and `head_dense` when dense) are still empty.

    Args:
        arch: a registered name, see `list_models`.
        config: a loaded config; None takes the published yaml of that name. It is never changed.
        dense: give region outputs too.
        is_teacher: build without stochastic depth.
        patch_size: pixels per patch, for architectures whose yaml does not say.

    Raises:
        UsageError: an unknown arch, a config of another architecture, or values that do not fit together.
    """
    entry = _lookup(arch)
    if config is None:
        config = load_arch_config(arch, None)
    _check_family(arch, entry, config, "the config")
    if is_teacher and "DROP_PATH_RATE" in config.MODEL.SPEC:
        config = config.clone()
        config.defrost()
        config.MODEL.SPEC.DROP_PATH_RATE = 0.0
    return entry.build(arch, config, dense=dense, patch_size=patch_size)
