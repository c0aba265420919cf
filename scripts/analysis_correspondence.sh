#!/usr/bin/env bash
# The ten most similar pairs of regions of two views, and the region most similar to each view's feature: the paper's figure 6.
#   bash scripts/analysis_correspondence.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   bash scripts/analysis_correspondence.sh swin_tiny /runs/swin_tiny/checkpoint.pth photo.jpg OUT
# IMAGES is an image, or a folder of which four are taken (--num_images). The views are saved in OUT: with --use_saved_aug another
# network is shown the same ones. --image_path2 FILE takes a second image in place of a second view.
# Patches of deit_small and other plain transformers are of 16 pixels as in training (run_analysis.py alone: 8).
# Nothing in OUT is overwritten. Flags given at the end win over those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
GPUS=1  # few images
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --image_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --vis_correspondence
