"""``make fuzz``: random lives for so many minutes, over one engine after the other.

``FUZZ_MINUTES`` (5), ``FUZZ_ENGINE`` (all of ``model.ENGINES``), ``FUZZ_SEED`` (any): with a seed,
its lives alone, and if they fail the shortest that does.
"""

import os
import random
import time
from collections import Counter

import conftest  # noqa: F401  The settings of a CPU, before vLLM is imported.

from fuzz.machine import Fuzzed, run
from fuzz.model import ENGINES

LIVES, EVENTS = 10, 30


def main() -> None:
    names = os.environ.get("FUZZ_ENGINE", " ".join(ENGINES)).split()
    seed = os.environ.get("FUZZ_SEED")
    end = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", 5))
    total = Counter()
    while True:
        for name in names:
            fuzzed = Fuzzed(name)
            try:
                each = int(seed) if seed else random.randrange(10**6)
                print(f"{name}, seed {each}", flush=True)
                run(fuzzed, each, LIVES, EVENTS, shortens=seed is not None)
            finally:
                total += fuzzed.counts
                print(dict(total), flush=True)
                fuzzed.close()
            if seed is None and time.monotonic() > end:
                return
        if seed:
            return


if __name__ == "__main__":
    main()
