"""Estimate memory, time and communication of a training run on 1 to many GPUs.

Numbers of parameters and shapes are those of the real model, built on torch's meta device. The
division of the analysis among the ranks is alphadecay's own. Everything else follows from the
assumptions in hardware.py and from the formulas below. Sizes are in bytes and times in seconds
unless a docstring says otherwise.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from alphadecay.distributed import assign_owners
from alphadecay.modules import BalancedModule, balanced_modules
from alphadecay.spectral.engine import BATCH_BYTES
from alphadecay.spectral.statistics import COLUMNS
from peft_pretraining.model.config import LlamaConfig, load_config
from peft_pretraining.model.linear_cross_entropy import CHUNK_BYTES
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.train.flops import llama_flops
from scripts.cluster.hardware import (
    BLOCK_SECONDS,
    BUCKET_BYTES,
    GPUS_PER_NODE,
    GRAM_EFFICIENCY,
    HOP_SECONDS,
    LINK_EFFICIENCY,
    OVERLAP,
    SOLVER_COLUMN_SECONDS,
    SOLVER_TFLOPS,
    USABLE_MEMORY,
    WORKSPACE_BYTES,
    Gpu,
)

FORMULAS = """\
Symbols: N parameters, L blocks, d hidden size, S tokens in a sequence, W GPUs, c bytes of a number
    in the compute type. hsdp is --parallel fsdp that shards within a node and copies between nodes.
Memory: weights, gradients and two Adam moments, all in the type of the parameters. fsdp divides
    them by the number of GPUs (hsdp: by the GPUs of a node). The peak is the largest of three:
    1. In the loss: weights, moments, activations, logits, and the copies of weights in the compute
       type: under ddp with bf16_mixed those of all matrices, under fsdp the embedding, the last
       norm and the head in full. Gradients are there too under ddp, whose buckets stay, and from
       the second micro-batch on. fsdp then holds those of all weights in full, in the type in which
       they are summed (float32 under bf16_mixed).
    2. At the end of a backward pass: weights, moments and gradients. fsdp also keeps all weights in
       full if another micro-batch follows.
    3. In an analysis: weights, moments, gradients, and what the analysis needs.
Activations: c (5 d + q + 2 kv + 4 f) bytes for each token and block, under autocast
    20 d + 2 (q + 2 kv) + 8 f, and for both 4 bytes for each head and 8 for the norms. q and kv are
    the widths of queries and keys, f is the width of the MLP. torch.compile keeps c f bytes less,
    and 8 d less under autocast.
Logits: c bytes times the vocabulary times the tokens in a chunk of the loss, and what is larger:
    the gradient of the head, in float32 and once more in the compute type, or, if c is 2 and the
    loss is not compiled, the logits' float32 copy. They include four copies of the last hidden
    states (under autocast 16 d bytes for each token).
Time of an update: computation + communication that does not overlap with it + analysis / every.
    Computation takes (6 N + 12 L d S) tokens / (peak x MFU), and at least BLOCK_SECONDS for each
    block and micro-batch ("launch-bound"). ddp's communication can overlap with the backward pass
    of the last micro-batch, which is 2/3 of its time, and fsdp's with all computation; OVERLAP is
    the fraction of these that is usable.
Communication of an update: ddp sends 2 (W-1)/W of the gradients (ring all-reduce). fsdp sends, for
    each update, (W-1)/W of the weights in the compute type for the first forward pass and of those
    of the blocks for each backward pass (all-gather), and (W-1)/W of the gradients in the type in
    which they are summed (reduce-scatter). hsdp does so within a node and all-reduces each GPU's
    shard of the gradients between nodes. A ring that spans nodes runs
    at the bandwidth of a node's network, which its adapters share. The rings of hsdp between nodes
    have one adapter each. An all-reduce takes 2 log2 W hops (tree), the others take W-1.
