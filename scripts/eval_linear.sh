#!/usr/bin/env bash
# Linear probe on ImageNet, the first number in the results of README: 78.0 % top-1 for Swin-T, window 7, views and regions.
#   bash scripts/eval_linear.sh ARCH IMAGENET CHECKPOINT OUT [flags of eval_linear.py]
#   GPUS=4 bash scripts/eval_linear.sh swin_tiny /data/imagenet /runs/swin_tiny/checkpoint.pth /runs/swin_tiny/linear
#   bash scripts/eval_linear.sh vit_base ... --n_last_blocks 1 --avgpool_patchtokens True             DINO's setting for ViT-B
#   bash scripts/eval_linear.sh deit_small ... --train_aug strong --lr 0.02 -- MODEL.SPEC.NUM_CLS_TOKENS 2 MODEL.SPEC.POS_RESIZE scale
#       UDI's setting: 77.6 % for its ViT-S after 300 epochs, not comparable with results without this augmentation
#   bash scripts/eval_linear.sh swin_tiny ... --lr 0.0003 0.001 0.003                                 a classifier for each rate
# The last four blocks, 100 epochs with 1024 images a step (BATCH) on any number of GPUS, learning rate 0.001 for 256 images, thus 0.004.
# OUT gets results/linear.json, log.txt and checkpoint.pth.tar; the same command resumes a run that was killed. Flags at the end
# override those here.
USAGE="ARCH IMAGENET CHECKPOINT OUT [flags of eval_linear.py]"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
take "$@"
BATCH=${BATCH:-1024}
count_gpus
numbers BATCH
[ $((BATCH % GPUS)) -eq 0 ] || usage "BATCH=$BATCH is no multiple of GPUS=$GPUS; change one of them"
launch eval_linear.py --arch "$ARCH" --data_path "$IMAGENET" --pretrained_weights "$CHECKPOINT" --output_dir "$OUT" \
    --checkpoint_key teacher --n_last_blocks 4 --epochs 100 --lr 0.001 --batch_size_per_gpu $((BATCH / GPUS))
