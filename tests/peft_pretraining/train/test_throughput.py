"""Throughput, MFU, the clock, the profile and the collector, each alone."""

import gc
import gzip
import itertools
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peft_pretraining import throughput
from peft_pretraining.data.loader import _prefetch
from peft_pretraining.errors import UserError
from peft_pretraining.model.modeling_llama import build_model, load_config
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train.flops import llama_flops, measured_flops, peak_flops
from peft_pretraining.train.loop import without_garbage_collection
from peft_pretraining.train.profiler import profiled
from peft_pretraining.train.throughput import ThroughputMeter, Work, peak_memory

CPU = torch.device("cpu")
ALONE, SECOND = DistributedContext(0, 0, 1, CPU), DistributedContext(1, 1, 2, CPU)

# ------------------------------------------------------------------------------------------------------------- arithmetic


def test_flops_of_llama_60m_by_hand():
    """8 blocks of width 512 with MLPs of 1376, 32,000 words, rows of 256."""
    block = 4 * 512**2 + 3 * 512 * 1376
    assert block == 3_162_112
    matrices = 8 * block + 512 * 32_000
    assert matrices == 41_680_896
    assert (
        llama_flops(load_config("configs/llama_60m.json"), 256)
        == 6 * matrices + 12 * 8 * 512 * 256
        == 262_668_288
    )


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_flops_are_those_that_torch_counts(changes):
    """Of a whole pass forward and backward, with attention as plain products: the formula counts each of them and nothing else."""
    sizes = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=None,
    )
    config = transformers.LlamaConfig(**sizes | changes)
    model = build_model(config)
    rows, length = 3, 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(rows, length, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == rows * length * llama_flops(config, length)


def test_peaks(monkeypatch):
    """The data sheet's by the device's name, for bfloat16 alone; whatever else is measured, and says so."""
    monkeypatch.setattr(throughput, "measured_flops", lambda device, dtype: 1.0)
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", (989e12, "H100 bf16 dense, data sheet")),
        ("NVIDIA H200", (989e12, "H200 bf16 dense, data sheet")),
        ("NVIDIA H100 PCIe", (756e12, "H100 PCIe bf16 dense, data sheet")),
        ("NVIDIA A100-SXM4-40GB", (312e12, "A100 bf16 dense, data sheet")),
        ("NVIDIA RTX A1000", (1.0, "measured matrix product")),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (1.0, "measured matrix product")),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == expected
        assert peak_flops(torch.device("cuda", 0), torch.float32)[0] == 1.0
    assert peak_flops(CPU, torch.bfloat16) == (1.0, "measured matrix product")


def test_a_measured_peak_is_quick_and_draws_no_number(monkeypatch):
    """It counts 2 n^3 operations, in the run's type; products in which nothing happens for 0.03 s last as long as they wait."""
    before, start = torch.random.get_rng_state(), time.perf_counter()
    assert measured_flops(CPU, torch.float32, 256) > 1e7
    assert time.perf_counter() - start < 2 and torch.equal(before, torch.random.get_rng_state())
    seen = []
    monkeypatch.setattr(
        torch, "mm", lambda left, right, out: (seen.append(left.dtype), time.sleep(0.03))
    )
    assert measured_flops(CPU, torch.bfloat16, 100, most_seconds=0.2) == pytest.approx(
        2e6 / 0.03, rel=0.3
    )
    assert set(seen) == {torch.bfloat16} and 4 <= len(seen) <= 7


# ---------------------------------------------------------------------------------------------------------------- the clock

TEXT = Work(
    "tokens", examples=4, length=100, flops=5_000, peak=1e5, peak_source="data sheet", processes=2
)


@pytest.fixture
def now(monkeypatch):
    """A clock's hands, to be moved by hand."""
    hands = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: hands[0])
    return hands


def data_that_take(seconds, now):
    for step in range(2):
        now[0] += seconds
        yield step


def test_rates_since_the_last_logged_line(now):
    """Two updates of 4 rows in 2 s after a resumed run's first; 3 s of evaluation do not count."""
    clock = ThroughputMeter(TEXT, update=10, seen=3_000, device=CPU)
    now[0] += 4
    clock.rates(11, 3_300)
    for _ in clock.timed(data_that_take(0.125, now)):
        now[0] += 0.5
    clock.analysis_took(0.125, True)
    with clock.pause():
        now[0] += 3
    now[0] += 0.75
    record = clock.rates(13, 3_900)
    assert record.pop("peak_memory_bytes") > 10e6
    mfu = 8 * 5_000 / 2 / 1e5
    wanted = {
        "throughput_tokens": 300, "throughput_examples": 4, "throughput_batches": 1, "throughput_padded_tokens": 400, "mfu": mfu,
        "useful_mfu": 0.75 * mfu, "data_wait_seconds": 0.25, "analysis_seconds": 0.125, "seconds": 6,
    }  # fmt: skip
    assert record == pytest.approx(wanted)
    summary = clock.summary()
    assert summary.pop("peak_memory_bytes") > 10e6
    wanted = {
        "train_seconds": 6, "tokens_per_second": 150, "examples_per_second": 2, "batches_per_second": 0.5, "padded_tokens_per_second": 200,
        "mfu": mfu / 2, "useful_mfu": 0.75 * mfu / 2, "data_wait_seconds": 0.25, "data_wait_share": 0.25 / 6, "analyses": 1,
        "analysis_seconds": 0.125, "analysis_share": 0.125 / 6,
    }  # fmt: skip
    assert summary == pytest.approx(wanted)


