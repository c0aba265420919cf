#!/usr/bin/env bash
# Install, pre-train a micro Swin on photographs on a CPU, and evaluate it. Downloads packages only.
# Run it again to resume an interrupted run, or to score a finished one again.
#   bash scripts/demo.sh
#   SEED=1 bash scripts/demo.sh                            another seed, in its own directory
#   RUN=.demo/views REGIONS=False bash scripts/demo.sh     views only, in directory RUN
#   RUN=.demo/vil ARCH=vil CFG=experiments/demo/vil_micro.yaml EPOCHS=2 TRAIN_ONLY=1 bash scripts/demo.sh
#                                                          another network, 2 epochs, only trained and scored by k-NN
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_requirements requirements.txt requirements-demo.txt

SEED=${SEED:-0} REGIONS=${REGIONS:-True} EPOCHS=${EPOCHS:-4}
ARCH=${ARCH:-swin} CFG=${CFG:-experiments/demo/swin_micro.yaml}
DATA=.demo/data
RUN=${RUN:-.demo/seed$SEED}
NETWORK=(--arch "$ARCH" --cfg "$CFG" --patch_size 8 --device cpu) # the patch size applies to ViT only
DATA_FLAGS=(--data_path "$DATA" --seed "$SEED")

"$PYTHON" -m data.demo "$DATA"

# One thread trains; a loader worker prepares the views on the other core.
OMP_NUM_THREADS=1 "$PYTHON" main_esvit.py "${NETWORK[@]}" "${DATA_FLAGS[@]}" --output_dir "$RUN" \
    --precision fp32 --batch_size_per_gpu 16 --num_workers 1 --use_dense_prediction "$REGIONS" --out_dim 1024 --head_hidden_dim 256 --head_bottleneck_dim 128 --use_bn_in_head True \
    --local_crops_number 4 --local_crops_size 32 --local_crops_scale 0.15 0.5 \
    --aug-opt deit_aug --aa "" --color-jitter 0.4 --reprob 0 --drop_path 0 \
    --epochs "$EPOCHS" --warmup_epochs 1 --lr 0.016 --momentum_teacher 0.98 --warmup_teacher_temp 0.05 --teacher_temp 0.05

# Score the student: after a few hundred steps the teacher, whose momentum grows to 1, still lags behind it.
"$PYTHON" eval_knn.py "${NETWORK[@]}" "${DATA_FLAGS[@]}" --output_dir "$RUN" \
    --pretrained_weights "$RUN/checkpoint.pth" --checkpoint_key student --crop_ratio 1 --baselines --nb_knn 1 20

[ -z "${TRAIN_ONLY:-}" ] || exit 0

WEIGHTS=(--pretrained_weights "$RUN/checkpoint.pth" --checkpoint_key student)
"$PYTHON" eval_linear.py "${NETWORK[@]}" "${DATA_FLAGS[@]}" "${WEIGHTS[@]}" --output_dir "$RUN/linear" --cache_features --crop_ratio 1 \
    --lr 0.01 0.1 1 --n_last_blocks 1 4 --num_workers 1

# At 128 pixels the shifted windows of block 3 are large enough to show structure.
PHOTOS=$("$PYTHON" -c 'import pathlib, importlib.util as u; print(pathlib.Path(u.find_spec("skimage").origin).parent / "data")')
printf '%s\n' "$PHOTOS/astronaut.png" "$PHOTOS/coffee.png" >.demo/photos.txt
PICTURES=("${NETWORK[@]}" "${WEIGHTS[@]}" --output_dir "$RUN/analysis")
if [ ! -e "$RUN/analysis/report.html" ]; then
    "$PYTHON" run_analysis.py "${PICTURES[@]}" --measure_stereo
    "$PYTHON" run_analysis.py "${PICTURES[@]}" --report --run_dir "$RUN" --image_path .demo/photos.txt --image_size 128 --block 3
fi

cat <<END

The task is to tell which of 20 photographs a 64-pixel crop was taken from. Training crops come from the left 60 % of each
photograph, validation crops from the right 40 %; no pixel is shared. Features are frozen, and training used no labels.
  scores       $RUN/results/knn.json, $RUN/linear/results/linear.json, $RUN/analysis/results/stereo.json
  report       $RUN/analysis/report.html (curves, scores, attention, correspondences, features; opens offline)
  run          $RUN/log.txt (one JSON object per epoch), checkpoint.pth, config.yaml, run.json
  crops        $RUN/crops.png (a sample of the views)
  curves       .venv/bin/tensorboard --logdir $RUN
END
