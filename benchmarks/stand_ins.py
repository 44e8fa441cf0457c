"""Empty modules in place of imports that a released code makes and a comparison does not need.

benchmarks/parities imports single files of other repositories with them.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def modules(names: Iterable[str]) -> Iterator[dict[str, ModuleType]]:
    """Put empty modules under some names, and restore the original modules afterwards.

    Modules below one of the names that were imported meanwhile are forgotten too.
    """
    made = {name: ModuleType(name) for name in names}
    tops = {name.partition(".")[0] for name in made}
    before = {name: one for name, one in sys.modules.items() if name.partition(".")[0] in tops}
    for name in before:
        del sys.modules[name]
    for name, module in made.items():
        module.__path__ = []  # a package, whose modules may be imported
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent in made:
            setattr(made[parent], last, module)
    try:
        yield made
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(before)
