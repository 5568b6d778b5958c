"""Started under torchrun with a folder as its argument: every case of method_twins.py on this
rank; writes there how far off each is.
"""

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
