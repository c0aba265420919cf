"""Layouts of published checkpoints: find the network in a file and convert its tensor names.

A network lies under a key, or is the whole file. Its names have prefixes that depend on the program that wrote it, and each program
names the modules beside a backbone differently:

| program | prefixes | beside the backbone |
| --- | --- | --- |
| torch | `module.`, `_orig_mod.`, anywhere and repeated | |
| EsViT | none (ResNet: `backbone.backbone.`) | `head.`, `head_dense.` |
| DINO, iBOT | `backbone.` | `head.` |
| UDI | `backbone.backbone.`; its extraction script: `backbone.` | `head.N.`, `backbone.norm1.`, `backbone.attn.` |
| MoCo, MoBY | `encoder.`, `base_encoder.`, `encoder_q.`; momentum: `momentum_encoder.`, `encoder_k.` | projectors, queues |
| MAE, timm, torchvision, Swin, DeiT | none, `encoder.` | decoder, linear classifier |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor, nn

from models.base import METHOD_PREFIXES, Backbone
from models.interop import vit_from_timm
from models.resize import RULES
from models.srs import PUBLISHED as UDI_NAMES
from utils import UsageError

WRAPPING_KEYS = ("model", "state_dict")  # where timm, Swin, DeiT and others keep a network
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")  # DistributedDataParallel, torch.compile
ONLINE = ("backbone", "encoder", "base_encoder", "online_encoder", "encoder_q", "student")
MOMENTUM = ("momentum_encoder", "momentum_backbone", "target_encoder", "encoder_k", "teacher")
NETWORK_PREFIX = re.compile(rf"^(?:(?:{'|'.join((*ONLINE, *MOMENTUM))})\.)+")
MOMENTUM_PREFIX = re.compile(rf"^(?:(?:{'|'.join(ONLINE)})\.)*(?:{'|'.join(MOMENTUM)})\.")
UDI_HEAD = re.compile(r"^head\.\d+\.")  # UDI's single head, stored once per level
# Prefixes of what other programs train beside a backbone: linear classifiers, projectors and queues, decoders and masks.
IGNORED_PREFIXES = (
    *("fc.", "head_dist.", "classifier."),
    *("projector", "momentum_projector", "predictor", "queue"),
    *("decoder", "mask_token", "masked_embed"),
)
TIMM_ONLY_MODULES = {"norm_pre", "fc_norm", "head_drop", "pre_logits"}  # modules of timm's ViT that DINO's lacks
CENTERS = ("center", "center_plus")  # of UDI's class tokens, in order; that of the patches comes last
# Buffers that the architecture computes; older files contain the masks.
DERIVED = ("relative_position_index", "rel_pos_idx", "attn_mask")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class NetworkState(NamedTuple):
    """The tensors of one network in a file, and where they were found."""

    tensors: dict[str, Tensor]
    layout: str
    key: str | None
    image_size: tuple[int, int] | None = None  # MODEL.IMAGE_SIZE of the run, if known
    pos_resize: str | None = None  # how the program resizes positions, one of `models.resize.RULES`, if known


def network_state(content: Mapping[str, Any], key: str, path: str | Path) -> NetworkState:
    """Return the network of a file, with `published_names`.

    Args:
        key: Field of a full checkpoint. If a file has an online and a momentum network (MoCo, MoBY), `student` selects the online
            one and any other key the momentum one.

    Raises:
        UsageError: A full checkpoint lacks `key`, or the content is no state dict.
    """
    layout, found_under, whole = "bare state dict", None, content
    if "student" in content or "teacher" in content:
        if key not in content:
            raise UsageError(
                f"checkpoint '{path}' has no network '{key}'; choose one that it has: "
                + " or ".join(sorted(content.keys() & {"student", "teacher"}))
            )
        layout, found_under = "full checkpoint", key
    else:
        found_under = next((k for k in WRAPPING_KEYS if isinstance(content.get(k), Mapping)), None)
        layout = "wrapped state dict" if found_under else layout
    if found_under:
        content = content[found_under]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): tensor for name, tensor in named if isinstance(tensor, Tensor)}
    if not tensors:
        where = f" under '{found_under}'" if found_under else ""
        found = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else type(content).__name__
        raise UsageError(
            f"checkpoint '{path}' holds no tensors of a network{where}, but {found or 'nothing'}; use another file"
        )
    names = published_names(tensors)
    if any(names[name].startswith("srs.") and not WRAPPERS.sub(r"\1", name).startswith("srs.") for name in names):
        layout += " of UDI"
    unselected = _names_of_other_network(names.values(), key)
    if unselected:
        layout += f", its {'online' if key == 'student' else 'momentum'} network"
    kept = {names[name]: tensor for name, tensor in tensors.items() if names[name] not in unselected}
    model = _saved_model(whole)
    rule = model["SPEC"].get("POS_RESIZE") if isinstance(model["SPEC"], dict) else None
    rule = rule or _pos_resize(content, kept, layout, path)
    return NetworkState(vit_from_timm(kept), layout, found_under, _image_size(model), rule)


def _names_of_other_network(names: Iterable[str], key: str) -> set[str]:
    """Return the names of the network that `key` does not select, if a file holds an online and a momentum network."""
    momentum = {name for name in names if MOMENTUM_PREFIX.match(name)}
    online = {name for name in names if name not in momentum}
    if not {strip_prefix(name) for name in momentum} & {
        strip_prefix(name) for name in online if strip_prefix(name) != name
    }:
        return set()
    return momentum if key == "student" else {name for name in online if strip_prefix(name) != name}


def _saved_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group MODEL of the config in a checkpoint of this project; for other files only an empty SPEC."""
    config = content.get("config")
    try:
        model = yaml.safe_load(config)["MODEL"] if isinstance(config, str) else {}
        return {"SPEC": {}} | dict(model)
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return {"SPEC": {}}