Analysis: each rank analyses the modules that alphadecay assigns to it, and the slowest rank
    determines the time. ddp all-reduces a float64 table [modules, columns]. fsdp also sends each
    matrix to its owner through that GPU's own adapter, one matrix after the other, in equal shards
    of whole rows, and all-reduces the norm of each gradient. hsdp sends each matrix to every GPU
    of a node instead.
Not included: data loading, evaluation, checkpoints, --activation_checkpointing, eigenvalues that
    need float64 products, and a few numbers in each step (token counts, the check for finite
    gradients). The formulas of the memory describe what PyTorch's allocator hands out, on a GPU or
    rehearsed without one; no constant of time has been fitted to a run."""


# --------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Model:
    """What the cost model needs to know of a model.

    Args:
        name: name of the config file without `llama_`.
        config: sizes of the model.
        parameters: number of parameters.
        matrix_parameters: parameters in the weights of Linear layers, including the head. Autocast
            keeps copies of these.
        block_parameters: parameters of one block.
        modules: the modules that the method balances.
    """

    name: str
    config: LlamaConfig
    parameters: int
    matrix_parameters: int
    block_parameters: int
    modules: list[BalancedModule]

    @property
    def parameters_outside_blocks(self) -> int:
        """Number of parameters in embedding, head and last norm."""
        return self.parameters - self.config.num_hidden_layers * self.block_parameters


def read_model(path: str) -> Model:
    """Return the sizes of a model without allocating its weights.

    Args:
        path: the config file.

    Raises:
        UserError: if the training would refuse the config.
    """
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config)
    linear_layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return Model(
        name=Path(path).stem.removeprefix("llama_"),
        config=config,
        parameters=sum(p.numel() for p in model.parameters()),
        matrix_parameters=sum(layer.weight.numel() for layer in linear_layers),
        block_parameters=sum(p.numel() for p in model.model.layers[0].parameters()),
        modules=balanced_modules(model),
    )


def parameter_bytes(dtype: str) -> int:
    """Return the bytes of a stored parameter under `--dtype`."""
    return 2 if dtype == "bfloat16" else 4


def compute_bytes(dtype: str) -> int:
    """Return the bytes of a number in the forward pass under `--dtype`."""
    return 4 if dtype == "float32" else 2


# -------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs the most memory.

    Args:
        weights: stored weights.
        copies: weights in full or in the compute type, while the loss is computed.
        gradients: at the end of a backward pass.
        held_gradients: those that are there while the loss is computed.
        gathered: weights in full at the end of a backward pass that another micro-batch follows.
        moments: of the optimizer.
        activations: what the blocks keep for the backward pass.
        logits: what the loss needs.
        analysis: what an analysis needs, with the gradients that are there.
    """

    weights: float
    copies: float
    gradients: float
    held_gradients: float
    gathered: float
    moments: float
    activations: float
    logits: float
    analysis: float

    @property
    def peak(self) -> float:
        """Bytes at the moment of the highest use."""
        in_the_loss = self.copies + self.held_gradients + self.activations + self.logits
        after_backward = self.gradients + self.gathered
        state = self.weights + self.moments + WORKSPACE_BYTES.value
        return state + max(in_the_loss, after_backward, self.analysis)


