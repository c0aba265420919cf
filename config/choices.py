"""Allowed values and defaults that command-line flags share with the modules behind them.

Defined here rather than in those modules, so that parsing a command line does not import torch.
"""

from __future__ import annotations

PATCH_SIZE = 16  # pixels, for architectures whose config has no PATCH_SIZE
TOKENS = {"cls": (0,), "cls+": (1,), "both": (0, 1)}  # --token: indices of the class tokens in the view feature

OPTIMIZERS = ("adamw", "sgd", "lars")
MAX_BAD_STEPS = 20  # consecutive steps with a non-finite loss or gradient

# --aug_backend. pil: every view by PIL in the workers; split: crops in the workers, colors in batches on the device
AUG_BACKENDS = ("auto", "pil", "split")

# --decode. full: whole images; scaled: JPEG files at a fraction of their size if that upsamples no crop
DECODES = ("full", "scaled")

CENTERINGS = ("mean", "sinkhorn")  # of the teacher's logits: EMA of their mean, or Sinkhorn-Knopp over the batch

# UDI
TARGET_MIXES = ("logits", "probs")
LEVELS = ("cl", "mcl", "pch")  # class token, second class token, patches: their names in the log
PAIR_MODES = ("overlap", "nested")
REFERENCES = ("intersection", "union")  # of the global views: the region that local views overlap
DRAWINGS = ("image", "view", "fixed")
# Positions of tokens: outer ones on the edge of the crop (as published), or cell centers.
ALIGNMENTS = ("corners", "centers")

KNN_BACKENDS = ("torch", "faiss")
PROJECTIONS = ("pca", "tsne", "umap")

# Label propagation in videos, as in DINO
VIDEO_LAST_FRAMES = 7
VIDEO_RADIUS = 12  # regions
VIDEO_TOP = 5
VIDEO_TEMPERATURE = 0.1
