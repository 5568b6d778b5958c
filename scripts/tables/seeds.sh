#!/usr/bin/env bash
# LLaMA-135M over six seeds: uniform and AlphaDecay, three decays. Options: --help.
source "$(dirname "$0")/table.sh"

for seed in 5 6 7 8 9 10; do
    for decay in 1e-5 5e-6 1e-6; do
        for method in uniform alphadecay; do
            cell --model 130m --method "$method" --decay "$decay" --seed "$seed"
        done
    done
done
make_table seeds
