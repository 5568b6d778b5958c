"""First check of the whole framework on a GPU, in about ten minutes.

    bash benchmarks/gpu.sh [--minutes 10] [--rehearse]

Steps, each with its own time limit; a step that fails is recorded with its error, and the others
go on. Those of the first group run at the same time, because nothing in them is timed:

    tests      the tests that need a GPU (pytest -m cuda)
    alpha      alpha on the GPU beside float64 singular values on the CPU
    resume     a run of 60m straight, twice, and one that is resumed in the middle: losses, weights;
               256 and 1024 tokens a row, with and without --deterministic
    training   tokens per second, MFU and peak memory (beside plan.py's) of 60m, 130m, 350m and 1b
    analysis   seconds of one spectral analysis, beside torch.linalg.svdvals over every Linear
    vision     images per second of main_vit.py with DeiT-tiny on JPEG files
    profile    the kernels that take the most time in an update of 60m and of 1b
    contexts   where there are two GPUs: processes of a run on two that use GPU 0

At the end a table compares what was measured with the goals.

Results: $OUT/gpu.json, or benchmarks/results/gpu_DEVICE.json where OUT is not set. The file is
written anew after each result. The output of every command goes to gpu_log.txt beside it.
`--rehearse` runs the same steps on a CPU with tiny models, to find errors in this script.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import gzip
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LENGTH = 256  # tokens in a row
ROWS = 512  # rows in an update
ERROR_LINES = 30  # of a failed command's output that are recorded
ALPHA_SIZES = (768, 1024, 2048)
CONDITIONS = (1e3, 1e6, 1e9, 1e12)


class Failure(Exception):
    """A command failed. The message holds the end of its output, `output` all of it."""

    def __init__(self, message: str, output: str = ""):
        super().__init__(message)
        self.output = output


class OutOfTime(Failure):
    """A command was stopped because it took too long."""


# ---------------------------------------------------------------------------------- the bookkeeping


class Results:
    """The file of results. It is written anew after each result, so that nothing is lost."""

    def __init__(self, folder: Path, name: str, facts: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log_path = folder / f"{name}.json", folder / f"{name}_log.txt"
        self.log_path.write_text("")
        self.data: dict = {**facts, "steps": {}}
        self.table: list[tuple[str, str, str]] = []
        self._lock = threading.RLock()
        self._started = time.monotonic()

    def add(self, step: str, key: str, value: object) -> None:
        """Record one value of a step and write the file."""
        with self._lock:
            self.data["steps"].setdefault(step, {})[key] = value
            self.data["seconds"] = round(time.monotonic() - self._started, 1)
            self.path.write_text(json.dumps(self.data, indent=1, default=str) + "\n")

    def line(self, step: str, measured: str, note: str = "") -> None:
        """Add a line to the table that is printed at the end."""
        with self._lock:
            self.table.append((step, measured, note))
            print(
                f"[{time.monotonic() - self._started:5.0f} s] {step}: {measured} {note}", flush=True
            )

    def log(self, command: list[str], output: str) -> None:
        """Append a command and its output to the log."""
        with self._lock, self.log_path.open("a") as file:
            file.write(f"\n$ {' '.join(command)}\n{output}\n")


class Bench:
    """What all steps share: the settings, the deadline, the results and the running commands.

    Args:
        options: parsed command line.
        work: folder for the data and the runs.
        results: where values are recorded.
    """

    def __init__(self, options: argparse.Namespace, work: Path, results: Results):
        self.rehearse, self.work, self.results = options.rehearse, work, results
        self.deadline = time.monotonic() + 60 * options.minutes
        self.corpus = work / "corpus"
        self._running: set[subprocess.Popen] = set()

    @property
    def remaining(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def run(self, command: list, limit: float, until: Callable[[], bool] | None = None) -> str:
        """Run a command from the repository's root and return its output.

        Args:
            command: words; they are converted to str.
            limit: seconds that it may take; fewer where the deadline is nearer.
            until: the command is killed, and counts as successful, once this returns True.

        Raises:
            Failure: the command failed or took too long, or no time is left to start it.
        """
        words = [str(word) for word in command]
        limit = min(limit, self.remaining)
        if limit < 5:
            raise Failure("not started: no time was left")
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        end = time.monotonic() + limit
        outcome = "timeout"
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            self._running.add(process)
            try:
                while time.monotonic() < end:
                    if process.poll() is not None:
                        outcome = "ended"
                        break
                    if until is not None and until():
                        outcome = "done"
                        break
                    time.sleep(0.1)
            finally:
                kill(process)
                self._running.discard(process)
            output.seek(0)
            text = output.read()
        self.results.log(words, text)
        if outcome == "timeout":
            raise OutOfTime(f"stopped after {limit:.0f} s\n{last_lines(text)}", text)
        if outcome == "ended" and process.returncode:
            raise Failure(f"exit status {process.returncode}\n{last_lines(text)}", text)
        return text

    def kill_all(self) -> None:
        """Kill every command that is still running."""
        for process in list(self._running):
            kill(process)

    @contextlib.contextmanager
    def guarded(self, step: str, part: str = "") -> Iterator[None]:
        """Context manager that records an exception of its block and lets the script go on."""
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # whatever it is, the other steps must run
            text = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
            self.results.add(step, f"{part} error".strip(), text)
            reason = text.strip().splitlines()
            self.results.line(
                f"{step} {part}".strip(), "FAILED", " ... ".join(reason[:1] + reason[-1:])
            )
        finally:
            self.results.add(
                step, f"{part} seconds_taken".strip(), round(time.monotonic() - started, 1)
            )


def kill(process: subprocess.Popen) -> None:
    """Kill a command with all processes that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-ERROR_LINES:])


