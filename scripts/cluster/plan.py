"""Plan a training run on 1 to many GPUs: memory, micro-batch, time and communication.

    python scripts/cluster/plan.py --gpus 1 8 64 512 --gpu H100 \
        --configs configs/llama_130m.json configs/llama_7b.json

Nothing is trained and no GPU is needed. The command prints the assumptions, the formulas, and a
Markdown table with the fastest parallel strategy for each model and number of GPUs. The estimates
are in cost_model.py, the figures of the GPUs and the assumptions in hardware.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peft_pretraining.cli.common import DTYPES, Parser, check_numbers
from peft_pretraining.cli.main import run_script
from peft_pretraining.errors import UserError
from scripts.cluster.hardware import ASSUMPTIONS, GPUS, GPUS_PER_NODE, MFU

if TYPE_CHECKING:  # the cost model imports torch; it is imported after the arguments are parsed
    from scripts.cluster.cost_model import Plan

CONFIGS = tuple(
    f"configs/llama_{size}.json"
    for size in ("60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b")
)
# hsdp: --parallel fsdp that shards the model within a node and copies it between nodes.
PARALLEL_STRATEGIES = ("ddp", "fsdp", "hsdp")

# ------------------------------------------------------------------------------------ strategy


def parallel_strategies(parallel: str, gpus: int) -> tuple[str, ...]:
    """Return the strategies to compare.

    Args:
        parallel: the value of --parallel.
        gpus: number of GPUs. A single GPU leaves no choice; hsdp needs several whole nodes.

    Raises:
        UserError: if --parallel hsdp is given for GPUs that are not several whole nodes.
    """
    if gpus == 1:
        return ("ddp",)
    per_node = int(GPUS_PER_NODE.value)
    whole_nodes = gpus > per_node and gpus % per_node == 0
    if parallel == "hsdp" and not whole_nodes:
        raise UserError(
            f"--parallel hsdp shards within nodes of {per_node} GPUs: "
            f"give --gpus a multiple of {per_node} above {per_node}, not {gpus}"
        )
    if parallel != "auto":
        return (parallel,)
    return PARALLEL_STRATEGIES if whole_nodes else PARALLEL_STRATEGIES[:2]


def fastest_feasible(plans: Sequence[Plan]) -> Plan:
    """Return the fastest plan that is possible.

    If none is possible, return the one that needs the least memory. Of equal plans, the first one
    is returned.
    """
    possible = [plan for plan in plans if not plan.problem]
    if possible:
        return min(possible, key=lambda plan: plan.update)
    return min(plans, key=lambda plan: plan.memory.peak if plan.memory else 0)


def remarks(best: Plan, plans: Sequence[Plan]) -> str:
    """Return how the other plans compare with the best one, or why no plan is possible."""
    if best.problem:
        return best.problem
    others = [plan for plan in plans if plan is not best]
    notes = [plan.problem for plan in others if plan.problem]
    notes += [
        f"{plan.parallel}: {plan.update / best.update:.2f} times the seconds"
        for plan in others
        if not plan.problem
    ]
    return "; ".join(notes + ["launch-bound"] * best.launch_bound)


# -------------------------------------------------------------------------------------- output

HEADINGS = (
    "model", "GPUs", "parallel", "GB: weights", "gradients", "moments", "activations", "logits",
    "peak", "micro-batch", "s/update", "communication", "analysis", "sent per update",
    "sent per analysis", "remarks",
)  # fmt: skip


def format_bytes(size: float) -> str:
    """Return for instance `7.2 kB`: three digits, and more before the point only for GB."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 999.5 else f"{size:,.0f} GB"


