"""Run every case of method_twins.py under torchrun, and write the differences to a folder."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tests.support.method_twins import CASES, greatest_deviation


def main() -> None:
    dist.init_process_group("gloo")
    deviations = {" ".join(case): greatest_deviation(*case) for case in CASES}
    (Path(sys.argv[1]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(deviations))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
