"""The folder of a network for Hugging Face: config.json, model.safetensors, preprocessor_config.json and README.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from checkpoints.serialization import is_safetensors, load_file
from models.huggingface import HubModel

CROP_RATIO = 0.875  # of the evaluation transform: 224 of 256 pixels
BICUBIC = 3  # in Pillow's numbering

CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [self-supervised, esvit]
license: other  # to be chosen by the author of the weights
---

# {title}

An image backbone, pre-trained without labels. It has no classifier.

| | |
| --- | --- |
| Network | {network}, {millions:.1f} million parameters |
| Method | {method} |
| Data | {data} |
| Images | RGB, {height} x {width} pixels |
| Normalization | mean {mean}, standard deviation {std}, of values in 0..1 |
| License of the weights | not stated: the author of the weights fills it in, here and above |

```python
from transformers import AutoImageProcessor, AutoModel
model, processor = AutoModel.from_pretrained(FOLDER), AutoImageProcessor.from_pretrained(FOLDER)
```

`model(**processor(images, return_tensors="pt"))` returns `last_hidden_state`, the normalized features of the regions, and
`pooler_output`, the feature of the image.{notes}
"""
NOTES = {
    "swin": """

- Use images of the size above. For smaller ones transformers shrinks the windows, and they stay so for all images that follow.
- The LayerNorms of patch merging have eps 1e-5 in transformers and were trained with 1e-6, which changes features by about 1e-5 of
  their size. To remove this: `for layer in model.encoder.layers[:-1]: layer.downsample.norm.eps = 1e-6`.""",
    "vit": """

- For images of another size pass `interpolate_pos_encoding=True` to the model.
- The pooler is an identity: `pooler_output` is the class token of `last_hidden_state`.""",
    "timm_wrapper": """

- The network is timm's, in the wrapper of transformers: `pip install timm`.""",
}


def write_folder(
    folder: Path, network: HubModel, title: str, images: Mapping[str, Any], weights: str | Path | None
) -> None:
    """Write the files of a network into an empty folder.

    Args:
        images: `checkpoints.exports.preprocessing`.
        weights: the checkpoint that was loaded, whose arguments name data and method.
    """
    safetensors.torch.save_file(network.state, folder / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", network.config | {"dtype": "float32"}),
        ("preprocessor_config.json", processor_config(images)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(network, title, images, weights))


def processor_config(images: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image processor that comes nearest to the evaluation transform: resize the short side, crop the center."""
    height, width = images["image_size"]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(images["mean"]) == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(max(height, width) / CROP_RATIO)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images["mean"],
        "image_std": images["std"],
    }


def model_card(network: HubModel, title: str, images: Mapping[str, Any], weights: str | Path | None) -> str:
    """Return the README of a network."""
    method, data = training_of(weights)
    kind = network.config["model_type"]
    height, width = images["image_size"]
    return CARD.format(
        title=title,
        network=network.config.get("architecture", network.config["architectures"][0]),
        millions=sum(tensor.numel() for tensor in network.state.values()) / 1e6,
        method=method,
        data=data,
        height=height,
        width=width,
        mean=images["mean"],
        std=images["std"],
        notes=NOTES.get(kind, ""),
    )


def training_of(weights: str | Path | None) -> tuple[str, str]:
    """Return method and data of a training, from the arguments in its full checkpoint."""
    unknown = "not stated in the weights; fill it in"
    content = load_file(weights, mapped=True, checked=False) if weights and not is_safetensors(weights) else {}
    args = content.get("args")
    if not isinstance(args, argparse.Namespace):
        return unknown, unknown
    if "udi_loss" in content:
        method = "UDI (Su and Ji, ECCV 2024)"
    else:
        dense = getattr(args, "use_dense_prediction", False)
        method = f"EsViT (Li et al., ICLR 2022), {'views and regions' if dense else 'views'}"
    epoch, epochs = content.get("epoch"), getattr(args, "epochs", None)
    folder = Path(str(getattr(args, "data_path", ""))).name
    return f"{method}; {epoch} of {epochs} epochs" if epochs else method, folder or unknown
