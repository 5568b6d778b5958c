#!/usr/bin/env bash
# LLaMA 60M and 135M on C4 with AdamW: five methods, three decays. Options: --help.
source "$(dirname "$0")/table.sh"

for model in 60m 130m; do
    cell --model "$model" --optimizer adamw --method wd0
    for decay in 0.1 0.05 0.01; do
        for method in uniform awd adadecay-module alphadecay; do
            cell --model "$model" --optimizer adamw --method "$method" --decay "$decay"
        done
    done
done
make_table adamw
