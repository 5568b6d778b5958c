#!/usr/bin/env bash
# Make one run of the paper's tables: the published settings of a model, with a method, an
# optimizer, a decay and a seed.
#
#   bash scripts/run.sh --model 60m --method alphadecay --decay 1e-5 [options] \
#       [-- flags of the training script]
#
#   --model      60m, 130m, 350m, 1b (LLaMA on C4) or vit (DeiT-tiny on ImageNet)
#   --method     a name that --method of the training scripts takes
#   --decay      eta; wd0 takes none
#   --optimizer  adam (default), adamw or muon
#   --seed       default 5, for vit 0
#   --lr         default: the published one
#   --data       LLaMA: a --dataset (default c4); vit: the folder of ImageNet
#   --gpus       such as 0 or 0,1: one process on each (default: $CUDA_VISIBLE_DEVICES)
#   --processes  another number of processes
#   --runs       takes the run folders (default runs/tables). A folder has the name of its cell, and
#                a finished run is not repeated
#   --scale      such as 0.001: a rehearsal with fewer steps, a smaller batch, less evaluation and a
#                smaller model, on pydocs or digits
#   --dry_run    print the command only
set -euo pipefail
die() { echo "error: $*" >&2; exit 2; }
cd "$(dirname "$0")/.."

model="" method="" optimizer=adam decay="" seed="" lr="" data=""
gpus="" processes="" runs=runs/tables scale="" dry_run=""
while [ $# -gt 0 ]; do
    case "$1" in
        --) shift; break ;;
        --dry_run) dry_run=yes; shift ;;
        --help) sed -n '2,/^set/{/^#/p}' scripts/run.sh; exit ;;
        --model | --method | --optimizer | --decay | --seed | --lr | --data | --gpus | \
            --processes | --runs | --scale)
            [ $# -gt 1 ] || die "$1 needs a value; see --help"
            printf -v "${1#--}" %s "$2"; shift 2 ;;
        *) die "unknown option $1; see --help, and give flags of the training script after --" ;;
    esac
done

number() { # number FLAG VALUE
    [ -n "$2" ] || die "$1 is missing"
    [[ "$2" =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ ]] || die "$1 $2: give a number"
}
[ -n "$method" ] || die "--method is missing: give for instance alphadecay"
if [ "$method" = wd0 ]; then
    [ -z "$decay" ] || die "wd0 has no decay: leave --decay out"
else
    number --decay "$decay"
fi
[ -z "$lr" ] || number --lr "$lr"
if [ -n "$scale" ]; then
    number --scale "$scale"
    awk "BEGIN { exit !($scale > 0 && $scale < 1) }" ||
        die "--scale $scale: it must be between 0 and 1"
fi
decay=${decay:+$(awk "BEGIN { printf \"%g\", $decay }")} # 0.00001 and 1e-5 are one cell
gpus=${gpus:-${CUDA_VISIBLE_DEVICES:-}}
commas=${gpus//[!,]/}
processes=${processes:-$((${#commas} + 1))}
[[ "$processes" =~ ^[1-9][0-9]*$ ]] ||
    die "--processes $processes: give a whole number above 0"
scaled() { # scaled NUMBER LEAST
    awk "BEGIN { y = int($1 * ${scale:-1} + 0.5); print (y < $2 ? $2 : y) }"
}

# ------------------------------------------------------------------------- the published settings
# They are those of the paper's appendix (60M on one GPU, the others on two). s1 and s2 for each
# decay are those of its scripts.
total=512 micro=256 ratio=5
case "$model" in
    60m) steps=10000 micro=512 published_lr=0.001 ;;
    130m) steps=20000 published_lr=0.001 ;;
    350m) steps=60000 published_lr=0.001 ;;
    1b) steps=90000 published_lr=0.0006 ;;
    vit) total=384 micro=192 published_lr=0.004 ;;
    "") die "--model is missing: give 60m, 130m, 350m, 1b or vit" ;;
    *) die "--model $model is none of the paper's: 60m, 130m, 350m, 1b, vit" ;;
esac
case "$model/$optimizer/$decay" in vit/*/5e-06 | [!v]*/adam/1e-05) ratio=3 ;; esac
seed=${seed:-$([ "$model" = vit ] && echo 0 || echo 5)}
lr=${lr:-$published_lr}
# An update of a rehearsal has at least 2 sequences in a process (32 images, so that an epoch has
# few updates).
each=$(scaled $((total / processes)) $([ "$model" = vit ] && echo 32 || echo 2))
[ $((each * processes)) = $total ] || [ -n "$scale" ] ||
    die "--processes $processes does not divide a batch of $total: give a power of 2"
