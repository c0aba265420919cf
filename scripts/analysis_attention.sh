#!/usr/bin/env bash
# Attention of the heads of the last block, as in the figures of the paper: an overview and single pictures of each image.
#   bash scripts/analysis_attention.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   bash scripts/analysis_attention.sh swin_tiny /runs/swin_tiny/checkpoint.pth photo.jpg OUT
# IMAGES is an image, or a folder from which four are selected (--num_images). --query X Y selects the pixel of the query, --block the
# layer, --threshold the share of the attention that masks keep, 0.6 as published.
# The patch size of deit_small and other plain transformers is 16 as in training (run_analysis.py alone: 8).
# Nothing in OUT is overwritten. Flags at the end override those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
GPUS=1  # few images
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --image_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --vis_attention --threshold 0.6
