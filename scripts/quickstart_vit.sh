#!/usr/bin/env bash
# From a fresh machine to a report: a small vision transformer on scikit-learn's handwritten digits, trained on 2 CPU processes
# with AlphaDecay and with uniform weight decay. Under 5 minutes on 2 cores after the installation.
#
#   bash scripts/quickstart_vit.sh [FOLDER]     the runs go to FOLDER (default runs/quickstart_vit); a finished run is not repeated
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

folder="${1:-runs/quickstart_vit}"
export WANDB_MODE="${WANDB_MODE:-offline}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The digits are 8 x 8 pixels: an augmentation made for photographs would leave nothing of them.
train() {
    torchrun --standalone --nproc_per_node=2 main_vit.py \
        --model deit_tiny_patch16_224 --model_kwargs patch_size=4 depth=4 embed_dim=64 num_heads=2 --data_set digits --input_size 32 \
        --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 --num_workers 0 --seed 5 \
        --batch_size 16 --epochs 30 --warmup_epochs 3 --lr 2e-3 --weight_decay 5e-6 --save_ckpt_freq 10 \
        --output_dir "$folder/$1" --name "quickstart-vit-$1" "${@:2}"
}

echo "== 1 of 2: AlphaDecay"
train alphadecay --use_modulewise_wd --alpha_positively_with_WD --unbalancedWD_every 100 --wd_min_ratio 0.6666 --wd_max_ratio 3
echo "== 2 of 2: uniform weight decay"
train uniform

report=$(python -m peft_pretraining.report "$folder/alphadecay" "$folder/uniform" --output "$folder/report.html")
python - "$folder" <<'PYTHON'
import json, sys
print()
for method in ("alphadecay", "uniform"):
    with open(f"{sys.argv[1]}/{method}/metrics.jsonl", encoding="utf8") as file:
        final = [r for r in map(json.loads, file) if r.get("final")][-1]
    print(f"{method:<12} top-1 {final['top1']:.2f} % (loss {final['eval_loss']:.4f}, {final['eval_images']} images)")
PYTHON
echo "report: $report"
