"""Removes from tensor names the prefixes that compilers and trainers add to wrapped modules."""

import re

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check

# Prefixes of wrappers, anywhere in a name; `module.` only if all names begin with it.
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIX = "module."


def without_wrappers(tensors: LazyArrays) -> LazyArrays:
    """The same tensors without wrapper prefixes. Raises `ValueError` if two names collide."""
    names = {name: _WRAPPERS.sub("", name) for name in tensors.specs}
    while names and all(name.startswith(_PREFIX) for name in names.values()):
        names = {name: short.removeprefix(_PREFIX) for name, short in names.items()}
    originals = {short: name for name, short in names.items()}
    collisions = sorted(name for name, short in names.items() if originals[short] != name)
    rule = "names differ only in the prefixes of module wrappers"
    check(not collisions, tensors.where, collisions[:5], rule, "Save only the unwrapped model")
    specs = {short: tensors.specs[name] for name, short in names.items()}
    return LazyArrays(tensors.where, specs, lambda short: tensors.read(originals[short]))
