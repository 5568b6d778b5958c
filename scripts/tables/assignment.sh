#!/usr/bin/env bash
# The map from alphas to decays, LLaMA-60M. Options: --help.
source "$(dirname "$0")/table.sh"

for decay in 1e-5 5e-6 1e-6; do
    cell --model 60m --method alphadecay --decay "$decay"
    for map in tb_sqrt tb_log2 layerwise_sigmoid; do
        cell --model 60m --method alphadecay --decay "$decay" -- --assign_func "$map"
    done
done
make_table assignment
