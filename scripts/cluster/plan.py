"""Plan a training on 1 to many GPUs, without running anything: memory, micro-batch, seconds, what goes over the wire.

    python scripts/plan.py [--configs configs/llama_130m.json configs/llama_7b.json] [--gpus 1 8 64 512] [--gpu H100]

Counts and shapes are those of the real model (built on torch's meta device) and of alphadecay's own division of the analysis over the
ranks. Everything else is an assumption: a named constant below, printed above the table with its source.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from alphadecay.distributed import assign_owners  # noqa: E402
from alphadecay.modules import BalancedModule, balanced_modules  # noqa: E402
from alphadecay.spectral.engine import BATCH_BYTES  # noqa: E402
from alphadecay.spectral.statistics import COLUMNS  # noqa: E402
from peft_pretraining.cli.common import DTYPES, Parser, check_numbers  # noqa: E402
from peft_pretraining.cli.main import run_script  # noqa: E402
from peft_pretraining.errors import UserError  # noqa: E402
from peft_pretraining.model.linear_cross_entropy import CHUNK_BYTES  # noqa: E402
from peft_pretraining.model.modeling_llama import build_model, load_config  # noqa: E402
from peft_pretraining.train.flops import PEAK_FLOPS, llama_flops  # noqa: E402

CONFIGS = tuple(
    f"configs/llama_{size}.json"
    for size in ("60m", "71m", "100m", "130m", "250m", "350m", "1b", "3b", "7b")
)
PARALLELS = (
    "ddp",
    "fsdp",
    "hsdp",
)  # hsdp: --parallel fsdp that shards within a node and copies between nodes

# ------------------------------------------------------------------------------------------------------------------- GPUs


class Gpu(NamedTuple):
    """memory: GB; bf16 (dense, tensor cores), float32 (no TF32): TFLOP/s; link: GB/s of one GPU to the others of its node, one way;
    network: GB/s of a node, one way."""

    memory: float
    bf16: float
    float32: float
    link: float
    network: float


# NVIDIA's data sheets of the SXM modules (80 GB A100); NVLink is quoted both ways there: 900 and 600 GB/s.
# Network: a DGX has 8 adapters, of 400 Gb/s (H100, H200) or 200 Gb/s (A100).
GPUS = {
    "H100": Gpu(80, PEAK_FLOPS["H100"] / 1e12, 67, 450, 400),
    "H200": Gpu(141, PEAK_FLOPS["H200"] / 1e12, 67, 450, 400),
    "A100": Gpu(80, PEAK_FLOPS["A100"] / 1e12, 19.5, 300, 200),
}


# ------------------------------------------------------------------------------------------------------------ assumptions


class Assumption(NamedTuple):
    value: float
    what: str
    source: str


MFU = Assumption(0.40, "share of the peak that the arithmetic of a step reaches", "assumed; --mfu")
USABLE = Assumption(
    75 / 80, "share of the memory that is left beside CUDA, NCCL and fragmentation", "assumed"
)
BLOCK_SECONDS = Assumption(
    200e-6,
    "seconds that a block takes at least, forward and backward: 40 kernels launched in 5 us each",
    "assumed",
)
GPUS_A_NODE = Assumption(8, "GPUs in a node", "DGX, HGX")
EFFICIENCY = Assumption(
    0.8, "share of a link's data-sheet rate that a collective reaches", "assumed"
)
HOP_SECONDS = Assumption(5e-6, "seconds from one GPU to the next in a collective", "assumed")
BUCKET_BYTES = Assumption(
    25 * 2**20,
    "bytes of gradients that go in one all-reduce of ddp",
    "torch's default bucket_cap_mb",
)
OVERLAP = Assumption(
    0.8, "share of the arithmetic beside which communication can run that hides it", "assumed"
)
FSDP_BLOCKS = Assumption(
    2,
    "blocks that are whole at a time under fsdp, beside embedding, head and last norm",
    "torch prefetches one",
)
SOLVER_COLUMN = Assumption(
    20e-6,
    "seconds that a GPU's eigenvalue solver takes for each column at least",
    "assumed: not measured yet",
)
SOLVER_TFLOPS = Assumption(
    0.3,
    "TFLOP/s of the solver in large matrices, 4/3 n^3 operations",
    "assumed; Golub & Van Loan, 8.3",
)
GRAM_SHARE = Assumption(
    0.5, "share of the float32 peak that Gram products reach, 2 m n^2 operations", "assumed"
)
ASSUMPTIONS = {
    name: value for name, value in list(globals().items()) if isinstance(value, Assumption)
}

FORMULAS = """\
memory: weights, gradients (ddp: twice, in its buckets too) and two Adam moments in the parameters' type; bf16_mixed under ddp keeps
    bf16 copies of the matrices besides. fsdp: all of these over the GPUs (hsdp: over those of a node), plus what is whole at a time
    (compute type, with its gradients).
