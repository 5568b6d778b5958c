"""Names of the files of records, and how a record is appended."""

import json
import math
from pathlib import Path

METRICS, MODULES, RUN, LOCK = "metrics.jsonl", "modules.jsonl", "run.json", ".lock"


def append_json(path: Path, records: list[dict]) -> None:
    """Append records to a file, a line each, all or (raising OSError) none; the file is made if need be."""
    lines = memoryview(
        "".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records).encode()
    )
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while lines:
                lines = lines[file.write(lines) :]
        except OSError:
            file.truncate(end)  # no half line that the next record would run into
            raise


def finite(record: dict) -> dict:
    """The record with None for numbers that JSON has no word for."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
