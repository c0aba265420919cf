#!/usr/bin/env bash
# Train UDI on the photographs of scripts/demo.sh: a micro ViT with two class tokens, scored by k-NN.
# Run it again to resume an interrupted run, or to score a finished one again.
#   bash scripts/demo_udi.sh
#   SEED=1 bash scripts/demo_udi.sh      another seed, in its own directory
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_requirements requirements.txt requirements-demo.txt

SEED=${SEED:-0} EPOCHS=${EPOCHS:-7}
DATA=.demo/data
RUN=${RUN:-.demo/udi-seed$SEED}
NETWORK=(--arch vit --cfg experiments/demo/udi_micro.yaml --patch_size 8 --device cpu)
DATA_FLAGS=(--data_path "$DATA" --seed "$SEED")

"$PYTHON" -m data.demo "$DATA"

# One thread trains; a loader worker prepares the views on the other core.
OMP_NUM_THREADS=1 "$PYTHON" main_udi.py "${NETWORK[@]}" "${DATA_FLAGS[@]}" --output_dir "$RUN" \
    --precision fp32 --batch_size_per_gpu 16 --num_workers 1 --out_dim 1024 --head_hidden_dim 256 --head_bottleneck_dim 128 --use_bn_in_head True \
    --local_crops_number 4 --local_crops_size 32 --local_crops_scale 0.15 0.5 --color-jitter 0.2 --drop_path_rate 0 \
    --epochs "$EPOCHS" --warmup_epochs 1 --lr 0.016 --momentum_teacher 0.98 \
    --warmup_teacher_temp 0.05 --teacher_temp 0.05 --warmup_teacher_temp_epochs 0

# Score the student: after a few hundred steps the teacher, whose momentum grows to 1, still lags behind it.
"$PYTHON" eval_knn.py "${NETWORK[@]}" "${DATA_FLAGS[@]}" --output_dir "$RUN" \
    --pretrained_weights "$RUN/checkpoint.pth" --checkpoint_key student --crop_ratio 1 --baselines --nb_knn 1 20

cat <<END

The task is to tell which of 20 photographs a 64-pixel crop was taken from. Training crops come from the left 60 % of each
photograph, validation crops from the right 40 %; no pixel is shared. Features are frozen first class tokens; training used no labels.
  scores       $RUN/results/knn.json
  run          $RUN/log.txt (one JSON object per epoch), checkpoint.pth, config.yaml, run.json
  crops        $RUN/crops.png (a sample of the views)
END