activations of a token: 16 d + c (k d + 2 (q + kv) + 4 f) bytes a block: norms in float32; c: bytes of the compute type; k: copies of
    the normed input, 5 under autocast, else 2; q, kv: widths of queries and keys; f: width of the MLP. torch.compile keeps less.
    An analysis happens when they are gone: the larger of the two counts.
logits: tokens of a chunk of the loss times vocabulary times c bytes, and their float32 copy where c is 2.
seconds of an update: arithmetic + communication that is not hidden + analysis / every.
    Arithmetic: (6 N + 12 L d S) tokens / (peak x MFU), and at least BLOCK_SECONDS for each block and micro-batch ("launch-bound").
    Hidden: ddp's beside the last micro-batch's backward pass, 2/3 of it; fsdp's beside all arithmetic; OVERLAP of these.
ddp sends 2 (W-1)/W of the gradients (ring all-reduce) once an update; fsdp for each micro-batch 2 (W-1)/W of the weights in the compute
    type (all-gather, forward and backward) and (W-1)/W of the gradients in float32 (reduce-scatter); hsdp that within a node, and an
    all-reduce of each GPU's part of the gradients between nodes once an update. A ring that spans nodes runs at a node's network rate,
    which its adapters share; hsdp's rings between nodes have an adapter each. Hops: 2 log2 W for an all-reduce (tree), W-1 for the others.
analysis: alphadecay's owners; a rank takes as long as its modules, the analysis as long as the slowest rank. ddp: all-reduce of a
    [modules, columns] float64 table. fsdp also: each matrix once to its owner through that GPU's own adapter, one after the other, in equal
    parts of whole rows; and the norm of each gradient. hsdp: each matrix to every GPU of a node instead.
Gaps: data loading, evaluation, checkpoints; --activation_checkpointing; eigenvalues that need float64 products; a few numbers a step
    (token counts, the check for finite gradients). No constant has been fitted to a run."""


# ------------------------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model; parameters are counts."""

    name: str
    config: LlamaConfig
    parameters: int
    matrices: int  # what autocast keeps copies of: the Linears, head included
    block: int
    modules: list[BalancedModule]

    @property
    def root(self) -> int:
        """Parameters outside the blocks."""
        return self.parameters - self.config.num_hidden_layers * self.block


def read_model(path: str) -> Model:
    """The model of a config, without memory for its weights. Raises UserError for a config that the training would refuse."""
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    name = Path(path).stem.removeprefix("llama_")
    return Model(
        name,
        config,
        sum(p.numel() for p in model.parameters()),
        matrices,
        block,
        balanced_modules(model),
    )


def parameter_bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def compute_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# ----------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU."""

    weights: float
    gradients: float
    moments: float
    activations: float
    logits: float
    analysis: float

    @property
    def peak(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.moments
            + max(self.activations + self.logits, self.analysis)
        )


