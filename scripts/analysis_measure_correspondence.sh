#!/usr/bin/env bash
# How often regions find their place in the flipped and recolored image, over a folder: the paper's accuracy and distance error.
#   bash scripts/analysis_measure_correspondence.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   GPUS=4 bash scripts/analysis_measure_correspondence.sh swin_tiny /runs/swin_tiny/checkpoint.pth /data/imagenet OUT
# IMAGES is ImageNet (its validation images are taken) or any folder of images. OUT gets correspondence.json.
# Patches of deit_small and other plain transformers are of 16 pixels as in training (run_analysis.py alone: 8).
# Nothing in OUT is overwritten. Flags given at the end win over those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
count_gpus
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --data_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --measure_correspondence
