#!/usr/bin/env bash
# All checks: style, direction of imports, types, then the tests.
#
#   bash scripts/test.sh               everything
#   bash scripts/test.sh --fast        without the tests marked slow
#   bash scripts/test.sh --oldest      the tests, with the oldest supported versions of the packages
#   bash scripts/test.sh -k resume     other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
    --help | -h) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "scripts/test.sh"; exit ;;
esac
if [ "${1:-}" = --oldest ]; then
    export OLDEST=1
    shift
fi
source scripts/environment.sh

if [ "${1:-}" = --fast ]; then
    set -- -m "not slow" "${@:2}"
fi
if [ -z "${OLDEST:-}" ]; then  # what they say depends on the versions
    ruff check .
    ruff format --check .
    lint-imports
    mypy
fi
# Two tests at a time. The tests of one file share what they prepare, so they stay together.
python -m pytest --numprocesses 2 --dist loadfile "$@"