def memory_of(
    model: Model, parallel: str, gpus: int, micro_batch: int, length: int, dtype: str
) -> Memory:
    """See FORMULAS. micro_batch: rows of `length` tokens."""
    stored, compute, n = parameter_bytes(dtype), compute_bytes(dtype), model.parameters
    tokens = micro_batch * length
    activations = tokens * model.config.num_hidden_layers * activation_bytes(model.config, dtype)
    chunk = CHUNK_BYTES["cuda"] // (4 * model.config.vocab_size)
    logits = min(tokens, chunk) * model.config.vocab_size * (compute + (4 if compute < 4 else 0))
    analysis = analysis_memory(model, parallel, gpus, dtype)
    if parallel != "ddp":
        shards = shard_size(parallel, gpus)
        whole = model.root + min(FSDP_BLOCKS.value, model.config.num_hidden_layers) * model.block
        sharded = n * stored / shards
        return Memory(
            sharded + whole * compute,
            sharded + whole * compute,
            2 * sharded,
            activations,
            logits,
            analysis,
        )
    copies = model.matrices * compute if dtype == "bf16_mixed" else 0
    return Memory(
        n * stored + copies,
        n * stored * (2 if gpus > 1 else 1),
        2 * n * stored,
        activations,
        logits,
        analysis,
    )


def shard_size(parallel: str, gpus: int) -> int:
    """GPUs that hold one copy of the weights together."""
    return {"ddp": 1, "fsdp": gpus, "hsdp": int(GPUS_A_NODE.value)}[parallel]


def activation_bytes(config: LlamaConfig, dtype: str) -> int:
    """Bytes that one block keeps of one token for the backward pass."""
    d, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    copies = 5 if dtype == "bf16_mixed" else 2
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * head_dim
    return 16 * d + compute_bytes(dtype) * (copies * d + attention + 4 * config.intermediate_size)


def analysis_memory(model: Model, parallel: str, gpus: int, dtype: str) -> float:
    """Bytes of an analysis on the fullest GPU: Gram matrices, three times with the solver's, the matrix in float32, and under fsdp all
    matrices of the owner, whole, with the pieces of the last one."""
    largest = max(m.weight.numel() for m in model.modules)
    grams = max(BATCH_BYTES, 4 * max(min(m.weight.shape) for m in model.modules) ** 2)
    bytes_ = 3 * grams + 4 * largest
    if parallel != "ddp":
        held = [sum(m.weight.numel() for m in mine) for mine in by_rank(model, gpus)]
        bytes_ += parameter_bytes(dtype) * (max(held) + 2 * largest)
    return bytes_