def read_lines(path: Path) -> list[dict]:
    """Return the records of a .jsonl file; a line that is not complete yet is left out."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"
    ]


def updates_of(folder: Path) -> list[dict]:
    """Return the records of a run's training updates, one for each update."""
    return [record for record in read_lines(folder / "metrics.jsonl") if "loss" in record]


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---------------------------------------------------------------------------------------- the steps


def make_corpus(bench: Bench) -> None:
    """Prepare a corpus of random words whose documents all fill a row of 256 tokens."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(40_000)]
    text = bench.work / "words.jsonl"
    with text.open("w") as file:
        for _ in range(200 if bench.rehearse else 2048):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=280))}) + "\n")
    module = [sys.executable, "-m", "peft_pretraining.prepare_data"]
    bench.run(
        [
            *module,
            "--dataset",
            text,
            "--tokenizer",
            "bpe",
            "--vocab_size",
            32000,
            "--output",
            bench.corpus,
        ],
        90,
    )


def device_tests(bench: Bench) -> None:
    """Run the tests that need a GPU."""
    flags = ["-m", "cuda", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    text = ""
    try:
        text = bench.run([sys.executable, "-m", "pytest", *flags, "tests"], 150)
    finally:
        bench.results.add("tests", "output", last_lines(text))
    lines = text.strip().splitlines()
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    bench.results.line("tests", lines[-1] if lines else "no output", "; ".join(skipped))


def alpha(bench: Bench) -> None:
    """Compare alpha on the GPU with float64 singular values on the CPU, in a process of its own."""
    text = run_part(bench, "alpha", 150)
    rows = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("PART ")]
    bench.results.add("alpha", "matrices", rows)
    for key, name in (("alpha_training", "as in training"), ("alpha_analyze", "analyze()")):
        worst = max(rows, key=lambda row: row[key])
        note = f"worst of {len(rows)} matrices: n = {worst['n']}, {worst['kind']}"
        bench.results.line(f"alpha, {name}", f"{worst[key]:.2e}", f"relative deviation, {note}")
    worst = max(rows, key=lambda row: row["eigenvalues"])
    note = f"upper half, relative deviation, n = {worst['n']}, {worst['kind']}"
    bench.results.line("alpha, eigenvalues", f"{worst['eigenvalues']:.2e}", note)


def run_part(bench: Bench, part: str, limit: float, *more: object) -> str:
    """Run a part of this script in a process of its own and return its output."""
    flags = ["--rehearse"] if bench.rehearse else []
    return bench.run([sys.executable, __file__, "--part", part, *flags, *more], limit)


def llama(
    bench: Bench,
    size: str,
    folder: Path,
    batch: int,
    updates: int,
    *more: object,
    length: int = LENGTH,
) -> list:
    """Return the command that trains a LLaMA on the corpus.

    Args:
        bench: the settings.
        size: of the model.
        folder: of the run.
        batch: rows of 256 tokens in a micro-batch; fewer where a row is longer.
        updates: number of updates.
        more: more flags.
        length: tokens in a row.
    """
    rows, batch = ROWS * LENGTH // length, max(1, batch * LENGTH // length)
    if bench.rehearse:
        rows, length = 4, length // 4
    command: list = [sys.executable, "torchrun_main.py"]
    if bench.rehearse:
        size, batch = "9m", 2
    else:
        command.append("--single_cuda")
    return [
        *command, "--model_config", f"configs/llama_{size}.json", "--dataset", bench.corpus,
        "--max_length", length, "--batch_size", batch, "--total_batch_size", rows,
        "--num_training_steps", updates, "--log_every", 1,
        "--target_eval_tokens", 5000, "--no_wandb", "--save_dir", folder, *more,
    ]  # fmt: skip


# --compile, tokens in a row, --deterministic. --deterministic is promised to be bit for bit.
RESUMES = (
    ("on", 256, True),
    ("on", 1024, True),
    ("on", 256, False),
    ("on", 1024, False),
    ("off", 256, False),
)


def resume(bench: Bench, compiled: str, length: int, deterministic: bool) -> None:
    """Compare a straight run of 12 updates with a second one and with one resumed after 6."""
    kind = resume_name(compiled, length, deterministic)
    folders = {
        name: bench.work / f"resume {kind} {name}" for name in ("straight", "again", "resumed")
    }
    flags = ["--compile", compiled, "--dtype", "bf16_mixed", "--method", "alphadecay"]
    flags += ["--unbalancedWD_every", "4", "--save_every", "6"]
    flags += ["--deterministic"] * deterministic

    def train(name: str, *more: object) -> None:
        command = llama(bench, "60m", folders[name], 64, 12, *flags, *more, length=length)
        bench.run(command, 150)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(train, ("straight", "again")))
    train("resumed", "--continue_from", folders["straight"] / "checkpoints/model_6")
    for other in ("again", "resumed"):
        result = compare(folders["straight"], folders[other], 6 if other == "resumed" else 0)
        bench.results.add("resume", f"{kind}, {other}", result)
        equal = result["weights_equal"] and result["largest_loss_difference"] == 0
        note = (
            f"{result['updates']} updates, losses differ by up to "
            f"{result['largest_loss_difference']:.1e}, "
            f"weights {'equal' if result['weights_equal'] else 'differ'}; "
            f"files that differ: {', '.join(result['files_that_differ']) or 'none'}"
        )
        step = f"{'resume' if other == 'resumed' else 'second run'}, {kind}"
        bench.results.line(step, "bit for bit" if equal else "DIFFERS", note)


def resume_name(compiled: str, length: int, deterministic: bool) -> str:
    """Return the name of a resume step in the results."""
    return f"compile {compiled}, {length} tokens" + ", deterministic" * deterministic


def contexts(bench: Bench) -> None:
    """Count the processes of a run on two GPUs that use GPU 0: it must be one."""
    import torch

    if torch.cuda.device_count() < 2:
        return bench.results.line("contexts", "not tested", "there are not two GPUs")
    folder = bench.work / "contexts"
    command = llama(bench, "60m", folder, 64, 1000, "--esd_async", "--unbalancedWD_every", 4)
    command.remove("--single_cuda")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def counted() -> bool:
        """Count, once analyses have been made."""
        if len(updates_of(folder)) < 20:
            return False
        query = ["nvidia-smi", "-i", "0", "--query-compute-apps=pid", "--format=csv,noheader"]
        with contextlib.suppress(FileNotFoundError):
            pids = subprocess.run(query, capture_output=True, text=True).stdout.split()
            bench.results.add("contexts", "processes on GPU 0", len(pids))
            bench.results.line("contexts", f"{len(pids)} process(es)", "on GPU 0, of two ranks")
        return True

    bench.run([*launcher, *command[1:]], 100, until=counted)


def compare(straight: Path, other: Path, after: int) -> dict:
    """Compare final checkpoints of two runs, and their losses after update `after`."""
    losses = [{r["update_step"]: r["loss"] for r in updates_of(run)} for run in (straight, other)]
    shared = sorted(u for u in losses[0].keys() & losses[1].keys() if u > after)
    differences = [abs(losses[0][update] - losses[1][update]) for update in shared]
    finals = [
        sorted(run.glob("checkpoints/model_*"), key=lambda p: int(p.name[6:]))[-1]
        for run in (straight, other)
    ]
    manifests = [json.loads((final / "manifest.json").read_text()) for final in finals]
    pairs = zip(shared, differences, strict=True)
    one, two = manifests
    return {
        "updates": len(shared),
        "largest_loss_difference": max(differences),
        "first_update_that_differs": next((u for u, difference in pairs if difference), None),
        "weights_equal": one["model.safetensors"] == two["model.safetensors"],
        "weights_sha256": [m["model.safetensors"]["sha256"] for m in manifests],
        "files_that_differ": sorted(name for name in one if one[name] != two.get(name)),
        "losses": [list(some.values()) for some in losses],
    }


# In order of importance. The rows in a micro-batch suit about 78 GiB of memory; they are halved
# where that does not suffice.
TRAININGS = (
    ("60m", "bf16_mixed", "alphadecay", 256, 20),
    ("130m", "bf16_mixed", "alphadecay", 256, 16),
    ("350m", "bf16_mixed", "alphadecay", 128, 12),
    ("1b", "bf16_mixed", "alphadecay", 32, 9),
    ("60m", "bf16_mixed", "uniform", 256, 20),
    ("130m", "bf16_mixed", "uniform", 256, 16),
    ("60m", "bfloat16", "alphadecay", 256, 20),
    ("130m", "bfloat16", "alphadecay", 256, 16),
)
ANALYSIS_AT = 6  # the update that analyses the weights
WARM_UP = 4  # updates that are not counted


def training(bench: Bench) -> None:
    """Measure the speed of training."""
    for size, dtype, method, batch, updates in TRAININGS:
        name = f"{size} {dtype} {method}"
        with bench.guarded("training", name):
            while True:
                try:
                    result = train_once(bench, size, dtype, method, batch, updates)
                    break
                except Failure as error:
                    if (
                        "OutOfMemory" not in str(error)
                        and "out of memory" not in str(error)
                        or batch < 8
                    ):
                        raise
                    batch //= 2
            result["planned_memory_bytes"] = planned_memory(bench, size, batch, dtype)
            bench.results.add("training", name, result)
            note = (
                f"MFU {result['mfu']:.1%}, peak {gib(result['peak_memory_bytes'])} "
                f"(plan.py: {gib(result['planned_memory_bytes'])}), "
                f"micro-batch {batch}, "
                f"loss {result['loss_kind']}, update {result['seconds_an_update']:.3f} s, "
                f"analysis {result['analysis_seconds']:.2f} s, "
                f"first update {result['first_update_seconds']:.0f} s"
            )
            bench.results.line(
                f"training {name}", f"{result['tokens_per_second']:,.0f} tokens/s", note
            )


def planned_memory(bench: Bench, size: str, batch: int, dtype: str) -> float:
    """Return the peak memory that plan.py expects for the blocks compiled on one GPU, bytes."""
    from scripts.cluster.cost_model import estimate_memory, read_model

    model = read_model(str(ROOT / f"configs/llama_{'9m' if bench.rehearse else size}.json"))
    return estimate_memory(model, "ddp", 1, batch, LENGTH, dtype, ROWS // batch).peak


def train_once(bench: Bench, size: str, dtype: str, method: str, batch: int, updates: int) -> dict:
    """Train until all updates are logged, then kill the run: nothing after them is of interest."""
    folder = Path(tempfile.mkdtemp(prefix=f"train_{size}_", dir=bench.work))
    updates = 8 if bench.rehearse else updates
    more = ["--dtype", dtype, "--method", method, "--compile", "off" if bench.rehearse else "on"]
    if method != "uniform":
        more += ["--unbalancedWD_every", ANALYSIS_AT]
    command = llama(bench, size, folder, batch, 10 * updates, *more)
    try:
        limit = 160 if size == "1b" else 110
        bench.run(command, limit, until=lambda: len(updates_of(folder)) >= updates)
    except OutOfTime:
        if len(updates_of(folder)) <= WARM_UP:
            raise
    records = updates_of(folder)
    ends = [record["seconds"] for record in records]
    seconds = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    counted = [r for r in records if r["update_step"] > WARM_UP and r["update_step"] != ANALYSIS_AT]
    arguments = json.loads((folder / "run.json").read_text())["arguments"]
    middle = {
        key: statistics.median(r[key] for r in counted)
        for key in ("throughput_tokens", "mfu", "useful_mfu")
    }
    return {
        "tokens_per_second": middle["throughput_tokens"],
        "mfu": middle["mfu"],
        "useful_mfu": middle["useful_mfu"],
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "analysis_seconds": max(r["analysis_seconds"] for r in records),
        "seconds_an_update": statistics.median(
            s for s, r in zip(seconds, records[1:], strict=True) if r in counted
        ),
        "first_update_seconds": ends[0],
        "seconds": [ends[0], *seconds],
        "data_wait_seconds": sum(r["data_wait_seconds"] for r in counted) / len(counted),
        "loss": [r["loss"] for r in records],
        "loss_kind": arguments["loss"],
        "micro_batch": batch,
        "updates": len(records),
        "fastest_tokens_per_second": max(r["throughput_tokens"] for r in counted),
        "slowest_tokens_per_second": min(r["throughput_tokens"] for r in counted),
    }


def analysis(bench: Bench) -> None:
    """Measure the seconds of one analysis, each model in a process of its own."""
    for size in ("60m", "130m", "350m", "1b"):
        with bench.guarded("analysis", size):
            try:
                text = run_part(bench, "analysis", 80, "--size", size)
            except Failure as failure:  # what was measured before it counts
                text = failure.output
                if "PART " not in text:
                    raise
                bench.results.add("analysis", f"{size} error", str(failure))
            result = json.loads(text.split("PART ")[-1].splitlines()[0])
            bench.results.add("analysis", size, result)
            names = {
                "construction": "first analysis",
                "float64": "all in float64",
                "svdvals": "svdvals of every Linear",
                "blocked_asynchronous": "asynchronous, the loop waits",
                "updates_asynchronous": "16 updates beside an asynchronous one",
                "updates_undisturbed": "without an analysis",
            }
            parts = [f"{names[key]} {result[key]:.3f} s" for key in names if key in result]
            note = f"of {result['modules']} modules; {'; '.join(parts)}"
            bench.results.line(f"analysis {size}", f"{result['synchronous']:.3f} s", note)


def vision(bench: Bench) -> None:
    """Train DeiT-tiny on JPEG files and record images per second."""
    folder, run = bench.work / "images", bench.work / "vit"
    write_images(folder, distinct=8 if bench.rehearse else 128, each=8 if bench.rehearse else 640)
    size, batch, model = (
        (32, 8, "vit_tiny_patch16_224") if bench.rehearse else (224, 256, "deit_tiny_patch16_224")
    )
    flags = ["--model", model, "--input_size", size, "--batch_size", batch, "--data_path", folder]
    flags += [
        "--nb_classes",
        4,
        "--epochs",
        2,
        "--warmup_epochs",
        1,
        "--use_amp",
        "true",
        "--save_ckpt",
        "false",
    ]
    flags += [
        "--num_workers",
        2 if bench.rehearse else 16,
        "--log_every",
        1,
        "--no_wandb",
        "--output_dir",
        run,
    ]
    flags += ["--method", "alphadecay", "--unbalancedWD_every", 5]
    text = bench.run([sys.executable, "main_vit.py", *flags], 90)
    records = updates_of(run)
    speeds = [record["throughput_images"] for record in records]
    result = {
        "updates": len(records),
        "images_per_second": statistics.median(speeds[2:]),
        "fastest": max(speeds),
        "mfu": statistics.median(record["mfu"] for record in records[2:]),
        "data_wait_share": sum(r["data_wait_seconds"] for r in records) / records[-1]["seconds"],
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "loss": [record["loss"] for record in records],
        "speeds": speeds,
        "end_of_output": last_lines(text)[-2000:],
    }
    bench.results.add("vision", model, result)
    note = (
        f"fastest update {result['fastest']:,.0f}, MFU {result['mfu']:.1%}, waiting for data "
        f"{result['data_wait_share']:.0%} of the time, peak {gib(result['peak_memory_bytes'])}"
    )
    bench.results.line(f"vision {model}", f"{result['images_per_second']:,.0f} images/s", note)


def write_images(folder: Path, distinct: int, each: int) -> None:
    """Write four class folders of JPEG files; after the first `distinct` they are hard links."""
    import numpy
    from PIL import Image

    rng = numpy.random.default_rng(0)
    for split, count in (("train", each), ("val", min(each, 32))):
        for label in range(4):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                path = place / f"{i:04}.jpg"
                if i >= distinct:
                    os.link(place / f"{i % distinct:04}.jpg", path)
                    continue
                small = Image.fromarray(rng.integers(0, 255, (20, 25, 3), dtype=numpy.uint8))
                small.resize((500, 400), Image.Resampling.BICUBIC).save(path, quality=85)


def profile(bench: Bench, size: str, batch: int) -> None:
    """Profile updates 4 to 6 of a model and list the kernels that take the most time."""
    folder = bench.work / f"profile_{size}"
    flags = ["--profile", "--dtype", "bf16_mixed", "--compile", "off" if bench.rehearse else "on"]
    flags += ["--method", "alphadecay", "--unbalancedWD_every", 100]
    path = folder / "profile/rank0.json.gz"
    text = bench.run(llama(bench, size, folder, batch, 7, *flags), 100)
    if not path.exists():
        raise Failure(f"no trace was written\n{last_lines(text)}")
    with gzip.open(path, "rt", errors="replace") as file:
        events = json.load(file)["traceEvents"]
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if not bench.rehearse else ("cpu_op",)
    kernels = [e for e in events if e.get("cat") in wanted and "dur" in e]
    total: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter = collections.Counter()
    for event in kernels:
        total[event["name"]] += event["dur"]
        calls[event["name"]] += 1
    everything = sum(total.values())
    span = max(e["ts"] + e["dur"] for e in kernels) - min(e["ts"] for e in kernels)
    top = sorted(total, key=total.get, reverse=True)[:12]
    rows = [
        {
            "kernel": name[:160],
            "ms": total[name] / 1e3,
            "share": total[name] / everything,
            "calls": calls[name],
        }
        for name in top
    ]
    bench.results.add(
        "profile",
        size,
        {
            "top": rows,
            "kernel_ms": everything / 1e3,
            "span_ms": span / 1e3,
            "kernels": len(kernels),
        },
    )
    note = f"{len(kernels)} kernels of 3 updates in {span / 1e3:.0f} ms"
    bench.results.line(f"profile {size}, GPU busy", f"{everything / span:.1%}", note)
    for row in rows:
        note = f"{row['ms']:.1f} ms, {row['calls']} calls"
        bench.results.line(f"  {row['kernel'][:70]}", f"{row['share']:.1%}", note)


# -------------------------------------------------------------- parts that run in their own process


def alpha_part(rehearse: bool) -> None:
    """Print a line for each matrix: relative deviations of alpha and of the eigenvalues."""
    import torch

    import alphadecay

    device = "cpu" if rehearse else "cuda"
    generator = torch.Generator(device).manual_seed(0)
    for n in (64, 128) if rehearse else ALPHA_SIZES:
        weights = {"Gaussian": torch.randn(n, n, generator=generator, device=device)}
        weights["Gaussian 3:8"] = torch.randn(8 * n // 3, n, generator=generator, device=device)
        for condition in CONDITIONS:
            sides = [
                torch.linalg.qr(
                    torch.randn(n, n, generator=generator, device=device, dtype=torch.float64)
                )[0]
                for _ in range(2)
            ]
            exponents = torch.linspace(0, -1, n, device=device, dtype=torch.float64)
            weights[f"condition {condition:.0e}"] = (
                sides[0] * condition**exponents @ sides[1]
            ).float()
        weights["power law, bfloat16"] = (
            sides[0] * torch.arange(1, n + 1, device=device, dtype=torch.float64) ** -0.7 @ sides[1]
        ).bfloat16()
        for kind, weight in weights.items():
            model = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1], bias=False))
            model[0].weight = torch.nn.Parameter(weight)
            expected = torch.linalg.svdvals(weight.detach().cpu().double()).flip(0) ** 2
            fit = alphadecay.fit_power_law(expected).alpha
            decay = alphadecay.AlphaDecay(model, 1e-5, remove_first=False, remove_last=False)
            upper = slice(len(expected) // 2, None)
            values = alphadecay.eigenvalues(weight).cpu()
            row = {
                "n": n,
                "kind": kind,
                "alpha": fit,
                "alpha_training": abs(decay.history[0]["alpha"] / fit - 1),
                "alpha_analyze": abs(alphadecay.analyze(model)[0]["alpha"] / fit - 1),
                "eigenvalues": float((values[upper] / expected[upper] - 1).abs().max()),
            }
            print("PART " + json.dumps(row), flush=True)


def analysis_part(size: str, rehearse: bool) -> None:
    """Print the seconds of one analysis of a model, and of training steps around one."""
    import torch
    import transformers

    import alphadecay

    device = "cpu" if rehearse else "cuda"

    def wait() -> None:
        """Wait for the stream of the training alone: an asynchronous analysis uses another."""
        if not rehearse:
            torch.cuda.current_stream().synchronize()

    values = json.loads((ROOT / f"configs/llama_{'9m' if rehearse else size}.json").read_text())
    values["pad_token_id"] = None
    config = transformers.LlamaConfig(**values)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(device, torch.float32)

    def seconds_of(call: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    result: dict = {"size": size}

    def report() -> None:
        print("PART " + json.dumps(result), flush=True)

    decay = None

    def construct() -> None:
        nonlocal decay
        decay = alphadecay.AlphaDecay(model, 1e-5, every=1)

    result["construction"] = seconds_of(construct)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=0.0)
    times = [seconds_of(lambda: decay.step(optimizer))]
    if times[0] < 5:
        times += [seconds_of(lambda: decay.step(optimizer)) for _ in range(2)]
    result["synchronous"], result["synchronous_all"] = statistics.median(times), times
    result["modules"] = len(decay.modules)
    report()
    # One matrix of each shape, times their number: all of them would take minutes for 1b.
    shapes: dict = collections.defaultdict(list)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shapes[tuple(module.weight.shape)].append(module.weight.detach())
    torch.linalg.svdvals(torch.randn(64, 64, device=device))  # loads the library
    each = {s: seconds_of(lambda w=w: torch.linalg.svdvals(w[0])) for s, w in shapes.items()}
    result["svdvals"] = sum(each[shape] * len(same) for shape, same in shapes.items())
    result["svdvals_each"] = {
        str(shape): [len(same), each[shape]] for shape, same in shapes.items()
    }
    report()
    # The analysis starts in update 16, and its decays take effect in update 28.
    ids = torch.randint(32000, (2, 64) if rehearse else (32, 256), device=device)
    decay = alphadecay.AlphaDecay(model, 1e-5, every=16, lag=12)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-6)
    blocked, steps = [], []
    for _ in range(31):
        wait()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        wait()
        before = time.perf_counter()
        decay.step(optimizer)
        blocked.append(time.perf_counter() - before)
        optimizer.step()
        optimizer.zero_grad()
        wait()
        steps.append(time.perf_counter() - start)
    result["blocked_asynchronous"] = sum(blocked[15:31])
    result["blocked_each"] = blocked
    result["updates_asynchronous"] = sum(steps[15:31])
    result["updates_undisturbed"] = 16 * statistics.median(steps[2:15])
    result["updates_each"] = steps
    report()
    result["float64_first"] = seconds_of(lambda: alphadecay.analyze(model))
    if result["float64_first"] < 5:
        result["float64"] = seconds_of(lambda: alphadecay.analyze(model))
    report()


# ------------------------------------------------------------------------------------------ the run


def device_facts(rehearse: bool) -> dict:
    """Return the device's name, its driver and the versions of the packages that matter."""
    from importlib import metadata

    versions = {}
    for package in (
        "torch",
        "triton",
        "transformers",
        "tokenizers",
        "timm",
        "numpy",
        "liger-kernel",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    name = "CPU"
    if not rehearse:
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        name = "unknown GPU"
        with contextlib.suppress(FileNotFoundError):
            name = subprocess.run(query, capture_output=True, text=True).stdout.strip() or name
    return {
        "device": name,
        "python": sys.version.split()[0],
        "versions": versions,
        "cores": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def correctness(bench: Bench) -> None:
    """Run the steps that time nothing, side by side."""

    def guarded(step: str, part: str, call: Callable[[], None]) -> None:
        with bench.guarded(step, part):
            call()

    with concurrent.futures.ThreadPoolExecutor(2 if bench.rehearse else 4) as pool:
        pool.submit(guarded, "tests", "", lambda: device_tests(bench))
        pool.submit(guarded, "alpha", "", lambda: alpha(bench))
        data = pool.submit(guarded, "data", "", lambda: make_corpus(bench))
        data.result()
        for case in RESUMES[-1:] if bench.rehearse else RESUMES:
            pool.submit(
                guarded, "resume", resume_name(*case), lambda case=case: resume(bench, *case)
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="after which no step goes on (default 10)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--part", choices=("alpha", "analysis"), help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "alpha":
        return alpha_part(options.rehearse)
    if options.part == "analysis":
        return analysis_part(options.size, options.rehearse)
    facts = device_facts(options.rehearse)
    out = os.environ.get("OUT")
    first = facts["device"].split(",")[0]
    name = "gpu" if out else "gpu_" + re.sub(r"[^A-Za-z0-9]+", "_", first).strip("_")
    results = Results(Path(out) if out else ROOT / "benchmarks/results", name, facts)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu_bench_", ignore_cleanup_errors=True) as work:
        bench = Bench(options, Path(work), results)
        try:
            correctness(bench)
            training(bench)
            with bench.guarded("analysis"):
                analysis(bench)
            with bench.guarded("vision"):
                vision(bench)
            for size, batch in (("60m", 256), ("1b", 32)):
                with bench.guarded("profile", size):
                    profile(bench, size, batch)
            with bench.guarded("contexts"):
                contexts(bench)
        finally:
            bench.kill_all()
            results.add("end", "minutes_left", round(bench.remaining / 60, 2))
            print_table(results)
            print_goals(results.data["steps"])


def print_table(results: Results) -> None:
    """Print the table of all results: step, measured, note."""
    width = [max(len(row[i]) for row in [*results.table, ("", "", "")]) for i in range(2)]
    print(
        f"\n{results.data['device']}, torch {results.data['versions'].get('torch')}: {results.path}"
    )
    for step, measured, note in [("step", "measured", "note"), *results.table]:
        print(f"{step.ljust(width[0])}  {measured.ljust(width[1])}  {note}", flush=True)


MFU_GOALS = {"60m": 0.40, "130m": 0.45, "350m": 0.50, "1b": 0.55}
ALPHA_GOAL = 1e-6  # relative deviation from float64 singular values, with condition 1e3 to 1e12
MEMORY_GOAL = 0.10  # largest relative difference between plan.py and the measured peak
ANALYSIS_GOAL = 0.01  # of the time, with an analysis in 500 updates


def goals(steps: dict) -> list[tuple[str, str, str, bool | None]]:
    """Compare results with the goals.

    Args:
        steps: the results by step, as in the file of results.

    Returns:
        Rows of goal, aim, what was measured, and whether it holds; None if it was not measured.
    """
    rows: list[tuple[str, str, str, bool | None]] = []

    def row(goal: str, aim: str, measured: str | None, holds: bool = False) -> None:
        rows.append((goal, aim, measured or "-", None if measured is None else holds))

    tests = steps.get("tests", {})
    last = (tests.get("error") or tests.get("output") or "").splitlines()[-1:]
    holds = "error" not in tests and "passed" in "".join(last)
    row("tests that need a GPU", "pass", last[0] if last else None, holds)
    matrices = steps.get("alpha", {}).get("matrices", [])
    worst = max((m["alpha_training"] for m in matrices), default=None)
    row("alpha", f"within {ALPHA_GOAL:g}", worst and f"{worst:.1e}", (worst or 0) <= ALPHA_GOAL)
    for case in RESUMES:
        if case[2]:
            found = [
                steps.get("resume", {}).get(f"{resume_name(*case)}, {other}")
                for other in ("again", "resumed")
            ]
            equal = all(
                r and r["weights_equal"] and not r["largest_loss_difference"] for r in found
            )
            text = ("bit for bit" if equal else "differs") if any(found) else None
            row(f"resume, {resume_name(*case)}", "bit for bit", text, equal)
    for size, aim in MFU_GOALS.items():
        result = steps.get("training", {}).get(f"{size} bf16_mixed alphadecay")
        mfu = result and f"{result['mfu']:.1%}"
        row(f"MFU, {size}", f"{aim:.0%}", mfu, bool(result) and result["mfu"] >= aim)
        if not result:
            continue
        ratio = result["planned_memory_bytes"] / result["peak_memory_bytes"] - 1
        aim_text = f"within {MEMORY_GOAL:.0%}"
        row(f"plan.py's memory, {size}", aim_text, f"{ratio:+.1%}", abs(ratio) <= MEMORY_GOAL)
        share = result["analysis_seconds"] / 500 / result["seconds_an_update"]
        row(f"analysis, {size}", f"{ANALYSIS_GOAL:.0%}", f"{share:.2%}", share <= ANALYSIS_GOAL)
    processes = steps.get("contexts", {}).get("processes on GPU 0")
    row("processes on GPU 0", "1", processes and str(processes), processes == 1)
    return rows


def print_goals(steps: dict) -> None:
    """Print the table of goals."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    lines = [("goal", "aim", "measured", "")]
    lines += [(*texts, words[holds]) for *texts, holds in goals(steps)]
    width = [max(len(line[i]) for line in lines) for i in range(3)]
    print()
    for line in lines:
        print("  ".join([*(line[i].ljust(width[i]) for i in range(3)), line[3]]).rstrip())


if __name__ == "__main__":
    main()
