"""The digest of a manifest, which shows when it was changed by hand. Imports nothing heavy."""

import hashlib
import json
from typing import Any


def digest(values: dict[str, Any]) -> str:
    """Of all values of a manifest but its own digest."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