# ---------------------------------------------------------------------------------------------------- seconds and the wire


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them. network: GB/s of a node, one way."""

    gpu: Gpu
    gpus: int
    network: float

    @property
    def ring(self) -> float:
        """Bytes a second and GPU of a ring through all of them."""
        one_node = self.gpus <= GPUS_A_NODE.value
        return (
            EFFICIENCY.value
            * 1e9
            * (self.gpu.link if one_node else min(self.gpu.link, self.network))
        )

    @property
    def single(self) -> float:
        """Bytes a second into one GPU from all others."""
        one_node = self.gpus <= GPUS_A_NODE.value
        return (
            EFFICIENCY.value
            * 1e9
            * (self.gpu.link if one_node else min(self.gpu.link, self.network / GPUS_A_NODE.value))
        )

    @property
    def others(self) -> float:
        return (self.gpus - 1) / self.gpus

    def all_reduce(self, bytes_: float, count: int = 1) -> tuple[float, float]:
        """Bytes that each GPU sends, and seconds, for `count` all-reduces of so many bytes together."""
        sent = 2 * self.others * bytes_
        return sent, sent / self.ring + count * 2 * math.ceil(
            math.log2(self.gpus)
        ) * HOP_SECONDS.value


def step_traffic(
    model: Model, parallel: str, cluster: Cluster, micro_batches: int, dtype: str
) -> tuple[float, float]:
    """Bytes that each GPU sends in an update, and the seconds that this takes."""
    if parallel == "ddp":
        bytes_ = model.parameters * parameter_bytes(dtype)
        return cluster.all_reduce(bytes_, math.ceil(bytes_ / BUCKET_BYTES.value))
    groups = model.config.num_hidden_layers + 1  # each block, and the rest
    sharing = replace(cluster, gpus=shard_size(parallel, cluster.gpus))
    sent = micro_batches * sharing.others * model.parameters * (2 * compute_bytes(dtype) + 4)
    seconds = (
        sent / sharing.ring + 3 * micro_batches * groups * (sharing.gpus - 1) * HOP_SECONDS.value
    )
    if parallel == "hsdp":
        nodes = Cluster(
            cluster.gpu._replace(link=cluster.network / sharing.gpus),
            cluster.gpus // sharing.gpus,
            cluster.network,
        )
        more, longer = nodes.all_reduce(4 * model.parameters / sharing.gpus, groups)
        return sent + more, seconds + longer
    return sent, seconds


def analysis_traffic(
    model: Model, parallel: str, cluster: Cluster, dtype: str
) -> tuple[float, float]:
    """Bytes that each GPU sends in an analysis (a mean over the GPUs: owners send less), and the seconds that this takes."""
    count = len(model.modules)
    sent, seconds = cluster.all_reduce(count * (len(COLUMNS) + 1) * 8)
    if parallel == "ddp" or cluster.gpus == 1:
        return sent, seconds
    norms, norm_seconds = cluster.all_reduce(8 * count, count)
    sharing = replace(cluster, gpus=shard_size(parallel, cluster.gpus))
    # What one owner gets from those who share the weights with it, in equal parts: the last ones are padded.
    into_owners = sum(
        (sharing.gpus - 1) * math.ceil(m.weight.shape[0] / sharing.gpus) * m.weight.shape[1]
        for m in model.modules
    )
    into_owners *= parameter_bytes(dtype)
    copies = sharing.gpus if parallel == "hsdp" else 1
    gather_seconds = into_owners / sharing.single + count * HOP_SECONDS.value
    return (
        sent + norms + copies * into_owners / sharing.gpus,
        seconds + norm_seconds + gather_seconds,
    )


def exposed(parallel: str, communication: float, arithmetic: float, micro_batches: int) -> float:
    """Seconds of communication that no arithmetic hides."""
    beside = arithmetic * 2 / 3 / micro_batches if parallel == "ddp" else arithmetic
    return max(0.0, communication - OVERLAP.value * beside)


def by_rank(model: Model, gpus: int) -> list[list[BalancedModule]]:
    """The modules that each rank analyses."""
    ranks: list[list[BalancedModule]] = [[] for _ in range(gpus)]
    for module, owner in zip(
        model.modules, assign_owners([m.cost for m in model.modules], gpus), strict=True
    ):
        ranks[owner].append(module)
    return ranks


def module_seconds(module: BalancedModule, gpu: Gpu) -> float:
    small, large = sorted(module.weight.shape)
    gram = 2 * large * small**2 / (gpu.float32 * 1e12 * GRAM_SHARE.value)
    return gram + small * SOLVER_COLUMN.value + 4 / 3 * small**3 / (SOLVER_TFLOPS.value * 1e12)


def arithmetic_seconds(
    model: Model, gpu: Gpu, rows: int, micro_batches: int, length: int, dtype: str, mfu: float
) -> float:
    """Seconds of one GPU's `rows` in an update."""
    flops = rows * length * llama_flops(model.config, length)
    peak = gpu.float32 if dtype == "float32" else gpu.bf16
    return max(
        flops / (peak * 1e12 * mfu),
        micro_batches * model.config.num_hidden_layers * BLOCK_SECONDS.value,
    )


