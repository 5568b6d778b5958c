"""Old path of scripts/cluster/plan.py. It works for one more release."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "cluster" / "plan.py"), run_name="__main__")