def estimate_memory(
    model: Model,
    parallel: str,
    gpus: int,
    micro_batch: int,
    length: int,
    dtype: str,
    micro_batches: int = 1,
    compiled: bool = True,
) -> Memory:
    """Return the memory of a training step; see FORMULAS.

    Args:
        model: the model.
        parallel: `ddp`, `fsdp` or `hsdp`.
        gpus: number of GPUs.
        micro_batch: sequences in a micro-batch of one GPU.
        length: tokens in a sequence.
        dtype: as in torchrun_main.py.
        micro_batches: micro-batches of each GPU in an update.
        compiled: the blocks are compiled, `--compile on`.
    """
    stored, compute = parameter_bytes(dtype), compute_bytes(dtype)
    tokens, several = micro_batch * length, micro_batches > 1
    state = model.parameters * stored / shard_size(parallel, gpus)
    if parallel == "ddp":
        copies = model.matrix_parameters * compute if dtype == "bf16_mixed" else 0
        gradients, gathered, own_gradients = state, 0, state
        held = state if several or gpus > 1 else 0
    else:
        copies = model.parameters_outside_blocks * compute
        whole = model.parameters * stored  # under bf16_mixed they are summed in float32, too
        gradients, held = (whole, whole) if several else (state, 0)
        gathered = model.parameters * compute if several else 0
        own_gradients = state
    return Memory(
        weights=state,
        copies=copies,
        gradients=gradients,
        held_gradients=held,
        gathered=gathered,
        moments=2 * state,
        activations=tokens
        * model.config.num_hidden_layers
        * activation_bytes(model.config, dtype, compiled),
        logits=loss_memory(model.config, tokens, dtype, compiled),
        analysis=own_gradients + analysis_memory(model, parallel, gpus, dtype),
    )


