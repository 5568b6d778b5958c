#!/usr/bin/env bash
# DeiT-tiny on ImageNet-1K: five methods, two decays. --data names the folder of ImageNet.
# Options: --help.
source "$(dirname "$0")/table.sh"

cell --model vit --method wd0
for decay in 5e-6 1e-6; do
    for method in uniform awd adadecay-module alphadecay; do
        cell --model vit --method "$method" --decay "$decay"
    done
done
make_table vit