# ------------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """One model on so many GPUs in one way; bytes on and from each GPU, seconds. problem: why it cannot be, and nothing else is known
    but, where memory is the reason, the memory of one row."""

    config: str
    parameters: int
    gpus: int
    parallel: str
    problem: str | None = None
    memory: Memory | None = None
    micro_batch: int = 0
    micro_batches: int = 0
    arithmetic: float = math.nan
    launches_rule: bool = False  # kernels are too small for the assumed MFU
    communication: float = math.nan  # hidden or not
    exposed: float = math.nan  # communication that is not hidden
    analysis: float = math.nan
    update: float = math.nan
    step_bytes: float = math.nan
    analysis_bytes: float = math.nan

    def row(self) -> dict:
        """As JSON takes it."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def plan(model: Model, parallel: str, gpus: int, args: argparse.Namespace) -> Plan:
    """The plan with the largest micro-batch, a power of two, that fits and divides a GPU's rows."""
    about = (model.name, model.parameters, gpus, parallel)
    if args.total_batch_size % gpus:
        return Plan(
            *about,
            problem=f"{args.total_batch_size} rows do not divide over {gpus} GPUs: --total_batch_size must be a multiple",
        )
    gpu, rows = GPUS[args.gpu], args.total_batch_size // gpus
    cluster = Cluster(gpu, gpus, args.network or gpu.network)
    usable = gpu.memory * 1e9 * USABLE.value
    fitting, memory = 0, memory_of(model, parallel, gpus, 1, args.max_length, args.dtype)
    if memory.peak > usable:
        problem = f"{parallel} needs {memory.peak / 1e9:.0f} GB for one row, {usable / 1e9:.0f} are usable"
        return Plan(*about, problem=problem, memory=memory)
    for micro_batch in (2**k for k in range(rows.bit_length()) if rows % 2**k == 0):
        needed = memory_of(model, parallel, gpus, micro_batch, args.max_length, args.dtype)
        if needed.peak <= usable:
            fitting, memory = micro_batch, needed
    count = rows // fitting
    arithmetic = arithmetic_seconds(model, gpu, rows, count, args.max_length, args.dtype, args.mfu)
    step_bytes, communication = step_traffic(model, parallel, cluster, count, args.dtype)
    analysis_bytes, wire = analysis_traffic(model, parallel, cluster, args.dtype)
    analysis = wire + max(
        sum(module_seconds(m, gpu) for m in mine) for mine in by_rank(model, gpus)
    )
    launches = arithmetic == count * model.config.num_hidden_layers * BLOCK_SECONDS.value
    waiting = exposed(parallel, communication, arithmetic, count)
    update = arithmetic + waiting + analysis / args.every
    return Plan(
        *about, memory=memory, micro_batch=fitting, micro_batches=count, arithmetic=arithmetic, launches_rule=launches, update=update,
        communication=communication, exposed=waiting, analysis=analysis, step_bytes=step_bytes, analysis_bytes=analysis_bytes,
    )  # fmt: skip


def ways(parallel: str, gpus: int) -> tuple[str, ...]:
    """What there is to choose from: nothing on one GPU, and hsdp for whole nodes only."""
    if gpus == 1:
        return ("ddp",)
    whole_nodes = gpus > GPUS_A_NODE.value and gpus % GPUS_A_NODE.value == 0
    if parallel == "hsdp" and not whole_nodes:
        raise UserError(
            f"--parallel hsdp shards within nodes of {GPUS_A_NODE.value} GPUs, and --gpus {gpus} is not several of them"
        )
    if parallel != "auto":
        return (parallel,)
    return PARALLELS if whole_nodes else PARALLELS[:2]


def advised(plans: list[Plan]) -> Plan:
    """The fastest plan that is possible; else the one that comes nearest. The first one where they are equal."""
    possible = [p for p in plans if not p.problem]
    if possible:
        return min(possible, key=lambda p: p.update)
    return min(plans, key=lambda p: p.memory.peak if p.memory else 0)


def remark(chosen: Plan, plans: list[Plan]) -> str:
    """Why this way, and what to know about it."""
    if chosen.problem:
        return chosen.problem
    others = [p for p in plans if p is not chosen]
    notes = [p.problem for p in others if p.problem]
    notes += [
        f"{p.parallel}: {p.update / chosen.update:.2f} times the seconds"
        for p in others
        if not p.problem
    ]
    return "; ".join(notes + ["launch-bound"] * chosen.launches_rule)


# ------------------------------------------------------------------------------------------------------------------ table

HEADINGS = (
    "model", "GPUs", "parallel", "GB: weights", "gradients", "moments", "activations", "logits", "peak", "micro-batch", "s/update",
    "communication", "analysis", "sent a step", "sent an analysis", "remarks",
)  # fmt: skip


