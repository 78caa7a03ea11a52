"""Seeds of the parts of a run."""

import numpy as np


def combine_seeds(*seeds: int) -> int:
    """One seed from several, different for all of them."""
    state = np.random.SeedSequence(seeds).generate_state(1)
    return int(state[0] >> 1)
