"""Layouts of published checkpoints: which network of a file is taken, and what its tensors are called here.

A network lies under a key, or the file is one; its names have words before them that say how it was wrapped, and each project
spells the parts beside a backbone its own way. What is read:

| program | words before names | beside the backbone |
| --- | --- | --- |
| torch | `module.`, `_orig_mod.`, anywhere and repeated | |
| EsViT | none (ResNet: `backbone.backbone.`) | `head.`, `head_dense.` |
| DINO, iBOT | `backbone.` | `head.` |
| UDI | `backbone.backbone.`; its extraction script: `backbone.` | `head.N.`, `backbone.norm1.`, `backbone.attn.` |
| MoCo, MoBY | `encoder.`, `base_encoder.`, `encoder_q.`; momentum: `momentum_encoder.`, `encoder_k.` | projectors, queues |
| MAE, timm, torchvision, Swin, DeiT | none, `encoder.` | decoder, linear classifier |

Origin: this project's own, from the names that the files of these programs have.
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
from models.srs import PUBLISHED as OF_SRS
from utils import UsageError

WRAPPING_KEYS = ("model", "state_dict")  # where timm, Swin, DeiT and others keep a network
WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod)\.)+")  # DistributedDataParallel, torch.compile
ONLINE = ("backbone", "encoder", "base_encoder", "online_encoder", "encoder_q", "student")
MOMENTUM = ("momentum_encoder", "momentum_backbone", "target_encoder", "encoder_k", "teacher")
INSIDE = re.compile(rf"^(?:(?:{'|'.join((*ONLINE, *MOMENTUM))})\.)+")
IN_MOMENTUM = re.compile(rf"^(?:(?:{'|'.join(ONLINE)})\.)*(?:{'|'.join(MOMENTUM)})\.")
UDI_HEAD = re.compile(r"^head\.\d+\.")  # their one head, kept once a level
# Other tensors that programs train beside a backbone: linear classifiers, projectors and queues, decoders and masks.
PARTS = (
    *("fc.", "head_dist.", "classifier."),
    *("projector", "momentum_projector", "predictor", "queue"),
    *("decoder", "mask_token", "masked_embed"),
)
OF_TIMM = {"norm_pre", "fc_norm", "head_drop", "pre_logits"}  # modules of its ViT that DINO's has not
CENTERS = ("center", "center_plus")  # of UDI's class tokens in their order; the patches' are the last
# Buffers that the architecture computes itself; older files have the masks.
DERIVED = ("relative_position_index", "rel_pos_idx", "attn_mask")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class NetworkState(NamedTuple):
    """The tensors of one network in a file, and where they were found."""

    tensors: dict[str, Tensor]
    layout: str
    key: str | None
    image_size: tuple[int, int] | None = None  # MODEL.IMAGE_SIZE of the run, where the file tells
    pos_resize: str | None = (
        None  # how its program resizes positions, one of `models.resize.RULES`, where the file tells
    )


def network_state(content: Mapping[str, Any], key: str, path: str | Path) -> NetworkState:
    """The network of a file under its `published_names`: `key` of a full checkpoint, what lies under `model`, or all of a bare one.

    Of an online and a momentum network side by side (MoCo, MoBY) it is the online one for the key `student`, else the other.

    Raises:
        UsageError: a full checkpoint without `key`, or content that is no state dict.
    """
    layout, found_under, whole = "bare state dict", None, content
    if "student" in content or "teacher" in content:
        if key not in content:
            raise UsageError(
                f"checkpoint '{path}' has no network '{key}'; name one that it has: "
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
    others = _of_the_other_network(names.values(), key)
    if others:
        layout += f", its {'online' if key == 'student' else 'momentum'} network"
    kept = {names[name]: tensor for name, tensor in tensors.items() if names[name] not in others}
    model = _saved_model(whole)
    rule = model["SPEC"].get("POS_RESIZE") if isinstance(model["SPEC"], dict) else None
    rule = rule or _pos_resize(content, kept, layout, path)
    return NetworkState(vit_from_timm(kept), layout, found_under, _image_size(model), rule)


def _of_the_other_network(names: Iterable[str], key: str) -> set[str]:
    """Where a file holds an online and a momentum network: the names of that which `key` does not mean."""
    momentum = {name for name in names if IN_MOMENTUM.match(name)}
    online = {name for name in names if name not in momentum}
    if not {bare(name) for name in momentum} & {bare(name) for name in online if bare(name) != name}:
        return set()
    return momentum if key == "student" else {name for name in online if bare(name) != name}


def _saved_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this project says of its network, the group MODEL of its config; nothing of other files."""
    config = content.get("config")
    try:
        model = yaml.safe_load(config)["MODEL"] if isinstance(config, str) else {}
        return {"SPEC": {}} | dict(model)
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return {"SPEC": {}}


