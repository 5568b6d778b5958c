"""Measure how long a report takes for a run with many logged updates.

    python benchmarks/report_lines.py --output benchmarks/results/report_lines.json

The records are made up: a noisy loss with an evaluation every 100 lines. Each report is made in
the same process, the shortest of --repeats counts.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_pretraining.report.html import write_report

LINES = (1_000, 5_000, 20_000, 200_000)


def write_run(folder: Path, lines: int) -> None:
    """Write the records of a run with so many logged updates."""
    folder.mkdir()
    arguments = {
        "model_config": "configs/llama_60m.json",
        "optimizer": "adam",
        "weight_decay": 1e-5,
    }
    (folder / "run.json").write_text(json.dumps({"name": folder.name, "arguments": arguments}))
    noise = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(1, lines + 1):
            loss = 3.3 + 7 * (1 + i / (0.004 * lines)) ** -0.6 + noise.gauss(0, 0.05)
            record = {
                "update_step": 10 * i, "loss": loss, "lr": 1e-3, "weight_decay": 1.4e-5,
                "tokens_seen": 1_310_720 * i, "throughput_tokens": 5000.0, "mfu": 0.4,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
            if i % 100 == 0:
                evaluation = {
                    "update_step": 10 * i,
                    "eval_loss": loss,
                    "perplexity": math.exp(loss),
                }
                file.write(json.dumps(evaluation) + "\n")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--lines", type=int, nargs="+", default=LINES)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as place:
        for lines in options.lines:
            folder = Path(place) / str(lines)
            write_run(folder, lines)
            seconds = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                path = write_report(folder)
                seconds.append(time.perf_counter() - start)
            size = path.stat().st_size
            results.append({"lines": lines, "seconds": min(seconds), "bytes": size})
            print(f"{lines:,} lines: {min(seconds):.2f} s, {size / 1e3:,.0f} kB", flush=True)
    by_lines = {result["lines"]: result["seconds"] for result in results}
    ratio = by_lines[20_000] / by_lines[5_000] if {5_000, 20_000} <= by_lines.keys() else None
    print(f"20,000 to 5,000 lines: {ratio:.2f} times" if ratio else "")
    if options.output:
        content = {"results": results, "ratio_20000_to_5000": ratio}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
