#!/usr/bin/env bash
# From a fresh machine to a report: a small vision transformer on scikit-learn's handwritten digits,
# trained on 2 CPU processes without weight decay, with uniform decay and with AlphaDecay.
# Less than 5 minutes on 2 idle cores, after the installation.
#
#   bash scripts/quickstart_vit.sh [FOLDER]
#
# FOLDER (default runs/quickstart_vit) takes the runs. SEED=N sets another seed than 5.
# Finished steps are not repeated, and an interrupted run continues. The output of each step is in
# FOLDER/STEP.log.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    --help | -h) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "scripts/quickstart_vit.sh"; exit ;;
    -*) echo "error: unknown option $1; the only argument is the folder, see --help" >&2; exit 2 ;;
esac
[ $# -lt 2 ] || { echo "error: one folder is enough, not $#; see --help" >&2; exit 2; }
source scripts/environment.sh

folder="${1:-runs/quickstart_vit}" seed="${SEED:-5}" measured=results/quickstart/vit.json
export WANDB_MODE="${WANDB_MODE:-offline}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# step NAME TITLE PRODUCT COMMAND...: print a progress line and run the command, once.
step() { python scripts/quickstart.py step "$folder" "$measured" "$@"; }

# train METHOD TITLE FLAGS...
# The digits are 8 x 8 pixels: an augmentation made for photographs would leave nothing of them.
train() {
    step "$1" "$2" "$folder/$1/report.html" torchrun --standalone --nproc_per_node=2 \
        main_vit.py --model deit_tiny_patch16_224 \
        --model_kwargs patch_size=4 depth=4 embed_dim=64 num_heads=2 \
        --data_set digits --input_size 32 --num_workers 0 \
        --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 --seed "$seed" \
        --batch_size 16 --epochs 20 --warmup_epochs 2 --lr 2e-3 --save_ckpt_freq 10 \
        --output_dir "$folder/$1" --name "quickstart-vit-$1" --method "$1" "${@:3}"
}

train wd0 "train without decay"
train uniform "train with uniform decay" --weight_decay 5e-6
train alphadecay "train with AlphaDecay" --weight_decay 5e-6 \
    --unbalancedWD_every 100 --wd_min_ratio 0.6666 --wd_max_ratio 3

runs=("$folder/wd0" "$folder/uniform" "$folder/alphadecay")
step report "write the report" "$folder/report.html" \
    python -m peft_pretraining.report "${runs[@]}" --output "$folder/report.html"
echo
python scripts/quickstart.py results "$folder" "$measured"
echo "report: $folder/report.html"
