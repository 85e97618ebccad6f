"""Random numbers by key: what is drawn depends on the run's seed and what it is for, never on what came before."""

import hashlib

import torch


def keyed_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed that is a function of the run's seed and the key alone."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator seeded by `keyed_seed`."""
    return torch.Generator().manual_seed(keyed_seed(seed, *key))
