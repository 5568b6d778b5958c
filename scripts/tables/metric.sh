#!/usr/bin/env bash
# The statistic that a module is scored by, LLaMA-135M. Options: --help.
source "$(dirname "$0")/table.sh"

for decay in 1e-5 5e-6 1e-6; do
    cell --model 130m --method alphadecay --decay "$decay"
    cell --model 130m --method gradnorm --decay "$decay"
    for metric in fnorm spectral_norm; do
        cell --model 130m --method alphadecay --decay "$decay" -- --esd_metric_for_tb "$metric"
    done
done
make_table metric
