#!/usr/bin/env bash
# All checks: style, then the tests. `bash scripts/test.sh -k resume` passes its arguments on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

ruff check .
ruff format --check .
python -m pytest "$@"
