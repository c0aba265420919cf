#!/usr/bin/env bash
# Pre-train on SLURM, one task per GPU. A job that runs out of time saves, is requeued and resumes.
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 scripts/pretrain_slurm.sh --arch swin_tiny --data_path IMAGES \
#       --output_dir OUT [flags of main_esvit.py]
#   SCRIPT=main_udi.py sbatch ... scripts/pretrain_slurm.sh [flags of main_udi.py]      another script
# Submit it from the repository root, or set ESVIT_ROOT to it; PYTHON sets the interpreter.
# 120 seconds before the time limit, SLURM sends USR1 to this shell, which forwards it: all processes finish their step, save and exit
# with code 0. The job is then requeued unless all epochs are done. A failed run is not requeued. SLURM itself requeues after preemption
# and node failures (--requeue). scancel ends the job for good.
#SBATCH --job-name=esvit
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=esvit-%j.log
set -euo pipefail

fail() {
    echo "pretrain_slurm.sh: error: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "SLURM_JOB_ID is not set; start this script with sbatch, or use scripts/pretrain.sh"
ROOT=${ESVIT_ROOT:-${SLURM_SUBMIT_DIR:-.}}
SCRIPT=${SCRIPT:-main_esvit.py}
[ -f "$ROOT/$SCRIPT" ] || fail "$ROOT has no $SCRIPT; submit from the repository root or set ESVIT_ROOT"
PYTHON=${PYTHON:-python}

OUT=
previous=
for word in "$@"; do
    [ "$previous" != --output_dir ] || OUT=$word
    [[ $word != --output_dir=* ]] || OUT=${word#*=}
    previous=$word
done
[ -n "$OUT" ] || fail "--output_dir OUT is needed; a requeued job resumes from it"

# Whether log.txt contains the last epoch requested by the newest run.json.
done_all() {
    "$PYTHON" - "$OUT" <<'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
try:
    newest = max(folder.glob("run*.json"), key=lambda path: path.stat().st_mtime)
    epochs = json.loads(newest.read_text())["args"]["epochs"]
    last = json.loads((folder / "log.txt").read_text().splitlines()[-1])["epoch"]
except (OSError, ValueError, KeyError, IndexError):
    sys.exit(1)
sys.exit(last + 1 < epochs)
PYTHON
}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
export MASTER_ADDR MASTER_PORT

interrupted=
srun --kill-on-bad-exit=1 "$PYTHON" "$ROOT/$SCRIPT" "$@" &
run=$!
trap 'interrupted=yes; echo "time limit is near: signaling the processes to save"; kill -USR1 "$run" 2>/dev/null || true' USR1
trap : TERM # SLURM signals the job steps too; wait until they have saved

# `wait` returns early on a trapped signal.
status=0
while kill -0 "$run" 2>/dev/null; do
    wait "$run" || true
done
wait "$run" || status=$?

if [ "$status" -ne 0 ]; then
    echo "$SCRIPT ended with code $status; the job is not requeued" >&2
elif [ -n "$interrupted" ] && ! done_all; then
    echo "requeueing job $SLURM_JOB_ID, start number $((${SLURM_RESTART_COUNT:-0} + 2)) resumes $OUT"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
