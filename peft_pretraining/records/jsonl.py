"""Names of the files with records, and how a record is appended."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS, MODULES, RUN, LOCK = "metrics.jsonl", "modules.jsonl", "run.json", ".lock"


def append_json(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Append records to a file, one line each; create the file if it does not exist.

    After an error no part of the records is in the file.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    text = "".join(json.dumps(null_for_nonfinite(r), allow_nan=False) + "\n" for r in records)
    remaining = memoryview(text.encode())
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while remaining:
                remaining = remaining[file.write(remaining) :]
        except OSError:
            # Leave no incomplete line, which the next record would continue.
            file.truncate(end)
            raise


def null_for_nonfinite(record: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities by None, because JSON cannot represent them."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
