"""Randomness as a pure function of a path: nothing is seeded globally or has to be saved."""

import hashlib

import torch


def digest(*path: object) -> int:
    """Hash a path of plain values (str, int, float, tuples) to 64 bits, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(repr(path).encode(), digest_size=8).digest(), "little")


def generator(*path: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Make the generator that belongs to `path`, for example ("noise", seed, step, index).

    The same path gives the same numbers in every process, so draws depend neither on the number
    of ranks, nor on the micro-batch, nor on where a run was resumed. torch's CPU generator keeps
    only 32 bits of its seed: two of a million paths meet with probability of about 1e-4 and then
    share numbers, which is harmless for noise. Other devices draw other numbers.
    """
    return torch.Generator(device).manual_seed(digest(*path))
