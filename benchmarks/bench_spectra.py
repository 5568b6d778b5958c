"""Seconds of one analysis beside plain alternatives, in one run on this machine.

    python benchmarks/bench_spectra.py [--models 60m 130m 350m] [--rounds 3] [--output FILE.json]

Prints: one process beside a loop of `torch.linalg.svdvals` over every Linear (as the published code
does it); two gloo ranks of one thread beside one rank of one thread; seconds that a synchronous and
an asynchronous analysis keep the training loop waiting, and what the training loses meanwhile; the
threshold searches beside plain loops; the cost of a step without an analysis; peak memory at 7B
shapes. On a GPU the same analysis runs there. Alternatives take turns, so that a busy machine is
slow for both; ratios are of medians.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import alphadecay  # noqa: E402
from alphadecay.modules import balanced_modules, spectral_modules  # noqa: E402
from alphadecay.norms import gradient_norms  # noqa: E402
from alphadecay.spectral.engine import SpectralEngine  # noqa: E402
from peft_pretraining.model.modeling_llama import build_model, load_config  # noqa: E402
from tests.support import reference  # noqa: E402  the plain twin of the tests


def model_of(size: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(load_config(ROOT / f"configs/llama_{size}.json")).to(device)


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, after a first round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def svdvals_loop(model: nn.Module) -> list[torch.Tensor]:
    return [torch.linalg.svdvals(m.weight.detach().float()) for m in spectral_modules(model)]


def analysis(model: nn.Module, engine: SpectralEngine) -> None:
    weights = [m.weight for m in balanced_modules(model)]
    engine.rows(weights, gradient_norms(weights), "alpha")


def bench_one_process(size: str, rounds: int, device: str) -> dict:
    model, engine = model_of(size, device), SpectralEngine()
    seconds = interleaved(
        {"svdvals": lambda: svdvals_loop(model), "ours": lambda: analysis(model, engine)}, rounds
    )
    plain = [
        reference.fit(reference.eigenvalues(m.weight.cpu()))[0] for m in balanced_modules(model)[:8]
    ]
    weights = [m.weight for m in balanced_modules(model)[:8]]
    ours = [row["alpha"] for row, _ in engine.rows(weights, gradient_norms(weights), "alpha")]
    error = max(abs(a / b - 1) for a, b in zip(ours, plain, strict=True))
    return {
        **seconds,
        "times_faster": seconds["svdvals"] / seconds["ours"],
        "alpha_error": error,
    }


def bench_ranks(size: str, rounds: int) -> dict:
    """One and two processes of one thread each, taking turns."""

    def run(processes: int) -> float:
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, __file__, "--rank", size],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout.split("SECONDS ")[1].split()[0])

    times = {processes: [] for processes in (1, 2)}
    for _ in range(rounds):
        for processes, values in times.items():
            values.append(run(processes))
    one, two = (statistics.median(times[p]) for p in (1, 2))
    return {"one_rank": one, "two_ranks": two, "times_faster": one / two}


def as_a_rank(size: str) -> None:
    """What `bench_ranks` starts: the median seconds of a whole update of the decays."""
    torch.distributed.init_process_group("gloo")
    decay = alphadecay.AlphaDecay(model_of(size, "cpu"), 1e-5, every=1)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=0)
    times = []
    for _ in range(3):
        torch.distributed.barrier()
        start = time.perf_counter()
        decay.step(optimizer)
        times.append(time.perf_counter() - start)
    if torch.distributed.get_rank() == 0:
        print("SECONDS", statistics.median(times), flush=True)
    torch.distributed.destroy_process_group()


def bench_async(size: str, device: str) -> dict:
    """Measure how long synchronous and asynchronous analyses keep the training loop waiting."""
    results = {}
    for name, lag in (("synchronous", 0), ("asynchronous", 12)):
        model = model_of(size, device)
        decay = alphadecay.AlphaDecay(model, 1e-5, every=16, lag=lag)
        optimizer = torch.optim.Adam(decay.param_groups(), lr=1e-4, fused=True)
        ids = torch.randint(32000, (4, 128), device=device)
        waits, steps = [], []
        for _ in range(32):
            start = time.perf_counter()
            (model(ids, ids) / ids.numel()).backward()
            before = time.perf_counter()
            decay.step(optimizer)
            waits.append(time.perf_counter() - before)
            optimizer.step()
            optimizer.zero_grad()
            steps.append(time.perf_counter() - start)
        decay.state_dict()  # waits for the last analysis, which would disturb what is measured next
        results[name] = {"blocked": sum(waits[15:31]), "steps": sum(steps[15:31])}
    undisturbed = statistics.median(steps[2:15]) * 16
    return {
        "blocked_synchronous": results["synchronous"]["blocked"],
        "blocked_asynchronous": results["asynchronous"]["blocked"],
        "blocked_share": results["asynchronous"]["blocked"] / results["synchronous"]["blocked"],
        "sixteen_steps_undisturbed": undisturbed,
        "sixteen_steps_synchronous": results["synchronous"]["steps"],
        "sixteen_steps_asynchronous": results["asynchronous"]["steps"],
    }


def bench_searches(n: int = 768, calls_at_once: int = 100) -> dict:
    values = alphadecay.eigenvalues(
        torch.randn(2048, n, generator=torch.Generator().manual_seed(0))
    )
    results = {}
    for method in ("goodness-of-fit", "fix-finger", "fix-finger-reference"):
        numbers = values.tolist()
        calls = {
            "plain": lambda method=method, numbers=numbers: reference.fit(numbers, method),
            "ours": lambda method=method: [
                alphadecay.fit_power_law(values, method) for _ in range(calls_at_once)
            ],
        }
        seconds = interleaved(calls, 9)
        slow, fast = seconds["plain"], seconds["ours"] / calls_at_once
        same = (
            abs(
                alphadecay.fit_power_law(values, method).xmin / reference.fit(numbers, method)[2]
                - 1
            )
            < 1e-12
        )
        results[method] = {
            "plain": slow,
            "ours": fast,
            "times_faster": slow / fast,
            "same_threshold": same,
        }
    return results


def bench_idle_step() -> float:
    """Microseconds of `decay.step` in an update without an analysis."""
    decay = alphadecay.AlphaDecay(
        nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))), 1e-5, every=10**9
    )
    optimizer = torch.optim.SGD(decay.param_groups(), lr=0)
    start = time.perf_counter()
    for _ in range(10_000):
        decay.step(optimizer)
    return (time.perf_counter() - start) / 10_000 * 1e6


def bench_memory() -> dict:
    """Peak extra memory of analysing eight matrices of 7B shapes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def as_memory() -> None:
    engine = SpectralEngine()
    engine.rows([torch.randn(256, 256)], [10.0], "alpha")  # libraries are loaded
    weights = [torch.randn(11008, 4096) for _ in range(2)] + [
        torch.randn(4096, 4096) for _ in range(2)
    ]
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine.rows(weights, [10.0] * len(weights), "alpha")
    done.set()
    watcher.join()
    print(
        json.dumps(
            {
                "extra_MiB": (peak[0] - before) / 2**20,
                "two_largest_MiB": 2 * 11008 * 4096 * 4 / 2**20,
            }
        )
    )


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["60m", "130m", "350m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        return as_a_rank(args.rank)
    if args.memory:
        return as_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )
    results: dict = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for size in args.models:
        results[size] = one = bench_one_process(size, args.rounds, device)
        form = (
            "svdvals of every Linear {svdvals:.3f} s, ours {ours:.3f} s: {times_faster:.2f} times"
        )
        times = form.format(**one) + " faster"
        print(
            f"{size:>5}: {times}, alpha within {one['alpha_error']:.1e}",
            flush=True,
        )
    if device == "cpu":
        results["ranks"] = bench_ranks(args.models[0], args.rounds)
        form = (
            "ranks of one thread: one {one_rank:.3f} s, two {two_ranks:.3f} s: {times_faster:.2f} "
            "times faster"
        )
        print(form.format(**results["ranks"]), flush=True)
    results["async"] = bench_async(args.models[0], device)
    print(
        "asynchronous: " + ", ".join(f"{k} {v:.3f}" for k, v in results["async"].items()),
        flush=True,
    )
    results["searches"] = bench_searches()
    for method, r in results["searches"].items():
        form = (
            "{plain:.3f} s, ours {ours:.5f} s: {times_faster:.0f} times faster, same threshold: "
            "{same_threshold}"
        )
        print(f"{method}: plain loops {form.format(**r)}", flush=True)
    results["idle_step_microseconds"] = bench_idle_step()
    print(f"a step without an analysis: {results['idle_step_microseconds']:.2f} microseconds")
    results["memory"] = bench_memory()
    form = (
        "peak extra memory at 7B shapes: {extra_MiB:.0f} MiB (the two largest matrices: "
        "{two_largest_MiB:.0f} MiB)"
    )
    print(form.format(**results["memory"]))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
