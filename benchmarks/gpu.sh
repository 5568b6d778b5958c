#!/usr/bin/env bash
# Check the whole framework on one GPU: bash benchmarks/gpu.sh [--minutes 8] [--rehearse]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "$(command -v python3 || command -v python)" benchmarks/gpu.py "$@"
