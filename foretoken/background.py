"""A step compiled in a process of its own: `python -m foretoken.background MODEL DTYPE FEATURE ...`.

`CompiledTarget` starts it where sessions are not to wait.
"""

import os
import sys
from collections.abc import Sequence

from foretoken.compiled import CompiledTarget, recipe_for
from foretoken.errors import UserError
from foretoken.kernels import load_kernels
from foretoken.loading import load
from foretoken.program import kept


def main(arguments: Sequence[str]) -> int:
    """Compile the step of the model at a path, of that dtype and with those features; 2 and a sentence if it cannot."""
    name, dtype, *features = arguments
    os.nice(10)
    try:
        load_kernels()
        target = CompiledTarget(load(name, dtype=dtype, device="cpu"))
        kept(recipe_for(target.eager, tuple(map(int, features))), lambda stage: None)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
