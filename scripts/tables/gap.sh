#!/usr/bin/env bash
# Updates between two analyses, LLaMA-60M. Options: --help.
source "$(dirname "$0")/table.sh"

for gap in 1 50 100 250; do
    cell --model 60m --method alphadecay --decay 5e-6 -- --unbalancedWD_every "$gap"
done
cell --model 60m --method alphadecay --decay 5e-6 # the published gap, 500
make_table gap
