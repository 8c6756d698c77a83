"""How tensor cores add up products: a model, for the bound that the oracle allows and for the PTX machine."""

import numpy as np

from support.oracle import Array


def tensor_core_sums(products: Array, block: int, extra: int, start: Array | None = None) -> Array:
    """Sums [P] of exact products [P, D] as tensor cores take them: `block` at a time and the sum so far, each cut off
    `extra` bits below the last place (of 24 bits) of the largest of them; the new sum is cut off at its own.

    sm_80 takes 8 with 1 extra bit, sm_90 16 with 2. start: the sums so far, else 0.
    """
    total = np.zeros((len(products), 1)) if start is None else start[:, None].astype(np.float64)
    for k in range(0, products.shape[1], block):
        terms = np.concatenate([total, products[:, k : k + block]], 1)
        place = np.ldexp(1.0, np.frexp(np.abs(terms).max(1, keepdims=True))[1] - 24 - extra)
        total = (np.trunc(terms / place) * place).sum(1, keepdims=True)
        place = np.ldexp(1.0, np.frexp(np.abs(total))[1] - 24)
        total = np.trunc(total / place) * place
    sums: Array = total[:, 0]
    return sums
