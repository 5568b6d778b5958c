#!/usr/bin/env bash
# Control experiments with LLaMA-60M and three seeds: do the results come from the spectra, from the
# mean decay, from the types of the modules, or from the range of decays? Options: --help.
source "$(dirname "$0")/table.sh"

for seed in 5 6 7; do
    for method in uniform alphadecay inverted shuffled type_constant gradnorm quantile one_shot \
        farms; do
        cell --model 60m --method "$method" --decay 5e-6 --seed "$seed"
    done
    cell --model 60m --method alphadecay --decay 5e-6 --seed "$seed" -- --iso_budget
done
make_table controls
