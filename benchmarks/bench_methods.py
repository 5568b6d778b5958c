"""Measure the time of a training step with each method, and AdaDecay's peak memory.

    python benchmarks/bench_methods.py [--model_config configs/llama_9m.json] [--rounds 20]

Forward, backward, gradient norm, the method and the fused optimizer, on random tokens; the methods
take turns, a step each, in an order that changes from round to round. Prints the median over the
rounds of a step over the uniform step of the same round, and the median time of the method's own
part over that of the whole uniform step (steadier, as it is no difference of two large times).
AlphaDecay is timed between two analyses and at one.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alphadecay import AWD, AdaDecay, AlphaDecay  # noqa: E402
from peft_pretraining.model.modeling_llama import build_model  # noqa: E402
from peft_pretraining.optim.optimizer import build_optimizer  # noqa: E402

ETA = 1e-5


class Uniform:
    def __init__(self, model):
        self.model = model

    def param_groups(self):
        return [{"params": list(self.model.parameters()), "weight_decay": ETA}]

    def step(self, optimizer):
        return False


METHODS = {
    "uniform": Uniform,
    "awd": lambda model: AWD(model, 100 * ETA),
    "adadecay": lambda model: AdaDecay(model, ETA),
    "alphadecay, no analysis": lambda model: AlphaDecay(model, ETA, every=10**9),
    "alphadecay, analysis": lambda model: AlphaDecay(model, ETA, every=1),
}


class Lane:
    """One method with a model of its own."""

    def __init__(self, name: str, optimizer: str, config: transformers.LlamaConfig, device: str):
        torch.manual_seed(0)
        self.model = build_model(config).to(device)
        self.decay = METHODS[name](self.model)
        self.optimizer = build_optimizer(optimizer, self.decay.param_groups(), 1e-3)
        self.optimizer.found_inf = torch.zeros((), device=device)

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """Seconds of one training step and of the method in it."""
        start = now(ids)
        (self.model(ids, ids) / ids[:, 1:].numel()).backward()
        torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        before = now(ids)
        self.decay.step(self.optimizer)
        after = now(ids)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now(ids) - start, after - before


def now(ids: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    optimizer: str, config, device: str, rows: int, rounds: int
) -> dict[str, dict[str, float]]:
    lanes = {name: Lane(name, optimizer, config, device) for name in METHODS}
    ids = torch.randint(config.vocab_size, (rows, 256), device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes}
    for index in range(rounds + 1):
        for name in random.sample(list(lanes), len(lanes)):
            seconds = lanes[name].step(ids)
            if index:  # the first round is a warm-up
                times[name].append(seconds)
    uniform = [whole for whole, _ in times["uniform"]]
    return {
        name: {
            "step / uniform": statistics.median(
                w / u for (w, _), u in zip(pairs, uniform, strict=True)
            ),
            "method / uniform step": statistics.median(own for _, own in pairs)
            / statistics.median(uniform),
        }
        for name, pairs in times.items()
    }


def extra_memory(config, device: str) -> float | None:
    """Peak memory that AdaDecay's step adds, in copies of the largest parameter."""
    lane = Lane("adadecay", "adamw", config, device)
    for parameter in lane.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    largest = max(p.nbytes for p in lane.model.parameters())
    if device == "cpu":
        return peak_of_allocations(lambda: lane.decay.step(lane.optimizer)) / largest
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lane.decay.step(lane.optimizer)
    return (torch.cuda.max_memory_allocated() - before) / largest


def peak_of_allocations(function) -> int:
    """Greatest sum of bytes that torch held on the CPU beyond those at the start."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_config", default="configs/llama_9m.json")
    parser.add_argument(
        "--rows", type=int, default=8, help="sequences of 256 tokens in a step (default 8)"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the numbers there as JSON")
    args = parser.parse_args()
    config = transformers.LlamaConfig.from_json_file(args.model_config)
    result = {
        "model_config": args.model_config,
        "rows": args.rows,
        "device": args.device,
        "torch": torch.__version__,
    }
    for optimizer in ("adam", "adamw"):
        result[optimizer] = measure(optimizer, config, args.device, args.rows, args.rounds)
        for name, numbers in result[optimizer].items():
            print(
                f"{optimizer:6} {name:24} "
                + "  ".join(f"{what} {value:.4f}" for what, value in numbers.items()),
                flush=True,
            )
    result["adadecay_extra_copies"] = extra_memory(config, args.device)
    print(
        f"adadecay: {result['adadecay_extra_copies']:.3f} copies of the largest parameter "
        "beyond the training's own memory"
    )
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