def size(bytes_: float) -> str:
    """`7.2 kB`: three digits at most before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if bytes_ < 999.5 or unit == "GB":
            return f"{bytes_:.3g} {unit}" if bytes_ < 999.5 else f"{bytes_:,.0f} {unit}"
        bytes_ /= 1000


def cells(chosen: Plan, every: int, note: str) -> list[str]:
    about = [
        f"{chosen.config} ({chosen.parameters / 1e6:.1f}M)",
        str(chosen.gpus),
        chosen.parallel if chosen.gpus > 1 else "-",
    ]
    m = chosen.memory
    parts = [m.weights, m.gradients, m.moments, m.activations, m.logits, m.peak] if m else []
    memory = [f"{part / 1e9:.1f}" for part in parts] or ["-"] * 6
    if chosen.problem:
        return [*about, *memory, *["-"] * 6, note]
    shares = [f"{part / chosen.update:.1%}" for part in (chosen.exposed, chosen.analysis / every)]
    batch = f"{chosen.micro_batch} x {chosen.micro_batches}"
    return [
        *about,
        *memory,
        batch,
        f"{chosen.update:.3g}",
        *shares,
        size(chosen.step_bytes),
        size(chosen.analysis_bytes),
        note,
    ]


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [list(HEADINGS), ["---"] * len(HEADINGS), *rows]
    )


def preamble(args: argparse.Namespace) -> str:
    gpu = GPUS[args.gpu]
    lines = [
        f"{args.gpu}: {gpu.memory:g} GB, {gpu.bf16:g} TFLOP/s bf16, {gpu.float32:g} float32 (NVIDIA's data sheet), to its node "
        f"{gpu.link:g} GB/s, node to network {args.network or gpu.network:g} GB/s one way (DGX)",
        f"{args.total_batch_size} rows of {args.max_length} tokens an update, {args.dtype}, an analysis every {args.every} updates",
    ]
    values = ASSUMPTIONS | {"MFU": MFU._replace(value=args.mfu)}
    lines += [f"{name} = {a.value:.4g}: {a.what} ({a.source})" for name, a in values.items()]
    return "\n".join(
        [
            "Assumptions",
            *(f"  {line}" for line in lines),
            "Formulas",
            *(f"  {line}" for line in FORMULAS.splitlines()),
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="plan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--configs",
        nargs="+",
        default=CONFIGS,
        metavar="FILE",
        help="model configs (default: from 60m to 7b)",
    )
    parser.add_argument(
        "--gpus",
        nargs="+",
        type=int,
        default=[1, 8, 64, 512],
        metavar="N",
        help="numbers of GPUs (default 1 8 64 512)",
    )
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="their kind (default H100)")
    parser.add_argument(
        "--parallel",
        choices=("auto", *PARALLELS),
        default="auto",
        help="auto: the faster one that fits (default)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bf16_mixed",
        help="as in torchrun_main.py (default bf16_mixed)",
    )
    parser.add_argument(
        "--total_batch_size", type=int, default=512, help="rows in an update (default 512)"
    )
    parser.add_argument("--max_length", type=int, default=256, help="tokens in a row (default 256)")
    parser.add_argument(
        "--every", type=int, default=500, help="updates between two analyses (default 500)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=MFU.value,
        help=f"model FLOPs utilisation (default {MFU.value})",
    )
    parser.add_argument(
        "--network", type=float, metavar="GB/S", help="of a node, one way (default: that of a DGX)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="all numbers, also of what is not advised, as JSON",
    )
    args = parser.parse_args()
    check_numbers(args, ("total_batch_size", "max_length", "every", "mfu", "network"), ())
    if args.mfu > 1:
        raise UserError(f"--mfu {args.mfu}: it is a share, at most 1")
    if min(args.gpus) < 1:
        raise UserError(f"--gpus {min(args.gpus)}: it must be above 0")
    return args


def main() -> None:
    args = parse_arguments()
    rows, results = [], []
    for model in map(read_model, args.configs):
        for gpus in args.gpus:
            plans = [plan(model, parallel, gpus, args) for parallel in ways(args.parallel, gpus)]
            chosen = advised(plans)
            rows.append(cells(chosen, args.every, remark(chosen, plans)))
            results += [p.row() | {"advised": p is chosen} for p in plans]
    print(preamble(args) + "\n\n" + table(rows))
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        values = {name: a._asdict() for name, a in ASSUMPTIONS.items()} | {
            "gpu": GPUS[args.gpu]._asdict()
        }
        values["MFU"]["value"] = args.mfu
        args.output.write_text(
            json.dumps({"settings": settings, "assumptions": values, "plans": results}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