def _image_size(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return MODEL.IMAGE_SIZE of the run, if known."""
    try:
        height, width = model["IMAGE_SIZE"]
        return int(height), int(width)
    except (KeyError, TypeError, ValueError):
        return None


def _pos_resize(content: Mapping[str, Any], names: Iterable[str], layout: str, path: str | Path) -> str:
    """Return how the program that wrote a network resizes positions: `scale` for DINO and its descendants, else `size`.

    Checkpoints of DINO and UDI have `backbone.` in front of the ViT's names and heads beside it. The released backbones of DINO are
    bare state dicts without a head, in torch's format. Files of timm and DeiT have a classifier, lie under a key, are safetensors,
    or list timm's modules in the metadata of the state dict; backbones of this project store their rule in that metadata.
    """
    modules = getattr(content, "_metadata", None)
    modules = modules if isinstance(modules, Mapping) else {}
    metadata = modules.get("")
    if isinstance(metadata, Mapping) and metadata.get("pos_resize") in RULES:
        return str(metadata["pos_resize"])
    if "UDI" in layout:
        return "scale"
    wrapped = "backbone.pos_embed" in names
    if layout == "full checkpoint" or any(name.startswith("head.last_layer.") for name in names):
        return "scale" if wrapped else "size"
    is_bare = (
        layout == "bare state dict" and Path(path).suffix != ".safetensors" and not TIMM_ONLY_MODULES & modules.keys()
    )
    is_vit = all(name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")) for name in names)
    return "scale" if is_bare and is_vit else "size"


def criterion_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a published loss under this project's names.

    EsViT and DINO use the same names. UDI stores its centers as rows of one tensor (class tokens first, patches last), and a count
    that is zero between steps.
    """
    rows = published.get("centering.center")
    if rows is None:
        return dict(published)
    return {name: row[None] for name, row in zip((*CENTERS[: len(rows) - 1], "center_patch"), rows)}


def strip_prefix(name: str) -> str:
    """Return a name without the prefixes of `ONLINE` and `MOMENTUM` networks."""
    return NETWORK_PREFIX.sub("", name)


def published_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the published name of each tensor name of a file.

    Prefixes of wrappers are dropped, and the parametrized spelling of weight norm and abbreviated names of CvT are expanded. Names
    of UDI are converted to this project's, with a single head if the heads of all levels are equal.
    """
    named = {name: _published_spelling(WRAPPERS.sub(r"\1", name)) for name in state}
    if not any(strip_prefix(name).startswith(tuple(UDI_NAMES)) for name in named.values()):
        return named
    one_head = _heads_are_one({named[name]: tensor for name, tensor in state.items()})
    return {name: _convert_udi_name(spelled, one_head) for name, spelled in named.items()}


def _published_spelling(name: str) -> str:
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    return name.replace("rel_pos_bias_table", "relative_position_bias_table")


def _convert_udi_name(name: str, one_head: bool) -> str:
    inner = strip_prefix(name)
    part = next((part for part in UDI_NAMES if inner.startswith(part)), None)
    if part is not None:
        return f"srs.{UDI_NAMES[part]}{inner.removeprefix(part)}"
    return UDI_HEAD.sub("head.", name) if one_head else name


def _heads_are_one(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether UDI's heads of all levels have equal tensors."""
    first: dict[str, Tensor] = {}
    head_names = [name for name in tensors if UDI_HEAD.match(name)]
    return all(tensors[name].equal(first.setdefault(UDI_HEAD.sub("", name), tensors[name])) for name in head_names)


def match_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return, for each of the `published_names` of a file, the name of the network's own tensor; unknown names map to themselves.

    Of the published naming and that of timm or torchvision, the one that matches more tensors of the network is used.
    """
    inner = {name: name if name.startswith(METHOD_PREFIXES) else strip_prefix(name) for name in names}
    wanted = network.state_dict()
    namings: list[Callable[[str], str]] = [str, network.timm_name] if isinstance(network, Backbone) else [str]
    found = set(inner.values())
    best = max(namings, key=lambda naming: sum(strip_prefix(naming(name)) in found for name in wanted))
    ours = {strip_prefix(best(name)): name for name in wanted}
    return {name: ours.get(inside, name) for name, inside in inner.items()}


def parameter_names(network: nn.Module, student: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Return the parameters of a published student in the order of its file, which is the order of its optimizer.

    Buffers are left out, and so are all but the first name of a shared parameter (UDI's head of all levels, ViL's projections).

    Returns:
        For each name in the file, the name of the parameter of `network`, or None if there is none.
    """
    published = published_names(student)
    ours = match_names(network, published.values())
    parameters, buffers = dict(network.named_parameters(remove_duplicate=False)), dict(network.named_buffers())
    seen: set[object] = set()
    found: dict[str, str | None] = {}
    for name, tensor in student.items():
        our_name = ours[published[name]]
        parameter = parameters.get(our_name)
        same = id(parameter) if parameter is not None else (tensor.data_ptr(), tensor.shape)
        if our_name not in buffers and not name.endswith((*DERIVED, *STATISTICS)) and same not in seen:
            seen.add(same)
            found[name] = None if parameter is None else our_name
    return found
