#!/usr/bin/env bash
# Measure what the quickstarts print beside their results: the spread between seeds, and the seconds
# of each step.
#
#   bash results/quickstart/measure.sh llama|vit [FOLDER]
#
# It runs a quickstart for each seed and writes llama.json or vit.json beside this script. The
# seconds are those of the first seed, which gathers its text anew: let the cores be idle.
# FOLDER (default runs/quickstart_seeds_MODEL) takes the runs. Finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh

model="${1:?give llama or vit}" folder="${2:-runs/quickstart_seeds_$1}"
case "$model" in
    llama) script=scripts/quickstart.sh seeds=(5 6 7 8) ;;
    vit) script=scripts/quickstart_vit.sh seeds=(5 6 7 8) ;;
    *) echo "error: $model is neither llama nor vit" >&2; exit 2 ;;
esac
export ALPHADECAY_VENV="$venv" ALPHADECAY_CACHE="$folder/cache"
for seed in "${seeds[@]}"; do
    echo "== seed $seed"
    SEED="$seed" bash "$script" "$folder/$seed"
done
python scripts/quickstart.py measure "results/quickstart/$model.json" "${seeds[@]/#/$folder/}"
