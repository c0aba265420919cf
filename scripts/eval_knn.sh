#!/usr/bin/env bash
# k-NN on ImageNet, the second number in the results of README: 75.7 % top-1 for Swin-T, window 7, views and regions.
#   bash scripts/eval_knn.sh ARCH IMAGENET CHECKPOINT OUT [flags of eval_knn.py]
#   GPUS=4 bash scripts/eval_knn.sh swin_tiny /data/imagenet /runs/swin_tiny/checkpoint.pth /runs/swin_tiny
#   bash scripts/eval_knn.sh swin_tiny /data/imagenet_zips ... --zip_mode
#   bash scripts/eval_knn.sh deit_small ... -- MODEL.SPEC.NUM_CLS_TOKENS 2 MODEL.SPEC.POS_RESIZE scale       UDI's ViT-S: 75.6 %
# 10, 20, 100 and 200 neighbors with temperature 0.07; 20 is the published number. The scores do not depend on GPUS or the batch size.
# OUT gets results/knn.json. Flags at the end override those here.
USAGE="ARCH IMAGENET CHECKPOINT OUT [flags of eval_knn.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
count_gpus
launch eval_knn.py --arch "$ARCH" --data_path "$IMAGENET" --pretrained_weights "$CHECKPOINT" --output_dir "$OUT" \
    --checkpoint_key teacher --temperature 0.07 --batch_size_per_gpu 256 --nb_knn 10 20 100 200
