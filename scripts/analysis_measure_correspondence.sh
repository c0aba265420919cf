#!/usr/bin/env bash
# Accuracy and distance error of matching regions to a flipped and recolored copy of each image, over a folder, as in the paper.
#   bash scripts/analysis_measure_correspondence.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   GPUS=4 bash scripts/analysis_measure_correspondence.sh swin_tiny /runs/swin_tiny/checkpoint.pth /data/imagenet OUT
# IMAGES is ImageNet (its validation images are used) or any folder of images. OUT gets results/correspondence.json.
# The patch size of deit_small and other plain transformers is 16 as in training (run_analysis.py alone: 8).
# Flags at the end override those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
count_gpus
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --data_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --measure_correspondence