def table_row(plan: Plan, analysis_interval: int, remark: str) -> list[str]:
    """Return the cells of a plan; communication and analysis are fractions of an update's time."""
    first = [
        f"{plan.config} ({plan.parameters / 1e6:.1f}M)",
        str(plan.gpus),
        plan.parallel if plan.gpus > 1 else "-",
    ]
    memory = ["-"] * 6
    if plan.memory:
        m = plan.memory
        weights, gradients = m.weights + m.copies, max(m.gradients, m.held_gradients)
        parts = (weights, gradients, m.moments, m.activations, m.logits, m.peak)
        memory = [f"{part / 1e9:.1f}" for part in parts]
    if plan.problem:
        return [*first, *memory, *["-"] * 6, remark]
    return [
        *first,
        *memory,
        f"{plan.micro_batch} x {plan.micro_batches}",
        f"{plan.update:.3g}",
        f"{plan.exposed / plan.update:.1%}",
        f"{plan.analysis / analysis_interval / plan.update:.1%}",
        format_bytes(plan.step_bytes),
        format_bytes(plan.analysis_bytes),
        remark,
    ]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with HEADINGS above the rows."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_assumptions(args: argparse.Namespace, formulas: str) -> str:
    """Return the text above the table: the GPU, the training, the assumptions and the formulas."""
    gpu = GPUS[args.gpu]
    assumptions = ASSUMPTIONS | {"MFU": MFU._replace(value=args.mfu)}
    lines = [
        f"{args.gpu}: {gpu.memory:g} GB; {gpu.bf16:g} TFLOP/s in bf16 and {gpu.float32:g} TFLOP/s "
        f"in float32 (NVIDIA's data sheet); {gpu.link:g} GB/s to its node, and "
        f"{args.network or gpu.network:g} GB/s from a node to the network in one direction (DGX)",
        f"{args.total_batch_size} sequences of {args.max_length} tokens in an update, "
        f"{args.dtype}, blocks {'compiled' if args.compile == 'on' else 'not compiled'}, "
        f"an analysis every {args.every} updates",
    ]
    lines += [
        f"{name} = {a.value:.4g}: {a.meaning} ({a.source})" for name, a in assumptions.items()
    ]
    indented = [f"  {line}" for line in lines]
    return "\n".join(
        ["Assumptions", *indented, "Formulas", *(f"  {line}" for line in formulas.splitlines())]
    )


def write_json(args: argparse.Namespace, plans: Sequence[tuple[Plan, bool]]) -> None:
    """Write settings, assumptions and all plans to the file of --output.

    Args:
        args: the command line.
        plans: each plan, and True if it is the one that the table shows.
    """
    assumptions = {name: a._asdict() for name, a in ASSUMPTIONS.items()}
    assumptions["MFU"]["value"] = args.mfu
    content = {
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "assumptions": assumptions | {"gpu": GPUS[args.gpu]._asdict()},
        "plans": [plan.to_json() | {"advised": best} for plan, best in plans],
    }
    args.output.write_text(json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------------- command


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line.

    Raises:
        UserError: if a number is out of its range.
    """
    parser = Parser(prog="plan.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--configs",
        nargs="+",
        default=CONFIGS,
        metavar="FILE",
        help="configs of models (default: those from 60m to 7b)",
    )
    add(
        "--gpus",
        nargs="+",
        type=int,
        default=[1, 8, 64, 512],
        metavar="N",
        help="numbers of GPUs (default 1 8 64 512)",
    )
    add("--gpu", choices=GPUS, default="H100", help="kind of GPU (default H100)")
    add(
        "--parallel",
        choices=("auto", *PARALLEL_STRATEGIES),
        default="auto",
        help="parallel strategy; auto: the fastest one that fits into the memory (default)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        default="bf16_mixed",
        help="as in torchrun_main.py (default bf16_mixed)",
    )
    add(
        "--compile",
        choices=("on", "off"),
        default="on",
        help="whether the blocks are compiled (default on)",
    )
    add("--total_batch_size", type=int, default=512, help="sequences in an update (default 512)")
    add("--max_length", type=int, default=256, help="tokens in a sequence (default 256)")
    add("--every", type=int, default=500, help="updates between two analyses (default 500)")
    add(
        "--mfu",
        type=float,
        default=MFU.value,
        help=f"model FLOPs utilization, at most 1 (default {MFU.value})",
    )
    add(
        "--network",
        type=float,
        metavar="GB/S",
        help="bandwidth of a node in one direction (default: that of a DGX)",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="write all numbers to this file as JSON, including the plans that the table omits",
    )
    args = parser.parse_args(argv)
    check_numbers(args, ("total_batch_size", "max_length", "every", "mfu", "network"), ())
    if args.mfu > 1:
        raise UserError(f"--mfu {args.mfu}: give a fraction of at most 1")
    if min(args.gpus) < 1:
        raise UserError(f"--gpus {min(args.gpus)}: it must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plans, and write them to --output."""
    args = parse_arguments(argv)
    from scripts.cluster import cost_model

    training = cost_model.Training(
        args.total_batch_size,
        args.max_length,
        args.dtype,
        args.every,
        args.mfu,
        args.compile == "on",
    )
    gpu, rows, results = GPUS[args.gpu], [], []
    for model in map(cost_model.read_model, args.configs):
        for gpus in args.gpus:
            cluster = cost_model.Cluster(gpu, gpus, args.network or gpu.network)
            plans = [
                cost_model.make_plan(model, parallel, cluster, training)
                for parallel in parallel_strategies(args.parallel, gpus)
            ]
            best = fastest_feasible(plans)
            rows.append(table_row(best, args.every, remarks(best, plans)))
            results += [(plan, plan is best) for plan in plans]
    print(describe_assumptions(args, cost_model.FORMULAS) + "\n\n" + markdown_table(rows))
    if args.output:
        write_json(args, results)


if __name__ == "__main__":
    sys.exit(run_script(main))
