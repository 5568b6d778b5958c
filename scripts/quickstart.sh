#!/usr/bin/env bash
# From a fresh machine to a report: a small LLaMA on the docstrings of the installed packages,
# trained on 2 CPU processes without weight decay, with uniform decay and with AlphaDecay.
# Less than 5 minutes on 2 idle cores, after the installation.
#
#   bash scripts/quickstart.sh [FOLDER]
#
# FOLDER (default runs/quickstart) takes the data and the runs. SEED=N sets another seed than 5.
# Finished steps are not repeated, and an interrupted run continues. The output of each step is in
# FOLDER/STEP.log.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    --help | -h) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "scripts/quickstart.sh"; exit ;;
    -*) echo "error: unknown option $1; the only argument is the folder, see --help" >&2; exit 2 ;;
esac
[ $# -lt 2 ] || { echo "error: one folder is enough, not $#; see --help" >&2; exit 2; }
source scripts/environment.sh

folder="${1:-runs/quickstart}" seed="${SEED:-5}" measured=results/quickstart/llama.json
export WANDB_MODE="${WANDB_MODE:-offline}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# step NAME TITLE PRODUCT COMMAND...: print a progress line and run the command, once.
step() { python scripts/quickstart.py step "$folder" "$measured" "$@"; }

# prepare NAME TITLE FLAGS...: tokenize a source.
prepare() {
    step "$1" "$2" "$folder/$1/index.json" \
        python -m peft_pretraining.prepare_data --vocab_size 1024 --output "$folder/$1" "${@:3}"
}

# train METHOD TITLE FLAGS...: 1,000 updates, in which the training set is repeated 8 times.
train() {
    step "$1" "$2" "$folder/$1/report.html" torchrun --standalone --nproc_per_node=2 \
        torchrun_main.py --model_config configs/llama_300k.json --dataset "$folder/data" \
        --packing --max_length 128 --optimizer adamw --lr 6e-3 --grad_clipping 1 \
        --dtype float32 --seed "$seed" --batch_size 8 --total_batch_size 16 \
        --num_training_steps 1000 --eval_every 250 --save_every 250 --keep_checkpoints 1 \
        --save_dir "$folder/$1" --name "quickstart-$1" --continue_from auto --method "$1" "${@:3}"
}

prepare pydocs "gather docstrings and train a tokenizer" \
    --dataset pydocs --tokenizer bpe --max_tokens 10K --target_eval_tokens 1K
[ -f "$folder/sample/train.jsonl" ] ||
    python scripts/quickstart.py sample "$folder/pydocs" "$folder/sample"
prepare data "tokenize a sample of them" --dataset "$folder/sample/train.jsonl" \
    --validation_file "$folder/sample/validation.jsonl" --tokenizer "$folder/pydocs/tokenizer"

train wd0 "train without decay"
train uniform "train with uniform decay" --weight_decay 0.3
train alphadecay "train with AlphaDecay" --weight_decay 0.3 \
    --unbalancedWD_every 100 --wd_min_ratio 0.6666 --wd_max_ratio 3

runs=("$folder/wd0" "$folder/uniform" "$folder/alphadecay")
step report "write the report" "$folder/report.html" \
    python -m peft_pretraining.report "${runs[@]}" --output "$folder/report.html"
echo
python scripts/quickstart.py results "$folder" "$measured"
echo "report: $folder/report.html"
