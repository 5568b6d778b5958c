"""The estimates of scripts/cluster/plan.py, compared with calculations by hand and real models."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from peft_pretraining.errors import UserError
from scripts.cluster import cost_model, hardware
from scripts.cluster import plan as command

LAYERS, D, F, V = 12, 768, 2048, 32000  # llama_130m
# setting -> bytes, see the file. The settings are "size parallel GPUs micro-batches micro-batch
# compiled|eager dtype".
PEAKS = json.loads(Path("benchmarks/results/memory_rehearsed.json").read_text())["peak_bytes"]
BLOCK = 4 * D * D + 3 * D * F + 2 * D
N = 2 * V * D + LAYERS * BLOCK + D


@pytest.fixture(scope="module")
def m130():
    return cost_model.read_model("configs/llama_130m.json")


@pytest.fixture(scope="module")
def m7b():
    return cost_model.read_model("configs/llama_7b.json")


def cluster(gpus, kind="H100"):
    return cost_model.Cluster(hardware.GPUS[kind], gpus, hardware.GPUS[kind].network)


def plan(model, parallel, gpus, kind="H100", **changes):
    defaults = {
        "total_batch_size": 512,
        "length": 256,
        "analysis_interval": 500,
        "mfu": 0.4,
        "dtype": "bf16_mixed",
    }
    training = cost_model.Training(**defaults | changes)
    return cost_model.make_plan(model, parallel, cluster(gpus, kind), training)


def test_counts_of_130m(m130):
    assert m130.parameters == N == 134_105_856
    assert (m130.block_parameters, m130.parameters_outside_blocks) == (BLOCK, 2 * V * D + D)
    assert m130.matrix_parameters == V * D + LAYERS * (4 * D * D + 3 * D * F)
    assert len(m130.modules) == 12 * 7 - 1  # all Linears but the first q_proj and the head


def test_memory_of_130m(m130):
    ddp = cost_model.estimate_memory(m130, "ddp", 8, 4, 256, "bf16_mixed", compiled=False)
    assert (ddp.weights, ddp.copies, ddp.moments) == (4 * N, 2 * m130.matrix_parameters, 8 * N)
    assert ddp.gradients == ddp.held_gradients == 4 * N
    in_blocks = 4 * 256 * LAYERS * (26 * D + 8 * F + 4 * 12 + 8)
    head = 4 * 256 * (2 * V + 16 * D) + V * D * (4 + 2)
    assert ddp.activations == in_blocks and ddp.logits == head
    assert ddp.peak == 16 * N + ddp.copies + in_blocks + ddp.logits + 2**25
    fsdp = cost_model.estimate_memory(m130, "fsdp", 8, 4, 256, "bf16_mixed")
    assert (fsdp.weights, fsdp.gradients, fsdp.moments) == (4 * N / 8, 4 * N / 8, 8 * N / 8)
    assert (fsdp.copies, fsdp.held_gradients, fsdp.gathered) == (2 * (2 * V * D + D), 0, 0)
    # With several micro-batches the gradients stay whole until the last one, in float32, and the
    # weights from one micro-batch to the next: 6 bytes a parameter.
    several = cost_model.estimate_memory(m130, "fsdp", 8, 4, 256, "bf16_mixed", micro_batches=2)
    assert several.gradients + several.gathered == 6 * N and several.held_gradients == 4 * N
    assert (
        cost_model.estimate_memory(m130, "hsdp", 64, 4, 256, "bf16_mixed").moments == fsdp.moments
    )
    alone = cost_model.estimate_memory(m130, "ddp", 1, 4, 256, "bfloat16")
    assert (alone.weights, alone.gradients, alone.moments) == (2 * N, 2 * N, 4 * N)


@pytest.mark.parametrize("number", range(len(PEAKS)), ids=list(PEAKS))
def test_the_peak_is_that_of_the_allocator(number):
    """Within 5 % of what PyTorch's allocator for GPUs handed out at most, in every setting."""
    setting, measured = list(PEAKS.items())[number]
    size, parallel, gpus, micro_batches, micro_batch, compiled, dtype = setting.split()
    model = cost_model.read_model(f"configs/llama_{size}.json")
    with pytest.MonkeyPatch.context() as patch:
        if parallel == "hsdp":  # it was rehearsed in groups of two
            patch.setattr(cost_model, "GPUS_PER_NODE", hardware.GPUS_PER_NODE._replace(value=2))
        planned = cost_model.estimate_memory(
            model,
            parallel,
            int(gpus),
            int(micro_batch),
            256,
            dtype,
            int(micro_batches),
            compiled == "compiled",
        )
    assert planned.peak == pytest.approx(measured, rel=0.05)