# As few micro-batches as the published size allows: reference_perplexity depends on that size.
accumulation=$(((each + micro - 1) / micro))
each=$((each / accumulation))

flags=(--method "$method" ${decay:+--weight_decay "$decay"} --optimizer "$optimizer"
    --lr "$lr" --seed "$seed")
case "$method" in
    wd0 | uniform | awd | adadecay) ;;
    *)
        flags+=(--unbalancedWD_every "$(scaled 500 2)" --wd_min_ratio 0.6666
            --wd_max_ratio "$ratio")
        ;;
esac
if [ "$model" = vit ]; then
    script=main_vit.py
    flags+=(--model vit_deit_tiny_patch16_224 --drop_path 0.1 --batch_size "$each"
        --update_freq "$accumulation" --epochs "$(scaled 120 2)"
        --warmup_epochs "$(scaled 20 1)" --model_ema true --model_ema_eval true)
    if [ -z "$scale" ] || [ -n "$data" ]; then
        [ -n "$data" ] ||
            die "--data is missing: give the folder that holds train/ and val/ of ImageNet"
        flags+=(--data_path "$data")
    else
        flags+=(--data_set digits)
    fi
else
    script=torchrun_main.py
    # The training script refuses bfloat16 weights with element-wise decays and with Muon, which
    # they would round away.
    dtype=bfloat16
    case "$method/$optimizer" in adadecay/* | */muon) dtype=bf16_mixed ;; esac
    steps=$(scaled "$steps" 4)
    flags+=(--batch_size "$each" --total_batch_size $((each * accumulation * processes))
        --num_training_steps "$steps" --warmup_steps $(((steps + 9) / 10)) --dtype "$dtype"
        --max_length 256 --eval_every "$(scaled 1000 2)"
        --target_eval_tokens "$(scaled 10000000 2000)" --save_every "$(scaled 1000 4)"
        --keep_checkpoints 1 --continue_from auto)
    if [ -n "$scale" ]; then
        flags+=(--model_config configs/llama_2m.json --dataset "${data:-pydocs}" --tokenizer bpe)
    else
        flags+=(--model_config "configs/llama_$model.json" --dataset "${data:-c4}")
    fi
fi
if [ -n "$scale" ]; then
    # The tags tell the tables which cell is rehearsed, because the model's name does not, and which
    # gap between analyses replaces the usual one.
    flags+=(--tags "rehearses $model,usual_gap $(scaled 500 2)" --log_every 1 --no_wandb)
    [ "$model" != vit ] ||
        flags+=(--num_workers 0 --input_size 32
            --model_kwargs patch_size=4 depth=4 embed_dim=64 num_heads=2)
fi

# ------------------------------------------------------------------------- its folder and command
name="$model-$method-$optimizer-lr$lr${decay:+-wd$decay}-seed$seed"
name+="${data:+-on-$(basename "$data")}"
if [ $# -gt 0 ]; then # other flags make another cell
    extra=$(tr ' /' '__' <<< "$*" | sed 's/_--/+/g; s/^--//')
    [ ${#extra} -le 100 ] || extra=$(cksum <<< "$*" | cut -d' ' -f1)
    name+="+$extra"
fi
folder="$runs/$name${scale:+-scale$scale}"
folder_flag=$([ "$model" = vit ] && echo --output_dir || echo --save_dir)
flags+=(--name "$name" "$folder_flag" "$folder" "$@")
command=(torchrun --standalone --nproc_per_node="$processes" "$script" "${flags[@]}")

if [ -n "$dry_run" ]; then
    echo "${gpus:+CUDA_VISIBLE_DEVICES=$gpus }$(printf '%q ' "${command[@]}")"
# The summary is written at the end, and removed when a run is continued.
elif grep -qs '"summary"' "$folder/run.json" &&
    grep -qs '"final": true' "$folder/metrics.jsonl"; then
    echo "== $folder is finished"
else
    echo "== $folder"
    command -v torchrun > /dev/null || source scripts/environment.sh
    [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES="$gpus"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$([ "$processes" = 1 ] && nproc || echo 1)}"
    exec "${command[@]}"
fi