def loss_memory(config: LlamaConfig, tokens: int, dtype: str, compiled: bool) -> float:
    """Return the bytes that the chunked loss of a micro-batch needs; see FORMULAS.

    Args:
        config: sizes of the model.
        tokens: tokens of the micro-batch.
        dtype: as in torchrun_main.py.
        compiled: the loss is compiled, too.
    """
    compute, head = compute_bytes(dtype), config.vocab_size * config.hidden_size
    chunk = min(tokens, CHUNK_BYTES["cuda"] // (4 * config.vocab_size))
    logits = chunk * config.vocab_size * compute
    gradient = (4 + (compute if compute < 4 else 0)) * head  # the sum, and what a chunk adds
    copy = 0 if compiled or compute == 4 else 4 * chunk * config.vocab_size
    # The copy is there before the gradient of its chunk, but with the sum of those before.
    most = max(gradient, copy + (4 * head if tokens > chunk else 0))
    hidden = tokens * config.hidden_size * (16 if dtype == "bf16_mixed" else 4 * compute)
    return logits + most + hidden


def shard_size(parallel: str, gpus: int) -> int:
    """Return the number of GPUs that hold one copy of the weights together."""
    return {"ddp": 1, "fsdp": gpus, "hsdp": int(GPUS_PER_NODE.value)}[parallel]


def activation_bytes(config: LlamaConfig, dtype: str, compiled: bool) -> int:
    """Return the bytes that one block keeps of one token for the backward pass; see FORMULAS."""
    d, heads = config.hidden_size, config.num_attention_heads
    attention = (heads + 2 * config.num_key_value_heads) * (d // heads)
    # Compiled, silu(gate) is computed again.
    mlp = (3 if compiled else 4) * config.intermediate_size
    statistics = 4 * heads + 8  # of the attention's softmax and of the two norms, float32
    if dtype != "bf16_mixed":
        return compute_bytes(dtype) * (5 * d + attention + mlp) + statistics
    # The residual stream is in float32, and each projection has a bf16 copy of its input; compiled,
    # projections with the same input share it.
    return (12 if compiled else 20) * d + 2 * (attention + mlp) + statistics


def analysis_memory(model: Model, parallel: str, gpus: int, dtype: str) -> float:
    """Return the bytes of an analysis on the GPU that needs the most.

    They are three times the Gram matrices (the solver copies them twice), one matrix in float32,
    and, unless under ddp, all matrices that the rank analyses and the shards of the last one.

    Args:
        model: the model.
        parallel: `ddp`, `fsdp` or `hsdp`.
        gpus: number of GPUs.
        dtype: as in torchrun_main.py.
    """
    largest = max(m.weight.numel() for m in model.modules)
    gram_side = max(min(m.weight.shape) for m in model.modules)
    needed = 3 * max(BATCH_BYTES, 4 * gram_side**2) + 4 * largest
    if parallel != "ddp":
        gathered = [
            sum(m.weight.numel() for m in modules) for modules in modules_by_rank(model, gpus)
        ]
        needed += parameter_bytes(dtype) * (max(gathered) + 2 * largest)
    return needed


# ------------------------------------------------------------------------------- communication


@dataclass(frozen=True)
class Cluster:
    """GPUs and their connections.

    Args:
        gpu: the kind of GPU.
        gpus: number of GPUs.
        network: bandwidth of a node, GB/s in one direction.
    """

    gpu: Gpu
    gpus: int
    network: float

    @property
    def ring_bandwidth(self) -> float:
        """Bytes per second and GPU in a ring through all GPUs."""
        return self._bandwidth(self.network)

    @property
    def gather_bandwidth(self) -> float:
        """Bytes per second into one GPU from all others."""
        return self._bandwidth(self.network / GPUS_PER_NODE.value)

    def _bandwidth(self, network: float) -> float:
        """Return bytes per second, limited by `network` (GB/s) if there are several nodes."""
        one_node = self.gpus <= GPUS_PER_NODE.value
        link = self.gpu.link if one_node else min(self.gpu.link, network)
        return LINK_EFFICIENCY.value * 1e9 * link

    @property
    def fraction_of_others(self) -> float:
        """(W-1)/W, for W GPUs."""
        return (self.gpus - 1) / self.gpus

    def all_reduce(self, size: float, count: int = 1) -> tuple[float, float]:
        """Return the bytes that each GPU sends in all-reduces, and the seconds that they take.

        Args:
            size: bytes of all all-reduces together.
            count: number of all-reduces.
        """
        sent = 2 * self.fraction_of_others * size
        hops = count * 2 * math.ceil(math.log2(self.gpus))
        return sent, sent / self.ring_bandwidth + hops * HOP_SECONDS.value


def step_traffic(
    model: Model, parallel: str, cluster: Cluster, micro_batches: int, dtype: str
) -> tuple[float, float]:
    """Return the bytes that each GPU sends in an update, and the seconds that this takes.

    Args:
        model: the model.
        parallel: `ddp`, `fsdp` or `hsdp`.
        cluster: the GPUs.
        micro_batches: micro-batches of each GPU in an update.
        dtype: as in torchrun_main.py.
    """
    if parallel == "ddp":
        size = model.parameters * parameter_bytes(dtype)
        return cluster.all_reduce(size, math.ceil(size / BUCKET_BYTES.value))
    groups = model.config.num_hidden_layers + 1  # one for each block, and one for the rest
    shards = replace(cluster, gpus=shard_size(parallel, cluster.gpus))
    # After the forward pass of a micro-batch the blocks are gathered again for its backward pass,
    # after which they stay gathered until the next one's forward pass is over.
    in_blocks = model.parameters - model.parameters_outside_blocks
    gathered = compute_bytes(dtype) * (model.parameters + micro_batches * in_blocks)
    reduced = parameter_bytes(dtype) * model.parameters
    sent = shards.fraction_of_others * (gathered + reduced)
    hops = (2 + micro_batches) * groups * (shards.gpus - 1)
    seconds = sent / shards.ring_bandwidth + hops * HOP_SECONDS.value
    if parallel == "hsdp":
        nodes = Cluster(
            gpu=cluster.gpu._replace(link=cluster.network / shards.gpus),
            gpus=cluster.gpus // shards.gpus,
            network=cluster.network,
        )
        node_bytes, node_seconds = nodes.all_reduce(reduced / shards.gpus, groups)
        return sent + node_bytes, seconds + node_seconds
    return sent, seconds


def analysis_traffic(
    model: Model, parallel: str, cluster: Cluster, dtype: str
) -> tuple[float, float]:
    """Return the bytes that each GPU sends in an analysis, and the seconds that this takes.

    The bytes are a mean over the GPUs: a GPU that analyses many modules sends less.

    Args:
        model: the model.
        parallel: `ddp`, `fsdp` or `hsdp`.
        cluster: the GPUs.
        dtype: as in torchrun_main.py.
    """
    count = len(model.modules)
    sent, seconds = cluster.all_reduce(count * (len(COLUMNS) + 1) * 8)
    if parallel == "ddp" or cluster.gpus == 1:
        return sent, seconds
    norm_bytes, norm_seconds = cluster.all_reduce(8 * count, count)
    shards = replace(cluster, gpus=shard_size(parallel, cluster.gpus))
    # What an owner receives from the other GPUs with a shard. All shards of a matrix have the same
    # number of rows, because the last ones are padded.
    gathered = sum(
        (shards.gpus - 1) * math.ceil(m.weight.shape[0] / shards.gpus) * m.weight.shape[1]
        for m in model.modules
    ) * parameter_bytes(dtype)
    receivers = shards.gpus if parallel == "hsdp" else 1
    gather_seconds = gathered / shards.gather_bandwidth + count * HOP_SECONDS.value
    return (
        sent + norm_bytes + receivers * gathered / shards.gpus,
        seconds + norm_seconds + gather_seconds,
    )


def exposed_communication(
    parallel: str, communication: float, computation: float, micro_batches: int
) -> float:
    """Return the seconds of communication that do not overlap with computation.

    Args:
        parallel: `ddp`, `fsdp` or `hsdp`.
        communication: seconds of communication in an update.
        computation: seconds of computation in an update.
        micro_batches: micro-batches of each GPU in an update.
    """
    overlapping = computation * 2 / 3 / micro_batches if parallel == "ddp" else computation
    return max(0.0, communication - OVERLAP.value * overlapping)


# ---------------------------------------------------------------------------------------- time


def modules_by_rank(model: Model, gpus: int) -> list[list[BalancedModule]]:
    """Return the modules that each rank analyses."""
    ranks: list[list[BalancedModule]] = [[] for _ in range(gpus)]
    owners = assign_owners([m.cost for m in model.modules], gpus)
    for module, owner in zip(model.modules, owners, strict=True):
        ranks[owner].append(module)
    return ranks


def module_seconds(module: BalancedModule, gpu: Gpu) -> float:
    """Return the time of one module's analysis."""
    small, large = sorted(module.weight.shape)
    gram = 2 * large * small**2 / (gpu.float32 * 1e12 * GRAM_EFFICIENCY.value)
    latency = small * SOLVER_COLUMN_SECONDS.value
    return gram + latency + 4 / 3 * small**3 / (SOLVER_TFLOPS.value * 1e12)


def analysis_computation(model: Model, gpu: Gpu, gpus: int) -> float:
    """Return the seconds of an analysis on the slowest rank, without communication."""
    return max(
        sum(module_seconds(m, gpu) for m in modules) for modules in modules_by_rank(model, gpus)
    )


@dataclass(frozen=True)
class Training:
    """Settings of a training run.

    Args:
        total_batch_size: sequences in an update, on all GPUs together.
        length: tokens in a sequence.
        dtype: as in torchrun_main.py.
        analysis_interval: updates between two analyses.
        mfu: fraction of the peak rate that a training step reaches.
        compiled: the blocks are compiled.
    """

    total_batch_size: int
    length: int
    dtype: str
    analysis_interval: int
    mfu: float
    compiled: bool = True


def computation_seconds(
    model: Model, gpu: Gpu, training: Training, sequences: int, micro_batches: int
) -> tuple[float, bool]:
    """Return the time that one GPU computes in an update, and True if it is launch-bound.

    A step is launch-bound if its kernels are too small to reach the assumed MFU.

    Args:
        model: the model.
        gpu: the kind of GPU.
        training: settings of the run.
        sequences: sequences of the GPU in an update.
        micro_batches: micro-batches that they are divided into.
    """
    flops = sequences * training.length * llama_flops(model.config, training.length)
    peak = gpu.float32 if training.dtype == "float32" else gpu.bf16
    at_mfu = flops / (peak * 1e12 * training.mfu)
    launches = micro_batches * model.config.num_hidden_layers * BLOCK_SECONDS.value
    return max(at_mfu, launches), launches >= at_mfu


# ---------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Plan:
    """Estimates for one model, number of GPUs and parallel strategy.

    Args:
        config: name of the model.
        parameters: number of its parameters.
        gpus: number of GPUs.
        parallel: `ddp`, `fsdp` or `hsdp`.
        problem: why the run is impossible; None if it is possible. All estimates below are then
            unknown, except the memory of one sequence if memory is the reason.
        memory: bytes on the fullest GPU.
        micro_batch: sequences in a micro-batch of one GPU.
        micro_batches: micro-batches of each GPU in an update.
        arithmetic: seconds of computation in an update.
        launch_bound: the kernels are too small to reach the assumed MFU.
        communication: seconds of communication in an update, whether or not it overlaps.
        exposed: seconds of communication that do not overlap with computation.
        analysis: seconds of an analysis.
        update: seconds of an update, including its share of the analyses.
        step_bytes: bytes that each GPU sends in an update.
        analysis_bytes: bytes that each GPU sends in an analysis.
    """

    config: str
    parameters: int
    gpus: int
    parallel: str
    problem: str | None = None
    memory: Memory | None = None
    micro_batch: int = 0
    micro_batches: int = 0
    arithmetic: float = math.nan
    launch_bound: bool = False
    communication: float = math.nan
    exposed: float = math.nan
    analysis: float = math.nan
    update: float = math.nan
    step_bytes: float = math.nan
    analysis_bytes: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with None for unknown numbers, because JSON has no NaN."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in asdict(self).items()
        }


def make_plan(model: Model, parallel: str, cluster: Cluster, training: Training) -> Plan:
    """Estimate a run with the largest micro-batch that fits into the memory.

    The micro-batch is a power of two that divides the sequences of a GPU.

    Args:
        model: the model.
        parallel: `ddp`, `fsdp` or `hsdp`.
        cluster: the GPUs.
        training: settings of the run.
    """
    gpus, gpu, batch, dtype = cluster.gpus, cluster.gpu, training.total_batch_size, training.dtype
    impossible = Plan(model.name, model.parameters, gpus, parallel)
    if batch % gpus:
        return replace(
            impossible,
            problem=f"{batch} sequences cannot be divided evenly among {gpus} GPUs: "
            "--total_batch_size must be a multiple of the number of GPUs",
        )
    sequences, usable = batch // gpus, gpu.memory * 1e9 * USABLE_MEMORY.value
    sizes = [2**k for k in range(sequences.bit_length()) if sequences % 2**k == 0]
    memories = {
        size: estimate_memory(
            model,
            parallel,
            gpus,
            size,
            training.length,
            dtype,
            sequences // size,
            training.compiled,
        )
        for size in sizes
    }
    fitting = [size for size in sizes if memories[size].peak <= usable]
    if not fitting:
        problem = (
            f"{parallel} needs {memories[1].peak / 1e9:.0f} GB for one sequence, "
            f"{usable / 1e9:.0f} GB are usable"
        )
        return replace(impossible, problem=problem, memory=memories[1])
    micro_batch = max(fitting)
    micro_batches = sequences // micro_batch
    computation, launch_bound = computation_seconds(model, gpu, training, sequences, micro_batches)
    step_bytes, communication = step_traffic(model, parallel, cluster, micro_batches, dtype)
    analysis_bytes, transfer = analysis_traffic(model, parallel, cluster, dtype)
    analysis = transfer + analysis_computation(model, gpu, gpus)
    exposed = exposed_communication(parallel, communication, computation, micro_batches)
    return replace(
        impossible,
        memory=memories[micro_batch],
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        arithmetic=computation,
        launch_bound=launch_bound,
        communication=communication,
        exposed=exposed,
        analysis=analysis,
        update=computation + exposed + analysis / training.analysis_interval,
        step_bytes=step_bytes,
        analysis_bytes=analysis_bytes,
    )
