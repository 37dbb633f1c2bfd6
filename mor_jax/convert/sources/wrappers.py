"""Names as the model itself has them: what compilers and trainers wrap around modules is undone."""

import re

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check

# What wrappers leave inside of names; `module.` only counts in front of all of them.
_INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_IN_FRONT = "module."


def unwrapped(tensors: LazyArrays) -> LazyArrays:
    """The same tensors without wrappers in their names. Raises `ValueError` if two become one."""
    names = {name: _INSIDE.sub("", name) for name in tensors.specs}
    while names and all(name.startswith(_IN_FRONT) for name in names.values()):
        names = {name: short.removeprefix(_IN_FRONT) for name, short in names.items()}
    found = {short: name for name, short in names.items()}
    twice = sorted(name for name, short in names.items() if found[short] != name)
    rule = "names that differ in wrappers of modules only"
    check(not twice, tensors.where, twice[:5], rule, "Save the model that is wrapped, not both")
    specs = {short: tensors.specs[name] for name, short in names.items()}
    return LazyArrays(tensors.where, specs, lambda short: tensors.read(found[short]))