def test_wire_of_130m(m130):
    step, seconds = cost_model.step_traffic(m130, "ddp", cluster(8), 2, "bf16_mixed")
    assert step == 2 * 7 / 8 * 4 * N  # 939 MB, whatever the micro-batches
    assert seconds == pytest.approx(
        step / (0.8 * 450e9) + math.ceil(4 * N / (25 * 2**20)) * 2 * 3 * 5e-6
    )
    step, _ = cost_model.step_traffic(m130, "fsdp", cluster(8), 2, "bf16_mixed")
    assert step == 7 / 8 * (2 * (N + 2 * LAYERS * BLOCK) + 4 * N)
    step, _ = cost_model.step_traffic(m130, "hsdp", cluster(64), 1, "bf16_mixed")
    assert step == 7 / 8 * (2 * (N + LAYERS * BLOCK) + 4 * N) + 2 * 7 / 8 * 4 * N / 8
    analysis, _ = cost_model.analysis_traffic(m130, "ddp", cluster(8), "bf16_mixed")
    assert analysis == 2 * 7 / 8 * 83 * 11 * 8  # 12.8 kB
    analysis, _ = cost_model.analysis_traffic(m130, "fsdp", cluster(8), "bf16_mixed")
    matrices = 12 * (4 * D * D + 3 * D * F) - D * D
    assert analysis == pytest.approx(2 * 7 / 8 * 83 * 12 * 8 + 7 / 8 * matrices * 4 / 8)


def test_nothing_is_sent_on_one_gpu(m130):
    for parallel in ("ddp", "fsdp"):
        assert cost_model.step_traffic(m130, parallel, cluster(1), 4, "bf16_mixed") == (0, 0)
        assert cost_model.analysis_traffic(m130, parallel, cluster(1), "bf16_mixed") == (0, 0)


def test_the_plan_of_130m_on_8_gpus(m130):
    found = plan(m130, "ddp", 8)
    assert (found.micro_batch, found.micro_batches) == (64, 1)
    flops = 64 * 256 * (6 * m130.matrix_parameters + 12 * LAYERS * D * 256)
    assert found.arithmetic == pytest.approx(flops / (989e12 * 0.4))
    assert found.exposed == 0 < found.communication
    wider = plan(m130, "ddp", 64)
    assert (
        wider.exposed == pytest.approx(wider.communication - 0.8 * 2 / 3 * wider.arithmetic)
        and wider.exposed > 0
    )
    assert cost_model.exposed_communication("ddp", 10.0, 3.0, micro_batches=2) == pytest.approx(
        10 - 0.8 * 3 * 2 / 3 / 2
    )
    assert cost_model.exposed_communication("fsdp", 10.0, 3.0, micro_batches=2) == pytest.approx(
        10 - 0.8 * 3
    )
    assert found.update == found.arithmetic + found.exposed + found.analysis / 500
    assert plan(m130, "ddp", 8, mfu=0.2).arithmetic == pytest.approx(2 * found.arithmetic)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_micro_batch_is_the_largest_that_fits(m130, m7b, parallel):
    for model, gpus in ((m130, 1), (m7b, 8)):
        found = plan(model, parallel, gpus)
        usable = 75e9
        if found.problem:
            assert (
                cost_model.estimate_memory(model, parallel, gpus, 1, 256, "bf16_mixed").peak
                > usable
            )
            continue
        rows = 512 // gpus
        assert found.micro_batch * found.micro_batches == rows and found.memory.peak <= usable
        larger = [2**k for k in range(12) if found.micro_batch < 2**k <= rows]
        for size in larger:
            needed = cost_model.estimate_memory(
                model, parallel, gpus, size, 256, "bf16_mixed", rows // size
            )
            assert needed.peak > usable


