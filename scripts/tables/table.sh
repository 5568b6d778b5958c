# Sourced by the scripts of the tables, with their arguments. `cell ARGUMENTS` adds a run with these
# arguments of run.sh; `make_table NAME` makes all runs and prints the table.
#
#   --gpus G ...   make as many runs at once as there are G, each on its GPUs: --gpus 0 1, or
#                  --gpus 0,1 2,3
#   --jobs N       without GPUs: number of runs at once (default 1)
#   --runs FOLDER  takes the run folders (default runs/tables). Finished runs are not repeated,
#                  interrupted runs continue, and tables share runs
#   --only WORD    only the cells whose arguments contain the word, such as 60m
#   --data DATA    LLaMA: a --dataset (default c4); ViT: the folder of ImageNet
#   --scale S      a rehearsal with fewer steps, a smaller batch and a smaller model, such as 0.001
#   --dry_run      print the commands only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cells=() shared=() slots=() only="" dry_run="" runs=runs/tables
while [ $# -gt 0 ]; do
    case "$1" in
        --gpus)
            slots=(--gpus)
            shift
            while [ $# -gt 0 ] && [[ "$1" != --* ]]; do
                slots+=("$1")
                shift
            done
            continue
            ;;
        --jobs | --only | --runs | --data | --scale)
            [ $# -gt 1 ] || { echo "error: $1 needs a value; see --help" >&2; exit 2; }
            ;;
    esac
    case "$1" in
        --jobs) slots=(--jobs "$2"); shift ;;
        --only) only="$2"; shift ;;
        --runs) runs="$2"; shift ;;
        --data | --scale) shared+=("$1" "$2"); shift ;;
        --dry_run) dry_run=yes shared+=(--dry_run) ;;
        --help) sed -n 's/^#   //p' scripts/tables/table.sh; exit ;;
        *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
    esac
    shift
done

cell() { [[ "$*" != *"$only"* ]] || cells+=("$*"); } # no argument of a cell contains a space

make_table() {
    local cell commands=()
    [ ${#cells[@]} -gt 0 ] || { echo "error: no cell contains --only $only" >&2; exit 2; }
    # Arguments after -- in a cell go to the training script, so the table's own options come first.
    for cell in "${cells[@]}"; do
        commands+=("bash scripts/run.sh $(printf '%q ' --runs "$runs" "${shared[@]}")$cell")
    done
    if [ -n "$dry_run" ]; then
        for cell in "${commands[@]}"; do eval "$cell"; done
        return
    fi
    command -v torchrun > /dev/null || source scripts/environment.sh
    local failed=0
    python scripts/pool.py "${slots[@]}" < <(printf '%s\n' "${commands[@]}") &
    trap "kill $!" INT TERM # runs save and end, see pool.py; a table can be continued
    while kill -0 $! 2> /dev/null; do wait $! && failed=0 || failed=$?; done
    trap - INT TERM
    python scripts/paper/table.py "$runs" --table "$1" --csv "$runs/$1.csv"
    return "$failed"
}
