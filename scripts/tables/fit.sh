#!/usr/bin/env bash
# The power-law fit, LLaMA-60M and 135M, with the seconds of an analysis. Options: --help.
source "$(dirname "$0")/table.sh"

for model in 60m 130m; do
    cell --model "$model" --method alphadecay --decay 5e-6
    for fit in goodness-of-fit fix-finger; do
        cell --model "$model" --method alphadecay --decay 5e-6 -- --pl_fitting "$fit"
    done
done
make_table fit
