#!/usr/bin/env bash
# The ten most similar pairs of regions of two views, and the region most similar to each view feature: figure 6 of the paper.
#   bash scripts/analysis_correspondence.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   bash scripts/analysis_correspondence.sh swin_tiny /runs/swin_tiny/checkpoint.pth photo.jpg OUT
# IMAGES is an image, or a folder from which four are selected (--num_images). The views are saved in OUT; --use_saved_aug uses them for
# another network. --image_path2 FILE compares with a second image instead of a second view.
# The patch size of deit_small and other plain transformers is 16 as in training (run_analysis.py alone: 8).
# Nothing in OUT is overwritten. Flags at the end override those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
GPUS=1  # few images
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --image_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --vis_correspondence
