"""Backbones for `torch.hub.load`: that of any checkpoint of this project, and the published networks of EsViT and UDI.

    backbone = torch.hub.load("PATH/TO/THIS/CHECKOUT", "esvit", source="local", weights="RUN/checkpoint.pth")
    backbone = torch.hub.load("PATH/TO/THIS/CHECKOUT", "esvit_swin_tiny", source="local", weights="swin_tiny.pth")
    view_BC = backbone(images_BCHW)
    view_BC, regions_BTC = backbone.forward_features(images_BCHW)
    backbone.choose_token("both")                   # udi_vit_small: view features (B, 2 C) of both class tokens

All entries return a `models.Backbone` in evaluation mode without heads, and accept
    weights: checkpoint file of any supported layout; None for random weights, except for `esvit`.
    checkpoint_key: network of a full checkpoint, `teacher` or `student`.
    allow_partial: load the tensors that match, and ignore the rest.
They raise a ValueError (`UsageError`) for an invalid file.

The modules of this checkout (models, utils, data, ...) are imported inside a package `esvit_hub`, so a program may have modules of
these names, imported earlier or later. A pickled backbone is read by a process that has called an entry before.

Origin: the networks of EsViT (Li et al., ICLR 2022) and UDI (Su and Ji, ECCV 2024).
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models import Backbone

dependencies = ["torch", "torchvision", "timm", "yacs", "yaml", "safetensors", "numpy", "filelock", "tqdm"]

# --------------------------------------------------------------------------- isolated imports

_PACKAGE = "esvit_hub"
_ROOT = Path(__file__).resolve().parent
_OWN = {path.parent.name for path in _ROOT.glob("*/__init__.py")} | {"utils"}


class _Loader(SourceFileLoader):
    """Executes a module with an `__import__` of its own, which also serves the imports inside its functions."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _Finder(MetaPathFinder):
    """Finds the modules of the package."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{_PACKAGE}."):
            return None
        specs = (FileFinder(folder, (_Loader, SOURCE_SUFFIXES)).find_spec(name) for folder in path or ())
        return next((spec for spec in specs if spec is not None), None)


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """Import as Python does, but `models` as `esvit_hub.models`, and so for each name of this checkout."""
    top = name.partition(".")[0]
    if level or top not in _OWN:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = builtins.__import__(f"{_PACKAGE}.{name}", globals, locals, fromlist or (), 0)
    return module if fromlist else getattr(module, top)


def _module(name: str) -> Any:
    """Return a module of this checkout.

    Raises:
        ImportError: the package has been imported from another checkout.
    """
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(_ROOT)]
        sys.modules[_PACKAGE] = package
        sys.meta_path.insert(0, _Finder())
    loaded_from = list(sys.modules[_PACKAGE].__path__)
    if loaded_from != [str(_ROOT)]:
        raise ImportError(
            f"this process has loaded another checkout, {loaded_from[0]}; load {_ROOT} in another process"
        )
    return importlib.import_module(f"{_PACKAGE}.{name}")


# --------------------------------------------------------------------------- loading


def _backbone(
    arch: str,
    overrides: tuple[str, ...] = (),
    weights: str | Path | None = None,
    checkpoint_key: str = "teacher",
    allow_partial: bool = False,
    cfg: Any = None,
    patch_size: int = 16,
) -> Backbone:
    models, loading, UsageError = _module("models"), _module("checkpoints.loading"), _module("utils").UsageError
    try:
        config = models.load_arch_config(arch, cfg, overrides)
        backbone: Backbone = models.build_model(arch, config, is_teacher=True, patch_size=patch_size)
        if weights is not None:
            report = loading.load_backbone(backbone, weights, checkpoint_key, allow_partial=allow_partial)
            print(f"{weights}: {report}", file=sys.stderr)
    except UsageError as error:
        raise UsageError(_without_flags(str(error), allow_partial)) from None
    return backbone.eval()


def _without_flags(message: str, allow_partial: bool) -> str:
    """Replace a remedy that names flags or keys of the scripts by arguments of the entries."""
    problem, _, remedy = message.replace("even with --allow_partial", "even partially").rpartition("; ")
    if "--" in remedy or "MODEL." in remedy:
        remedy = "call the entry of the network in the file"
        remedy += "" if allow_partial else ", or pass allow_partial=True to load the tensors that match"
    return f"{problem}; {remedy}"


# --------------------------------------------------------------------------- entries


def esvit(
    weights: str | Path,
    checkpoint_key: str = "teacher",
    allow_partial: bool = False,
    arch: str | None = None,
    cfg: str | None = None,
    patch_size: int | None = None,
) -> Backbone:
    """Build any network, as described in its checkpoint.

    Args:
        arch, patch_size: as the flags of the scripts; default: those of the run that wrote the file.
        cfg: yaml file; default: the config in the file, or with `arch` the published one of that name.

    Raises:
        ValueError: an invalid file, or one that does not describe its network, without `arch`.
    """
    network, UsageError = _module("checkpoints.network"), _module("utils").UsageError
    saved = network.saved_network(weights)
    if arch and saved.arch and not allow_partial and not network.is_network(arch, saved.arch):
        raise UsageError(f"arch '{arch}': checkpoint '{weights}' was trained with '{saved.arch}'; leave arch out")
    if arch is None and (saved.arch is None or (cfg or saved.config) is None):
        entries = ", ".join(name for name in globals() if name.startswith(("esvit_", "udi_")))
        raise UsageError(
            f"checkpoint '{weights}' does not describe its network; pass arch, e.g. 'swin_tiny', and cfg for a yaml that is "
            f"not the published one, or call the entry of its network: {entries}"
        )
    if arch and saved.arch and not network.is_network(arch, saved.arch):
        saved = network.SavedNetwork()  # of another network
    overrides = () if cfg else saved.overrides
    patch_size = patch_size or saved.patch_size or 16
    return _backbone(
        arch or saved.arch, overrides, weights, checkpoint_key, allow_partial, cfg or saved.config, patch_size
    )


_TWO_TOKENS = ("MODEL.SPEC.NUM_CLS_TOKENS", "2", "MODEL.SPEC.POS_RESIZE", "scale")
_WINDOW_14 = ("MODEL.SPEC.WINDOW_SIZE", "14")


def esvit_swin_tiny(**kwargs: Any) -> Backbone:
    """Build Swin-T, window 7."""
    return _backbone("swin_tiny", **kwargs)


def esvit_swin_small(**kwargs: Any) -> Backbone:
    """Build Swin-S, window 7."""
    return _backbone("swin_small", **kwargs)


def esvit_swin_base(**kwargs: Any) -> Backbone:
    """Build Swin-B, window 7."""
    return _backbone("swin_base", **kwargs)


def esvit_swin_tiny_w14(**kwargs: Any) -> Backbone:
    """Build Swin-T, window 14."""
    return _backbone("swin_tiny", _WINDOW_14, **kwargs)


def esvit_swin_small_w14(**kwargs: Any) -> Backbone:
    """Build Swin-S, window 14."""
    return _backbone("swin_small", _WINDOW_14, **kwargs)


def esvit_swin_base_w14(**kwargs: Any) -> Backbone:
    """Build Swin-B, window 14."""
    return _backbone("swin_base", _WINDOW_14, **kwargs)


def esvit_vil_2262(**kwargs: Any) -> Backbone:
    """Build ViL, window 7."""
    return _backbone("vil_2262", **kwargs)


def esvit_cvt_tiny(**kwargs: Any) -> Backbone:
    """Build CvT, window 7."""
    return _backbone("cvt_tiny", **kwargs)


def esvit_deit_small(**kwargs: Any) -> Backbone:
    """Build DeiT-S, patches of 16 pixels."""
    return _backbone("deit_small", **kwargs)


def udi_vit_small(**kwargs: Any) -> Backbone:
    """Build ViT-S of UDI, patches of 16 pixels; the view feature is the first class token, see `Backbone.choose_token`."""
    return _backbone("deit_small", _TWO_TOKENS, **kwargs)


def esvit_resnet50(**kwargs: Any) -> Backbone:
    """Build ResNet-50."""
    return _backbone("resnet50", **kwargs)