def _image_size(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """MODEL.IMAGE_SIZE of the run, where the file tells."""
    try:
        height, width = model["IMAGE_SIZE"]
        return int(height), int(width)
    except (KeyError, TypeError, ValueError):
        return None


def _pos_resize(content: Mapping[str, Any], names: Iterable[str], layout: str, path: str | Path) -> str:
    """How the program that made a network resizes its positions: by `scale` in DINO and what descends from it.

    Its checkpoints and UDI's have `backbone.` before the ViT's names and heads beside it. The released backbones of DINO are bare
    state dicts without any head, in torch's format; those of timm and DeiT have a classifier, lie under a key, are safetensors, or
    name modules of timm's in what torch keeps with a state dict. So kept, backbones of this project tell their rule.
    """
    modules = getattr(content, "_metadata", None)
    modules = modules if isinstance(modules, Mapping) else {}
    told = modules.get("")
    if isinstance(told, Mapping) and told.get("pos_resize") in RULES:
        return str(told["pos_resize"])
    if "UDI" in layout:
        return "scale"
    in_wrapper = "backbone.pos_embed" in names
    if layout == "full checkpoint" or any(name.startswith("head.last_layer.") for name in names):
        return "scale" if in_wrapper else "size"
    alone = layout == "bare state dict" and Path(path).suffix != ".safetensors" and not OF_TIMM & modules.keys()
    of_vit = all(name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")) for name in names)
    return "scale" if alone and of_vit else "size"


def criterion_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a published loss under this project's names.

    EsViT's and DINO's are the same here. UDI has its centers as rows of one tensor, those of the class tokens first and that of the
    patches last, and a count that is zero between two steps.
    """
    rows = published.get("centering.center")
    if rows is None:
        return dict(published)
    return {name: row[None] for name, row in zip((*CENTERS[: len(rows) - 1], "center_patch"), rows)}


def bare(name: str) -> str:
    """A name without the words that say which network it is of."""
    return INSIDE.sub("", name)


def published_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name of a network as a file has it, with its name here, but for what depends on the network that takes it.

    Wrappers are left out, weight norm in torch's parametrized spelling and CvT's tables get the published names, and a network of
    UDI's files gets this project's, with one head where those of all levels are equal.
    """
    named = {name: _published_spelling(WRAPPERS.sub(r"\1", name)) for name in state}
    if not any(bare(name).startswith(tuple(OF_SRS)) for name in named.values()):
        return named
    one_head = _heads_are_one({named[name]: tensor for name, tensor in state.items()})
    return {name: _from_udi(spelled, one_head) for name, spelled in named.items()}


def _published_spelling(name: str) -> str:
    """`parametrizations.weight.original0` and `1` of torch >= 2 are gain and direction; EsViT's CvT abbreviates its tables."""
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    return name.replace("rel_pos_bias_table", "relative_position_bias_table")


def _from_udi(name: str, one_head: bool) -> str:
    inner = bare(name)
    part = next((part for part in OF_SRS if inner.startswith(part)), None)
    if part is not None:
        return f"srs.{OF_SRS[part]}{inner.removeprefix(part)}"
    return UDI_HEAD.sub("head.", name) if one_head else name


def _heads_are_one(tensors: Mapping[str, Tensor]) -> bool:
    """Whether UDI's heads of all levels have equal tensors."""
    first: dict[str, Tensor] = {}
    of_heads = [name for name in tensors if UDI_HEAD.match(name)]
    return all(tensors[name].equal(first.setdefault(UDI_HEAD.sub("", name), tensors[name])) for name in of_heads)


def in_our_names(network: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each of the `published_names` of a file, with the name of the network's own tensor; others stay as they are.

    Of the published names and those of timm and torchvision those count that fit most of the network's tensors.
    """
    inner = {name: name if name.startswith(METHOD_PREFIXES) else bare(name) for name in names}
    wanted = network.state_dict()
    namings: list[Callable[[str], str]] = [str, network.timm_name] if isinstance(network, Backbone) else [str]
    found = set(inner.values())
    best = max(namings, key=lambda naming: sum(bare(naming(name)) in found for name in wanted))
    ours = {bare(best(name)): name for name in wanted}
    return {name: ours.get(inside, name) for name, inside in inner.items()}


def parameter_names(network: nn.Module, student: Mapping[str, Tensor]) -> dict[str, str | None]:
    """The parameters of a published student in the order of its file, which is that of its program's optimizer.

    Buffers are left out, and of a parameter that the program uses under several names (UDI's one head of all levels, ViL's shared
    projections) all but the first.

    Args:
        network: not wrapped.
        student: of the file, with the names as it has them.

    Returns:
        names of the file, each with the name of the same parameter of `network`; None where it has no such.
    """
    published = published_names(student)
    ours = in_our_names(network, published.values())
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
