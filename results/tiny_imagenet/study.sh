#!/usr/bin/env bash
# The study of ViT-tiny on a 100-class subset of Tiny ImageNet: uniform decay and AlphaDecay, with
# patches of 8 and images of 32 x 32 pixels.
#
#   bash results/tiny_imagenet/study.sh IMAGES [FOLDER] [EPOCHS]
#
#   IMAGES   holds class folders in train/ and val/
#   FOLDER   takes the runs (default runs/tiny_imagenet)
#   EPOCHS   default 3
#
# Two runs at a time, of one thread each. Finished runs are not repeated, and interrupted runs
# continue. There are too few images for a claim about accuracy: the study shows that both methods
# train, and how large the spread between seeds is.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh

images="${1:?give the folder of the images}"
folder="${2:-runs/tiny_imagenet}" epochs="${3:-3}"
export WANDB_MODE="${WANDB_MODE:-offline}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# In so short a training each image is seen three times, so the augmentation is light.
train() {
    python main_vit.py --model deit_tiny_patch16_224 --model_kwargs patch_size=8 --input_size 32 \
        --drop_path 0 --data_set IMNET --data_path "$images" --nb_classes 100 \
        --use_amp true --num_workers 0 --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 \
        --batch_size 128 --epochs "$epochs" --warmup_epochs 0 --warmup_steps 100 \
        --lr 1e-3 --weight_decay 5e-6 --save_ckpt_num 1 --save_every 100 \
        --seed "$2" --output_dir "$folder/$1-$2" --name "study-vit-$1-$2" "${@:3}"
}

for seed in 0 1; do
    train uniform "$seed" &
    train alphadecay "$seed" --method alphadecay --unbalancedWD_every 100 \
        --wd_min_ratio 0.6666 --wd_max_ratio 3 &
    wait -n
    wait -n
done

for measure in top1 top5; do
    python scripts/paper/table.py "$folder" --columns data_set --measure "$measure" \
        --against uniform --csv "results/tiny_imagenet/$measure.csv" |
        tee "results/tiny_imagenet/$measure.md"
done
