"""Data-sheet figures of GPUs, and the assumptions of the cost model.

The cost model is in cost_model.py. An assumption is a number that follows neither from the model
nor from a data sheet. plan.py prints all of them with their sources.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Figures of a GPU and of the node that it stands in.

    Args:
        memory: GB.
        bf16: peak rate of dense bfloat16 products on tensor cores, TFLOP/s.
        float32: peak rate of float32 products without TF32, TFLOP/s.
        link: bandwidth from one GPU to the others in its node, GB/s in one direction.
        network: bandwidth from a node to the other nodes, GB/s in one direction.
    """

    memory: float
    bf16: float
    float32: float
    link: float
    network: float


# From NVIDIA's data sheets of the SXM modules (A100: the one of 80 GB). The sheets give the
# bandwidth of NVLink in both directions together: 900 and 600 GB/s. The network is that of a DGX
# with 8 adapters of 400 Gb/s (H100, H200) or 200 Gb/s (A100).
GPUS = {
    "H100": Gpu(memory=80, bf16=989, float32=67, link=450, network=400),
    "H200": Gpu(memory=141, bf16=989, float32=67, link=450, network=400),
    "A100": Gpu(memory=80, bf16=312, float32=19.5, link=300, network=200),
}


class Assumption(NamedTuple):
    """A number that the cost model assumes, what it means, and where it comes from."""

    value: float
    meaning: str
    source: str


MFU = Assumption(0.40, "fraction of the peak rate that a training step reaches", "assumed; --mfu")
USABLE_MEMORY = Assumption(
    75 / 80,
    "fraction of the memory that CUDA, NCCL and fragmentation leave to the training",
    "assumed",
)
BLOCK_SECONDS = Assumption(
    200e-6,
    "shortest time of a block's forward and backward pass, s: 40 kernel launches of 5 us",
    "assumed",
)
GPUS_PER_NODE = Assumption(8, "GPUs in a node", "DGX, HGX")
LINK_EFFICIENCY = Assumption(
    0.8, "fraction of a link's data-sheet bandwidth that a collective reaches", "assumed"
)
HOP_SECONDS = Assumption(5e-6, "latency from one GPU to the next in a collective, s", "assumed")
BUCKET_BYTES = Assumption(
    25 * 2**20,
    "size of the gradient buckets that ddp all-reduces, bytes",
    "torch's default bucket_cap_mb",
)
OVERLAP = Assumption(
    0.8, "fraction of the computation that communication can overlap with", "assumed"
)
WORKSPACE_BYTES = Assumption(
    32 * 2**20, "workspace of cuBLAS, bytes", "PyTorch's default on an H100"
)
SOLVER_COLUMN_SECONDS = Assumption(
    20e-6,
    "shortest time of a GPU's eigenvalue solver for each column of a matrix, s",
    "assumed: not measured yet",
)
SOLVER_TFLOPS = Assumption(
    0.3,
    "rate of the eigenvalue solver for large matrices, TFLOP/s at 4/3 n^3 operations",
    "assumed; Golub & Van Loan, section 8.3",
)
GRAM_EFFICIENCY = Assumption(
    0.5,
    "fraction of the float32 peak rate that Gram products reach, at 2 m n^2 operations",
    "assumed",
)
ASSUMPTIONS = {
    name: value for name, value in list(globals().items()) if isinstance(value, Assumption)
}