def test_images_have_no_pads(now):
    clock = ThroughputMeter(
        Work("images", examples=8, length=1, flops=500, peak=1e4, peak_source="", processes=1),
        0,
        0,
        CPU,
    )
    now[0] += 2
    record = clock.rates(1, 8)
    assert record["throughput_images"] == 4 and record["mfu"] == 0.2
    assert not {"useful_mfu", "throughput_padded_images"} & set(record)


def test_run_json_has_the_peak_of_one_process():
    work = Work.of("tokens", 4, 100, 5_000, torch.float32, ALONE)
    assert work.record() == {
        "flops_per_token": 50,
        "peak_flops": work.peak,
        "peak_source": "measured matrix product",
    }
    assert TEXT.record()["peak_flops"] == 5e4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux writes it down")
def test_memory_is_the_most_that_was_resident():
    values = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    assert peak_memory(CPU) == pytest.approx(int(values["VmHWM"].split()[0]) * 1024, rel=0.05)


# ------------------------------------------------------------------------------------------------------------ reading ahead


def test_the_next_step_is_read_while_one_is_used():
    """By another thread, one step ahead and no further, in the same order; the thread ends with the loop."""
    made, threads = [], set()
    second = threading.Event()

    def source():
        for i in itertools.count():
            made.append(i)
            threads.add(threading.current_thread())
            if i == 1:
                second.set()
            yield i

    steps = _prefetch(source(), on_gpu=False)
    assert next(steps) == 0
    assert second.wait(10)  # nobody asked for it yet
    assert [next(steps) for _ in range(5)] == [1, 2, 3, 4, 5]
    steps.close()
    assert made in (list(range(6)), list(range(7)))
    assert threading.current_thread() not in threads and not any(
        thread.is_alive() for thread in threads
    )


def test_an_error_of_the_data_comes_in_place_of_its_step():
    def source():
        yield from (0, 1)
        raise UserError("a damaged block")

    steps = _prefetch(source(), on_gpu=False)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(UserError, match="a damaged block"):
        next(steps)


# --------------------------------------------------------------------------------------------------- profile and collector


def products(updates):
    """What a loop does: a product of as many rows as the update's number."""
    for update in updates:
        with torch.profiler.record_function(f"update {update}"):
            torch.ones(update, 8) @ torch.ones(8, 8)
        yield update


def test_a_profile_holds_the_4th_to_6th_update(tmp_path):
    updates = range(21, 31)
    assert list(products(profiled(updates, True, tmp_path, ALONE))) == list(updates)
    trace = json.loads(gzip.open(tmp_path / "profile/rank0.json.gz").read())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert [f"update {i}" for i in updates if f"update {i}" in names] == [
        "update 24",
        "update 25",
        "update 26",
    ]
    assert "aten::mm" in names


def test_a_run_that_ends_early_leaves_what_was_profiled(tmp_path):
    loop = products(profiled(range(1, 100), True, tmp_path, ALONE))
    assert list(itertools.islice(loop, 5)) == [1, 2, 3, 4, 5]
    loop.close()
    gc.collect()
    assert b"update 4" in gzip.open(tmp_path / "profile/rank0.json.gz").read()


def test_no_profile_where_none_is_wanted(tmp_path):
    updates = range(3)
    assert profiled(updates, False, tmp_path, ALONE) is updates
    assert profiled(updates, True, tmp_path, SECOND) is updates  # rank 0 speaks for all


def test_a_profile_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    assert list(profiled(range(8), True, tmp_path, ALONE)) == list(range(8))


def collected_by_itself():
    """Whether 20,000 new lists make Python look for garbage."""
    runs = sum(generation["collections"] for generation in gc.get_stats())
    kept = [[] for _ in range(20_000)]
    return sum(generation["collections"] for generation in gc.get_stats()) > runs and len(kept) > 0


def test_the_collector_waits_to_be_called():
    assert collected_by_itself()
    with pytest.raises(KeyError):
        with without_garbage_collection():
            assert not collected_by_itself()
            assert gc.get_freeze_count() > 1_000
            cycle = []
            cycle.append(cycle)
            del cycle
            assert gc.collect() >= 1
            raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0 and collected_by_itself()
