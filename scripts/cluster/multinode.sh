#!/usr/bin/env bash
# Train on several nodes without Slurm. Run the same command on each node, in any order:
#
#   bash scripts/cluster/multinode.sh --nodes 2 --rdzv_host node1 -- \
#       --model_config configs/llama_1b.json --name big ...
#
#   --nodes N          number of nodes (or the environment variable NODES)
#   --rdzv_host HOST   name or address of one node that all nodes can reach (or RDZV_HOST)
#   --gpus N           processes on each node (or GPUS_PER_NODE; default: one for each GPU)
#   --port N           a free port of HOST (default 29400)
#   --id NAME          name of the run, if several runs share a host and a port (default alphadecay)
#   --max_restarts N   how often the run is restarted after a process has died, and how often
#                      torchrun is started again after a whole node was lost (default 3 each)
#   --script FILE      torchrun_main.py (default) or main_vit.py; it gets the arguments after --
#   --dry_run          print the command and do nothing
#
# If a node is lost, the other ones wait for it: run the same command on it again. It takes up to
# two minutes until torchrun notices and all nodes start anew from the newest checkpoint.
#
# The run folder (runs/NAME, or --save_dir) must be on a file system that all nodes share. A run
# that died or was stopped continues from its newest checkpoint. SIGTERM (and SIGUSR1, if torchrun
# has --signals-to-handle) to this command on every node makes the run save after the current
# update. torchrun then waits SHUTDOWN_SECONDS (default 240) for the checkpoint.
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }

nodes="${NODES:-}" host="${RDZV_HOST:-}" gpus="${GPUS_PER_NODE:-gpu}"
restarts=3 port=29400 id=alphadecay script=torchrun_main.py dry=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
        --dry_run) dry=yes; shift; continue ;;
        --help | -h) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit ;;
        --nodes | --rdzv_host | --gpus | --port | --id | --max_restarts | --script) ;;
        *) fail "unknown option $1: give the arguments of the training script after --" ;;
    esac
    [ $# -gt 1 ] && [ "$2" != -- ] || fail "$1 needs a value"
    case "$1" in
        --nodes) nodes="$2" ;;
        --rdzv_host) host="$2" ;;
        --gpus) gpus="$2" ;;
        --port) port="$2" ;;
        --id) id="$2" ;;
        --max_restarts) restarts="$2" ;;
        --script) script="$2" ;;
    esac
    shift 2
done
[ $# -gt 1 ] || fail "nothing to train: give the arguments of $script after --"
shift
[[ "$nodes" =~ ^[1-9][0-9]*$ ]] || fail "give --nodes N, the number of nodes (not '$nodes')"
[ -n "$host" ] || fail "give --rdzv_host HOST, the name of one of the nodes"
[[ "$gpus" =~ ^([1-9][0-9]*|gpu)$ ]] ||
    fail "--gpus '$gpus': give the number of processes on each node"
[[ "$port" =~ ^[0-9]+$ && "$restarts" =~ ^[0-9]+$ ]] ||
    fail "--port '$port' and --max_restarts '$restarts' must be numbers"
cd "$(dirname "$0")/../.."
[ -f "$script" ] || fail "--script $script: no such file in $PWD"

# torchrun reads its flags also from variables that begin with PET_. An older torchrun ignores this
# one, which makes it hand SIGUSR1 on besides its own four signals.
command=(
    env PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-240}"
    python -m scripts.cluster.relaunch "--nnodes=$nodes" "--nproc_per_node=$gpus" --rdzv_backend=c10d
    "--rdzv_endpoint=$host:$port" "--rdzv_id=$id"
    "--max_restarts=$restarts" "$script" "$@"
)
if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
