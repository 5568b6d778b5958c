#!/usr/bin/env bash
# From a fresh machine to a report: a small LLaMA on the docstrings of the installed packages, trained on 2 CPU processes
# with AlphaDecay and with uniform weight decay. Under 12 minutes on 2 cores after the installation.
#
#   bash scripts/quickstart.sh [FOLDER]     the runs go to FOLDER (default runs/quickstart); a finished run is not repeated
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

folder="${1:-runs/quickstart}"
export WANDB_MODE="${WANDB_MODE:-offline}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

train() {
    torchrun --standalone --nproc_per_node=2 torchrun_main.py \
        --model_config configs/llama_2m.json --dataset pydocs --tokenizer bpe --max_length 128 \
        --optimizer adam --lr 3e-3 --weight_decay 1e-5 --dtype float32 --seed 5 \
        --batch_size 16 --total_batch_size 32 --num_training_steps 800 --eval_every 200 --save_every 400 \
        --save_dir "$folder/$1" --name "quickstart-$1" --continue_from auto "${@:2}"
}

echo "== 1 of 2: AlphaDecay"
train alphadecay --use_modulewise_wd --alpha_positively_with_WD --unbalancedWD_every 50 --wd_min_ratio 0.6666 --wd_max_ratio 3
echo "== 2 of 2: uniform weight decay"
train uniform

report=$(python -m peft_pretraining.report "$folder/alphadecay" "$folder/uniform" --output "$folder/report.html")
python - "$folder" <<'PYTHON'
import json, sys
print()
for method in ("alphadecay", "uniform"):
    with open(f"{sys.argv[1]}/{method}/metrics.jsonl", encoding="utf8") as file:
        final = [r for r in map(json.loads, file) if r.get("final")][-1]
    print(f"{method:<12} validation perplexity {final['perplexity']:.2f} (loss {final['eval_loss']:.4f}, {final['eval_tokens']:,} tokens)")
PYTHON
echo "report: $report"
