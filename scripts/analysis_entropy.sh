#!/usr/bin/env bash
# Entropy of the attention of every head by layer, over a folder of images: the paper's plot, and the numbers as JSON.
#   bash scripts/analysis_entropy.sh ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]
#   GPUS=4 bash scripts/analysis_entropy.sh swin_tiny /runs/swin_tiny/checkpoint.pth /data/imagenet OUT
# IMAGES is ImageNet (its validation images are taken) or any folder of images. The figures depend neither on the number of GPUS
# nor on the batch.
# Patches of deit_small and other plain transformers are of 16 pixels as in training (run_analysis.py alone: 8).
# Nothing in OUT is overwritten. Flags given at the end win over those here.
USAGE="ARCH CHECKPOINT IMAGES OUT [flags of run_analysis.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
count_gpus
launch run_analysis.py --arch "$ARCH" --pretrained_weights "$CHECKPOINT" --data_path "$IMAGES" --output_dir "$OUT" \
    --patch_size 16 --checkpoint_key teacher --vis_entropy
