#!/usr/bin/env bash
# Old path of scripts/cluster/multinode.sh. It works for one more release.
exec bash "$(dirname "$0")/cluster/multinode.sh" "$@"
