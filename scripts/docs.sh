#!/usr/bin/env bash
# Build the pages of docs/ as a website in build/docs/. Warnings, such as a broken link, are errors.
#
#   bash scripts/docs.sh [FOLDER]
#
# FOLDER is another place for the website.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    --help | -h) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "scripts/docs.sh"; exit ;;
esac
source scripts/environment.sh

folder="${1:-build/docs}"
python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs "$folder"
echo "website: $folder/index.html"
