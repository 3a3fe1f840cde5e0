"""First weights: the paper's, Glorot's or He's, drawn by our own hash."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vggcore.counter_hash import hash64
from vggcore.nets import Vgg
from vggcore.recipe import Initialise

CHUNK = 1 << 16                                # weights drawn at a time: what stays in a core's cache
LANES = np.uint64(0x0000FFFF0000FFFF)          # two 16-bit numbers with room above each for sums
LOW_LANE = np.uint64(0xFFFFFFFF)


def initialise_net(net: Vgg, how: Initialise, *, width: float, seed: int, name: str) -> None:
    """Sets every weight of `net` in place by draws named (seed, name, parameter, index), the same on every machine.

    name: the stage's, so that no two stages start from the same draws. Biases are 0. how:
    "paper": normal, mean 0, deviation 0.01 (Sec. 3.1, which prints "10^-2 variance"); at other widths than 1 all layers
    but the first have 0.01/sqrt(width), which keeps a layer's gain where the paper has it (ours).
    "glorot": uniform within sqrt(6/(fan in + fan out)) (Glorot and Bengio 2010; the paper's own advice in Sec. 3.1).
    "he": normal, deviation sqrt(2/fan in) (He et al. 2015).
    """
    with torch.no_grad():
        for module_name, module in net.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear):
                continue
            assert module.bias is not None
            module.bias.zero_()
            weight = module.weight
            receptive = math.prod(weight.shape[2:])
            fan_in, fan_out = weight.shape[1] * receptive, weight.shape[0] * receptive
            if how == "paper":
                factor = 0.01 if module_name == "features.0" else 0.01 / math.sqrt(width)
            elif how == "glorot":
                factor = math.sqrt(6 / (fan_in + fan_out))
            else:
                factor = math.sqrt(2 / fan_in)
            fill(weight, factor, uniform=how == "glorot", keys=(seed, "initialise", name, f"{module_name}.weight"))


def fill(weight: Tensor, factor: float, *, uniform: bool, keys: tuple[int | str, ...]) -> None:
    """Sets `weight` to factor times the draws of `keys`, a few rows at a time, in any memory format, on any device."""
    row = weight[0].numel()
    rows_at_once = max(1, CHUNK // row)
    for first in range(0, weight.shape[0], rows_at_once):
        part = weight[first : first + rows_at_once]
        index = np.arange(first * row, first * row + part.numel(), dtype=np.uint64)
        draws = symmetric_uniforms(keys, index) if uniform else normals16(keys, index)
        part.copy_(torch.from_numpy(draws * np.float32(factor)).view(part.shape))


def normals16(keys: tuple[int | str, ...], index: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Nearly normal draws of mean 0 and deviation 1: the sum of 12 uniforms less 6, within (-6, 6).

    As counter_hash.normals, but of 16-bit uniforms, four from one hash, each at the middle of its 2^16th: 3 hashes a
    draw, not 12, and neighbouring values lie 2^-16 apart. The sums are of integers, so exact on every machine.
    """
    lanes = np.zeros(index.shape, np.uint64)
    for number in range(3):
        bits = hash64(*keys, number, index)
        lanes += bits & LANES
        lanes += (bits >> np.uint64(16)) & LANES
    sums = (lanes & LOW_LANE) + (lanes >> np.uint64(32))      # of 12 numbers 0..65535, below 2^20
    return (sums.astype(np.float32) - np.float32(6 * 2**16 - 6)) * np.float32(2.0**-16)


def symmetric_uniforms(keys: tuple[int | str, ...], index: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Uniform draws in (-1, 1): odd multiples of 2^-24, which float32 holds exactly."""
    bits = (hash64(*keys, index) >> np.uint64(40)).astype(np.int64)
    return (2 * bits + 1 - 2**24).astype(np.float32) * np.float32(2.0**-24)
