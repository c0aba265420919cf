#!/usr/bin/env bash
# Entropy of the attention of every head by layer over a folder of images: the plot of the paper, and its numbers as JSON.
#   bash scripts/analysis_entropy.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   GPUS=4 bash scripts/analysis_entropy.sh swin_tiny /runs/swin_tiny/checkpoint.pth /data/imagenet OUT
# IMAGES is ImageNet (its validation images are used) or any folder of images. The numbers do not depend on GPUS or the batch size.
# The patch size of deit_small and other plain transformers is 16 as in training (run_analysis.py alone: 8).
# Nothing in OUT is overwritten. Flags at the end override those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
count_gpus
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --data_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --vis_entropy
