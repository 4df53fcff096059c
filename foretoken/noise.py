"""Random numbers that are a pure function of (seed, request, position, token).

The target's sampling noise has no state: whoever asks for the noise of a request at a position gets the same numbers,
whatever was drafted, in whatever batch, after however many forwards. Sampling with it is a deterministic function of
the prefix, so exact parallel decoding is token equality (Daliri, Musco, Suresh 2024, arXiv:2408.07978).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

TARGET, DRAFT, ACCEPT, RESIDUAL = range(4)
"""Streams: the target's own sampling; a drafter's sampling; accept tests; what replaces a rejected guess."""

LOWEST, HIGHEST = -2.8, 22.2
"""Bounds of a Gumbel value below: no noise of this module lies outside them."""
RARE = 8.0
"""One token in 2,981 has a Gumbel value above this."""

MASK64 = (1 << 64) - 1
TILE = 1 << 18  # values hashed at a time, so that the working set stays in the processor's cache


def mix64(x: int) -> int:
    """The splitmix64 finaliser: a bijection of 64-bit integers with full avalanche."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def signed(x: int, bits: int) -> int:
    """The two's complement reading of the low `bits` bits of x."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


M1, M2, M3 = (signed(m, 32) for m in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


@dataclass(frozen=True, slots=True)
class Noise:
    """The noise of B requests.

    key [B] int64, one per request, from its seed and number
    """

    key: Tensor

    @staticmethod
    def of(seeds: list[int], requests: list[int], device: torch.device) -> "Noise":
        keys = [signed(mix64(mix64(s & MASK64) ^ (r & MASK64)), 64) for s, r in zip(seeds, requests, strict=True)]
        return Noise(torch.tensor(keys, dtype=torch.int64, device=device))

    def select(self, rows: list[int]) -> "Noise":
        return Noise(self.key[rows])

    def join(self, other: "Noise") -> "Noise":
        return Noise(torch.cat([self.key, other.key]))

    def bits(self, position: Tensor, stream: int, index: Tensor) -> Tensor:
        """[B, D, I] int32 in [0, 2^31): uniform bits for `position` [B, D] and `index` (hashed, [I])."""
        key = self.key[:, None] ^ ((position << 2) | stream) * signed(0x9E3779B97F4A7C15, 64)
        key = xorshift64(key, 32) * signed(0xD6E8FEB86659FD93, 64)
        key = xorshift64(key, 32) * signed(0xD6E8FEB86659FD93, 64)
        high, low = (key >> 32).to(torch.int32)[..., None], (key & 0xFFFFFFFF).to(torch.int32)[..., None]
        x = index ^ high
        xorshift32_(x.mul_(M1), 16).bitwise_xor_(low)
        xorshift32_(x.mul_(M2), 15)
        xorshift32_(x.mul_(M3), 16)
        return x.bitwise_and_(0x7FFFFFFF)

    def log_exponential(self, position: Tensor, tokens: Tensor, stream: int = TARGET) -> Tensor:
        """[B, D, I] float32: log of an Exp(1) value, that is minus a Gumbel value, for each position [B, D] and token.

        tokens [I] int64. argmax(logits - T * log_exponential) is a draw from softmax(logits / T) (the Gumbel-max
        trick); the smallest exponential is 2^-32, so a token is drawn with its probability to within 2^-32.
        """
        index = hashed(tokens)
        B, D = position.shape
        if torch.compiler.is_exporting():  # no loop over rows, whose number a trace leaves open
            uniform = self.bits(position, stream, index) * (-(2.0**-31) * (1 - 2.0**-23)) - 2.0**-32
            return uniform.log1p().neg().log()
        out = torch.empty(B * D, len(tokens), dtype=torch.float32, device=position.device)
        per = max(1, TILE // (D * max(1, len(tokens))))  # rows of the batch at a time
        for start in range(0, B, per):
            rows = slice(start, start + per)
            part = out[start * D : (start + per) * D]
            bits = Noise(self.key[rows]).bits(position[rows], stream, index)
            part.copy_(bits.view(part.shape)).mul_(-(2.0**-31) * (1 - 2.0**-23)).sub_(2.0**-32)
            part.log1p_().neg_().log_()
        return out.view(B, D, len(tokens))

    def rare(self, position: Tensor, tokens: Tensor, stream: int = TARGET) -> Tensor:
        """[I] bool: the tokens whose Gumbel value is above RARE at any of `position` [B, D]; takes no logarithm."""
        index, below = hashed(tokens), int(-math.expm1(-math.exp(-RARE)) * 2**31) + 1
        least = torch.full(tokens.shape, 2**31 - 1, dtype=torch.int32, device=tokens.device)
        for row in range(len(position)):
            bits = Noise(self.key[row : row + 1]).bits(position[row : row + 1], stream, index)
            least = torch.minimum(least, bits.flatten(0, 1).amin(0))
        return least <= below

    def gumbel(self, position: Tensor, tokens: Tensor, stream: int = TARGET) -> Tensor:
        """[B, D, I] float32 in [LOWEST, HIGHEST]: standard Gumbel values."""
        return self.log_exponential(position, tokens, stream).neg_()

    def uniform(self, position: Tensor, index: Tensor, stream: int = ACCEPT) -> Tensor:
        """[B, D, I] float64 in (0, 1)."""
        return (self.bits(position, stream, hashed(index)).double() + 0.5) * 2.0**-31


def xorshift64(x: Tensor, by: int) -> Tensor:
    return x ^ ((x >> by) & ((1 << (64 - by)) - 1))


def xorshift32_(x: Tensor, by: int) -> Tensor:
    """x ^ (x >>> by) in place; torch's shift of signed integers copies the sign, hence the mask."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))


def hashed(tokens: Tensor) -> Tensor:
    """[I] int32: each token's own 32 bits, before the key of the position enters."""
    x = (tokens.to(torch.int64) * 0x2545F491 + 0x6A09E667) & 0xFFFFFFFF
    return xorshift32_(x.to(torch.int32), 16)


@lru_cache(maxsize=4)
def vocabulary(size: int, device: torch.device) -> Tensor:
    """[size] int64: every token."""
    return torch.arange(size, device=device)
