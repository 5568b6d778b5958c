#!/usr/bin/env bash
# The study "Wikipedia, evaluated also on C4": first a grid of eta, then eight methods with Adam and
# AdamW and three seeds.
#
#   bash results/wikipedia/study.sh WIKIPEDIA C4 T5 [FOLDER]
#
#   WIKIPEDIA   articles to train on (.jsonl.xz); 1 % of them are held out
#   C4          documents that are only evaluated
#   T5          t5-base, or a folder with its files; it is reduced to 4,096 pieces
#   FOLDER      takes data and runs (default runs/wikipedia). Finished runs are not repeated, and
#               interrupted runs continue.
#
# Two runs at a time, of one thread each; JOBS=N sets another number. STAGE=grid or STAGE=methods
# does only that part.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh

wikipedia="${1:?give the articles}" c4="${2:?give the documents of C4}"
t5="${3:?give the T5 tokenizer}" folder="${4:-runs/wikipedia}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
[ -d "$folder/t5-4096" ] || python results/wikipedia/reduced_t5.py "$t5" "$folder/t5-4096" 4096
python -m peft_pretraining.prepare_data --dataset "$wikipedia" \
    --tokenizer "$folder/t5-4096" --vocab_size 4096 --max_tokens 20M \
    --target_eval_tokens 400K --output "$folder/data"

# one METHOD OPTIMIZER ETA SEED: print the command line of a run and of its evaluation on C4.
one() {
    local method="$1" eta name
    eta=$(printf %g "$3") # 1e-5 and 1e-05 are one run
    name="$1-$2-$eta-$4"
    local flags=(--method "$1" --optimizer "$2" --seed "$4" --name "$name"
        --save_dir "$folder/$name")
    [ "$method" = wd0 ] || flags+=(--weight_decay "$eta")
    case "$method" in
        wd0 | uniform | awd) ;;
        *) flags+=(--unbalancedWD_every 25 --wd_min_ratio 0.6666 --wd_max_ratio 5) ;;
    esac
    echo "bash -c 'python torchrun_main.py --model_config results/wikipedia/llama_5m.json" \
        "--dataset $folder/data --packing --max_length 256 --dtype bf16_mixed --lr 2e-3" \
        "--batch_size 4 --total_batch_size 4 --num_training_steps 400 --warmup_steps 40" \
        "--log_every 25 --eval_every 400 --target_eval_tokens 100000 --save_every 200" \
        "--keep_checkpoints 1 --continue_from auto --balance_scope all_blocks" \
        "--no_wandb ${flags[*]} 2> $folder/$name.log &&" \
        "python -m peft_pretraining.evaluate_checkpoint $folder/$name --documents $c4 --as c4" \
        "--target_eval_tokens 100000'"
}
# best METHOD OPTIMIZER: print the eta of the grid with the lowest validation loss.
best() {
    python scripts/paper/table.py "$folder" --where "method=$1" "optimizer=$2" seed=5 \
        --best weight_decay
}

grid_adam="1e-5 1e-4 1e-3" grid_adamw="0.01 0.1 1"
if [ "${STAGE:-grid}" = grid ]; then
    for method in uniform alphadecay; do
        for eta in $grid_adam; do one "$method" adam "$eta" 5; done
        for eta in $grid_adamw; do one "$method" adamw "$eta" 5; done
    done | python scripts/pool.py --jobs "${JOBS:-2}"
    python scripts/paper/table.py "$folder" --columns optimizer weight_decay \
        --where method=uniform,alphadecay seed=5 --measure eval_loss \
        --csv results/wikipedia/grid.csv |
        tee results/wikipedia/grid.md
fi
if [ "${STAGE:-methods}" = methods ]; then
    for seed in 5 6 7; do
        for optimizer in adam adamw; do
            uniform=$(best uniform "$optimizer") alphadecay=$(best alphadecay "$optimizer")
            # Without decay AdamW equals Adam.
            [ "$optimizer" = adamw ] || one wd0 adam 0 "$seed"
            # Methods with the same range of decays have the same eta.
            for method in uniform adadecay-module awd; do
                one "$method" "$optimizer" "$uniform" "$seed"
            done
            for method in alphadecay gradnorm type_constant inverted; do
                one "$method" "$optimizer" "$alphadecay" "$seed"
            done
        done
    done | python scripts/pool.py --jobs "${JOBS:-2}"
    for measure in perplexity c4:perplexity; do
        python scripts/paper/table.py "$folder" --columns optimizer --pick weight_decay \
            --measure "$measure" --against uniform --csv "results/wikipedia/${measure%%:*}.csv" |
            tee "results/wikipedia/${measure%%:*}.md"
    done
fi
