r"""Run command lines from standard input, several at a time, for instance one on each GPU.

    printf '%s\n' 'bash scripts/run.sh ...' 'bash scripts/run.sh ...' |
        python scripts/pool.py --gpus 0 1 2,3

Each slot is one or several GPUs (CUDA_VISIBLE_DEVICES of its command); without GPUs, --jobs N runs
N at once. A command that fails does not stop the others: at the end the failed ones are named, and
the exit code is 1. Ctrl-C and SIGTERM end all of them.
"""

import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pool.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    slots = parser.add_mutually_exclusive_group()
    slots.add_argument(
        "--gpus",
        nargs="+",
        metavar="GPUS",
        help="one command at a time on each, e.g. 0 1 or 0,1 2,3",
    )
    slots.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="commands at once, where none needs a GPU of its own (default 1)",
    )
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: it must be above 0")
    return args


class Pool:
    """Runs commands on slots.

    A slot is a value of CUDA_VISIBLE_DEVICES. On the slot None a command sees the same GPUs as
    this process.
    """

    def __init__(self, slots: list[str | None]):
        self.free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for slot in slots:
            self.free.put(slot)
        self.size, self.running, self.stopped, self.lock = (
            len(slots),
            set(),
            False,
            threading.Lock(),
        )
        # Commands on one CPU share its cores: threads that wait for one another's would slow all of
        # them many times over.
        share = max(1, (os.cpu_count() or 1) // len(slots))
        self.threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share))}

    def run_all(self, commands: list[str]) -> list[str]:
        """Those that failed."""
        with ThreadPoolExecutor(self.size) as threads:
            numbered = [
                (f"[{i}/{len(commands)}]", command) for i, command in enumerate(commands, 1)
            ]
            codes = list(threads.map(self._run, numbered))
        return [command for command, code in zip(commands, codes, strict=True) if code]

    def _run(self, numbered: tuple[str, str]) -> int:
        place, command = numbered
        slot = self.free.get()
        try:
            surroundings = os.environ | (
                {"CUDA_VISIBLE_DEVICES": slot} if slot is not None else self.threads
            )
            start = time.monotonic()
            with self.lock:
                if self.stopped:
                    return 1
                process = subprocess.Popen(
                    shlex.split(command),
                    env=surroundings,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
            print(
                f"{place} {'done' if code == 0 else f'FAILED ({code})'} in "
                f"{time.monotonic() - start:.0f} s: {command}",
                flush=True,
            )
            return code
        finally:
            self.free.put(slot)

    def stop(self, *_) -> None:
        """Start no more commands, and end those that run.

        A training run saves a checkpoint at the first SIGTERM, and ends at once at a second one.
        """
        with self.lock:
            if self.stopped:
                return
            self.stopped = True
            for process in self.running:
                os.killpg(process.pid, signal.SIGTERM)


def main() -> int:
    args = parse_arguments()
    commands = [line.strip() for line in sys.stdin if line.strip()]
    pool = Pool(args.gpus or [None] * args.jobs)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, lambda *_: threading.Thread(target=pool.stop).start()
        )  # not here: the lock may be held by this thread
    failed = pool.run_all(commands)
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
