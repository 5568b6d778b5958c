"""Throughput, MFU, the meter, the profile and the collector, each alone."""

import dataclasses
import types
from pathlib import Path

import pytest
import torch

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train import throughput
from peft_pretraining.train.throughput import ThroughputMeter, WorkPerStep, peak_memory

CPU = torch.device("cpu")
ALONE, SECOND = DistributedContext(0, 0, 1, CPU), DistributedContext(1, 1, 2, CPU)

TEXT = WorkPerStep(
    "tokens",
    batch_size=4,
    length=100,
    flops=5_000,
    peak_flops=1e5,
    peak_source="data sheet",
    world_size=2,
)


@pytest.fixture
def now(monkeypatch):
    """The time that the meter reads, in a list so that a test can change it."""
    hands = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: hands[0])
    return hands


def data_that_take(seconds, now):
    for step in range(2):
        now[0] += seconds
        yield step


def test_rates_since_the_last_logged_line(now):
    """Two updates of 4 rows in 2 s after a resumed run's first; 3 s of evaluation do not count."""
    meter = ThroughputMeter(TEXT, update=10, items=3_000, device=CPU)
    now[0] += 4
    meter.rates(11, 3_300)
    for _ in meter.time_data(data_that_take(0.125, now)):
        now[0] += 0.5
    meter.add_analysis(0.125, True)
    with meter.exclude():
        now[0] += 3
    now[0] += 0.75
    record = meter.rates(13, 3_900)
    assert record.pop("peak_memory_bytes") > 10e6
    mfu = 8 * 5_000 / 2 / 1e5
    wanted = {
        "throughput_tokens": 300,
        "throughput_examples": 4,
        "throughput_batches": 1,
        "throughput_padded_tokens": 400,
        "mfu": mfu,
        "useful_mfu": 0.75 * mfu,
        "data_wait_seconds": 0.25,
        "analysis_seconds": 0.125,
        "seconds": 6,
    }
    assert record == pytest.approx(wanted)
    summary = meter.summary()
    assert summary.pop("peak_memory_bytes") > 10e6
    wanted = {
        "updates": 3,
        "train_seconds": 6,
        "tokens_per_second": 150,
        "examples_per_second": 2,
        "batches_per_second": 0.5,
        "padded_tokens_per_second": 200,
        "mfu": mfu / 2,
        "useful_mfu": 0.75 * mfu / 2,
        "data_wait_seconds": 0.25,
        "data_wait_share": 0.25 / 6,
        "analyses": 1,
        "analysis_seconds": 0.125,
        "analysis_share": 0.125 / 6,
    }
    assert summary == pytest.approx(wanted)


def test_images_have_no_pads(now):
    meter = ThroughputMeter(
        WorkPerStep(
            "images",
            batch_size=8,
            length=1,
            flops=500,
            peak_flops=1e4,
            peak_source="",
            world_size=1,
        ),
        0,
        0,
        CPU,
    )
    now[0] += 2
    record = meter.rates(1, 8)
    assert record["throughput_images"] == 4 and record["mfu"] == 0.2
    assert not {"useful_mfu", "throughput_padded_images"} & set(record)


def test_run_json_has_the_peak_of_one_process():
    work = WorkPerStep.measure("tokens", 4, 100, 5_000, torch.float32, ALONE)
    assert work.record() == {
        "flops_per_token": 50,
        "peak_flops": work.peak_flops,
        "peak_source": "measured matrix product",
    }
    assert TEXT.record()["peak_flops"] == 5e4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux writes it down")
def test_memory_is_the_most_that_was_resident():
    values = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory(CPU) == pytest.approx(int(values["VmHWM"].split()[0]) * 1024, rel=0.05)


def test_memory_is_that_of_the_ranks_own_gpu(monkeypatch):
    """Rank 1 of a node reports its own GPU, in each logged line and in the summary."""
    bytes_of = {0: 5_000, 1: 7_000}

    def allocated(device=None):
        return bytes_of[0 if device is None else device.index]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated)
    assert [peak_memory(torch.device("cuda", index)) for index in (0, 1)] == [5_000, 7_000]
    meter = ThroughputMeter(TEXT, 0, 0, torch.device("cuda", 1))
    assert meter.rates(1, 100)["peak_memory_bytes"] == 7_000
    assert meter.summary()["peak_memory_bytes"] == 7_000


def test_the_measurement_of_the_peak_is_not_the_runs_memory(monkeypatch):
    """Each rank measures its own device, and forgets the memory of the measurement."""
    calls = []
    monkeypatch.setattr(
        throughput, "peak_flops", lambda device, dtype: (calls.append(device), (2e12, "test"))[1]
    )
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    device = torch.device("cuda", 1)
    ranks = types.SimpleNamespace(
        device=device, world_size=2, barrier=lambda: calls.append("barrier"), sum=lambda x: 2 * x
    )
    work = WorkPerStep.measure("tokens", 4, 100, 5_000, torch.bfloat16, ranks)
    assert calls == ["barrier", device, device]
    assert work.peak_flops == 4e12 and work.record()["peak_flops"] == 2e12


def test_the_summary_of_a_continued_run_covers_all_processes(now):
    """Two processes give the summary of one that makes the same updates in the same time."""

    def updates(meter, first, last):
        for update in range(first, last + 1):
            now[0] += 2
            meter.add_analysis(0.5, update % 2 == 0)
            for _ in meter.time_data(data_that_take(0.25, now)):
                pass
            meter.rates(update, 300 * update)

    whole = ThroughputMeter(TEXT, 0, 0, CPU)
    updates(whole, 1, 6)
    first = ThroughputMeter(TEXT, 0, 0, CPU)
    updates(first, 1, 4)
    totals = first.totals()
    now[0] += 1_000  # between the processes
    second = ThroughputMeter(TEXT, 4, 1_200, CPU, totals)
    updates(second, 5, 6)
    assert second.summary() == pytest.approx(whole.summary())
    assert second.rates(7, 2_100)["seconds"] == pytest.approx(15.0)
    unknown = ThroughputMeter(TEXT, 4, 1_200, CPU)
    updates(unknown, 5, 6)
    assert unknown.summary()["updates"] == 2


def test_the_utilization_of_processes_with_other_devices(now):
    """Four seconds on one device and two on one of twice the speed."""
    first = ThroughputMeter(TEXT, 0, 0, CPU)
    now[0] += 4
    first.rates(1, 300)
    work = dataclasses.replace(TEXT, peak_flops=2 * TEXT.peak_flops)
    second = ThroughputMeter(work, 1, 300, CPU, first.totals())
    now[0] += 2
    second.rates(2, 600)
    operations = 2 * TEXT.batch_size * TEXT.flops
    assert second.summary()["mfu"] == pytest.approx(operations / (8 * TEXT.peak_flops))
