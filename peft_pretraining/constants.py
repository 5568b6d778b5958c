"""Constants that several packages share."""

from __future__ import annotations

# Label of a position that has no target; torch's cross-entropy ignores it by default.
IGNORE_INDEX = -100