def test_micro_batches_divide_any_number_of_sequences(m130):
    found = plan(m130, "ddp", 8, total_batch_size=8 * 12)
    assert (found.micro_batch, found.micro_batches) == (4, 3)


@pytest.mark.parametrize("gpus", [7, 1024])
def test_sequences_that_cannot_be_divided_among_the_gpus_are_a_problem(m130, gpus):
    found = plan(m130, "ddp", gpus)
    assert (
        f"512 sequences cannot be divided evenly among {gpus} GPUs" in found.problem
        and math.isnan(found.update)
    )


def test_the_fastest_feasible_plan(m130, m7b):
    def advice(model, gpus, **changes):
        return command.fastest_feasible(
            [plan(model, way, gpus, **changes) for way in command.parallel_strategies("auto", gpus)]
        )

    assert advice(m130, 64).parallel == "ddp"
    assert advice(m7b, 8).parallel == "fsdp"
    assert (
        "one sequence" in advice(m7b, 1).problem and "one sequence" in plan(m7b, "ddp", 8).problem
    )
    assert plan(m7b, "ddp", 8, kind="H200").problem is None  # 123 of 132 GB
    assert plan(m7b, "ddp", 8, dtype="bfloat16").problem is None  # 55 of 75 GB


def test_more_gpus_share_the_work(m130, m7b):
    for model in (m130, m7b):
        analyses = [
            max(sum(m.cost for m in mine) for mine in cost_model.modules_by_rank(model, gpus))
            for gpus in (1, 2, 8, 64, 512)
        ]
        assert analyses == sorted(analyses, reverse=True) and analyses[0] > 6 * analyses[2]
        assert sum(len(mine) for mine in cost_model.modules_by_rank(model, 512)) == len(
            model.modules
        )
        states = [
            cost_model.estimate_memory(model, "fsdp", gpus, 1, 256, "bf16_mixed").moments
            for gpus in (1, 8, 64)
        ]
        assert states[0] == 8 * states[1] == 64 * states[2]
        arithmetic = [plan(model, "fsdp", gpus).arithmetic for gpus in (8, 64)]
        assert arithmetic[0] > arithmetic[1]


def test_a_ring_through_nodes_is_no_faster_than_their_network():
    assert (
        cluster(8).ring_bandwidth == 0.8 * 450e9
        and cluster(16).ring_bandwidth == 0.8 * 400e9
        and cluster(16).gather_bandwidth == 0.8 * 50e9
    )
    assert cost_model.Cluster(hardware.GPUS["H100"], 16, 25.0).ring_bandwidth == 0.8 * 25e9


def test_the_command(tmp_path, monkeypatch, capsys):
    output = tmp_path / "plan.json"
    words = [
        "--configs",
        "configs/llama_130m.json",
        "--gpus",
        "1",
        "8",
        "7",
        "--output",
        str(output),
    ]
    monkeypatch.setattr(sys, "argv", ["plan.py", *words])
    command.main()
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| 130m")]
    assert len(rows) == 3 and all(row.count("|") == len(command.HEADINGS) + 1 for row in rows)
    assert (
        "| 64 x 1 |" in rows[1]
        and "939 MB | 12.8 kB" in rows[1]
        and "512 sequences cannot be divided evenly among 7" in rows[2]
    )
    assert all(f"{name} = " in printed for name in hardware.ASSUMPTIONS)
    saved = json.loads(output.read_text())["plans"]
    assert [(p["gpus"], p["parallel"], p["advised"]) for p in saved[:3]] == [
        (1, "ddp", True),
        (8, "ddp", True),
        (8, "fsdp", False),
    ]


def test_the_documentation_shows_what_is_printed(monkeypatch, capsys):
    text = Path("docs/many_gpus.md").read_text()
    words = re.search(r"python scripts/cluster/(plan\.py .*?)```", text, re.S)[1]
    monkeypatch.setattr(sys, "argv", words.replace("\\\n", " ").split())
    command.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 10 and "\n".join(printed) in text


def test_wrong_flags_are_refused_in_a_sentence(monkeypatch):
    for words, names in (
        (["--gpus", "0"], "--gpus"),
        (["--mfu", "2"], "--mfu"),
        (["--total_batch_size", "0"], "--total_batch_size"),
    ):
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        with pytest.raises(UserError, match=names):
            command.parse_arguments()
