#!/usr/bin/env bash
# LLaMA 60M to 1B on C4 with Adam: five methods, three decays. Options: --help.
source "$(dirname "$0")/table.sh"

for model in 60m 130m 350m 1b; do
    cell --model "$model" --method wd0
    for decay in 1e-5 5e-6 1e-6; do
        for method in uniform awd adadecay-module alphadecay; do
            cell --model "$model" --method "$method" --decay "$decay"
        done
    done
done
make_table adam
