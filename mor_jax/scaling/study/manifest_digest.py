"""The digest of a manifest, which detects edits. Imports nothing heavy."""

import hashlib
import json
from typing import Any


def digest(values: dict[str, Any]) -> str:
    """SHA-256, 32 hex digits, of all values of a manifest except its digest."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
