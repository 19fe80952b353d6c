"""What the backbone families cost, written down layer by layer from the papers: no code under test runs here."""

from __future__ import annotations

import math


class Bill:
    """Adds up parameters and multiply-accumulates of square maps, one layer after the other."""

    def __init__(self) -> None:
        self.parameters = 0
        self.macs = 0

    def conv(
        self, before: int, after: int, kernel: int, side: int, *, groups: int = 1, bias: bool = False
    ) -> None:
        """A convolution whose output has ``side`` pixels a side, and the batch norm that follows each here."""
        weights = before // groups * after * kernel**2
        self.parameters += weights + (after if bias else 0)
        self.macs += weights * side**2
        self.norm(after)

    def bare_conv(self, before: int, after: int, kernel: int, side: int) -> None:
        """A convolution without batch norm after it."""
        self.conv(before, after, kernel, side)
        self.parameters -= 2 * after

    def norm(self, channels: int) -> None:
        self.parameters += 2 * channels

    def linear(self, before: int, after: int) -> None:
        self.parameters += before * after + after
        self.macs += before * after

    @property
    def both(self) -> tuple[int, int]:
        return self.parameters, self.macs


def vgg(depth: int, classes: int, channels: int, side: int) -> tuple[int, int]:
    layout = {
        8: "64 / 128 / 256 / 512 512",
        13: "64 64 / 128 128 / 256 256 / 512 512 512 512",
        16: "64 64 / 128 128 / 256 256 256 / 512 512 512 512 512 512",
    }
    bill = Bill()
    before = channels
    for word in layout[depth].split():
        if word == "/":
            side //= 2
            continue
        bill.conv(before, int(word), 3, side, bias=True)
        before = int(word)
    bill.linear(before, classes)
    return bill.both


def mobilenet_v2_half(classes: int, channels: int, side: int) -> tuple[int, int]:
    """Rows as in table 2 of arXiv 1801.04381, channels halved: expansion, output, stride of each block."""
    bill = Bill()
    side = math.ceil(side / 2)
    bill.conv(channels, 16, 3, side)
    rows = [(1, 8, 1), (6, 12, 1), (6, 12, 1), (6, 16, 2), (6, 16, 1), (6, 16, 1)]
    rows += [(6, 32, 2), (6, 32, 1), (6, 32, 1), (6, 32, 1), (6, 48, 1), (6, 48, 1), (6, 48, 1)]
    rows += [(6, 80, 2), (6, 80, 1), (6, 80, 1), (6, 160, 1)]
    before = 16
    for expansion, after, stride in rows:
        inner = before * expansion
        bill.conv(before, inner, 1, side)
        side = math.ceil(side / stride)
        bill.conv(inner, inner, 3, side, groups=inner)
        bill.conv(inner, after, 1, side)
        before = after
    bill.conv(before, 1280, 1, side)
    bill.linear(1280, classes)
    return bill.both


def shufflenet_v1(classes: int, channels: int, side: int) -> tuple[int, int]:
    bill = Bill()
    bill.conv(channels, 24, 1, side)
    before = 24
    for after, units in ((240, 4), (480, 8), (960, 4)):
        own, half = after - before, math.ceil(side / 2)  # the pooled input fills the other channels
        bill.conv(before, own // 4, 1, side, groups=1 if before == 24 else 3)
        bill.conv(own // 4, own // 4, 3, half, groups=own // 4)
        bill.conv(own // 4, own, 1, half, groups=3)
        side, before = half, after
        for _ in range(units - 1):
            bill.conv(after, after // 4, 1, side, groups=3)
            bill.conv(after // 4, after // 4, 3, side, groups=after // 4)
            bill.conv(after // 4, after, 1, side, groups=3)
    bill.linear(before, classes)
    return bill.both


def shufflenet_v2(classes: int, channels: int, side: int) -> tuple[int, int]:
    bill = Bill()
    bill.conv(channels, 24, 1, side)
    before = 24
    for after, units in ((116, 4), (232, 8), (464, 4)):
        half, small = after // 2, math.ceil(side / 2)
        bill.conv(before, before, 3, small, groups=before)
        bill.conv(before, half, 1, small)
        bill.conv(before, half, 1, side)
        bill.conv(half, half, 3, small, groups=half)
        bill.conv(half, half, 1, small)
        side, before = small, after
        for _ in range(units - 1):
            bill.conv(half, half, 1, side)
            bill.conv(half, half, 3, side, groups=half)
            bill.conv(half, half, 1, side)
    bill.conv(before, 1024, 1, side)
    bill.linear(1024, classes)
    return bill.both


def densenet_bc(depth: int, growth: int, classes: int, channels: int, side: int) -> tuple[int, int]:
    """Norms stand before the convolutions: what follows a convolution as it is billed is the next one's norm."""
    bill = Bill()
    width = 2 * growth
    bill.bare_conv(channels, width, 3, side)
    for group in range(3):
        for _ in range((depth - 4) // 6):
            bill.norm(width)
            bill.conv(width, 4 * growth, 1, side)
            bill.bare_conv(4 * growth, growth, 3, side)
            width += growth
        bill.norm(width)
        if group < 2:
            bill.bare_conv(width, width // 2, 1, side)
            width, side = width // 2, side // 2
    bill.linear(width, classes)
    return bill.both


def msdnet(steps: tuple[int, ...], classes: int, channels: int, side: int) -> list[tuple[int, int]]:
    """Parameters and MACs up to and with each exit, its head and all before included.

    The scales of layer l (from 1) of L are 3, 2, 1 in the three thirds; see section 4 of arXiv 1703.09844.
    """
    sides = [side, math.ceil(side / 2), math.ceil(math.ceil(side / 2) / 2)]
    factor = [1, 2, 4]
    bill = Bill()
    bill.conv(channels, 16, 3, sides[0])
    bill.conv(16, 32, 3, sides[1])
    bill.conv(32, 64, 3, sides[2])
    third = math.ceil(sum(steps) / 3)
    exits = []
    width, number, finest = 16, 0, 0
    for step in steps:
        for _ in range(step):
            number += 1
            keeps_from = (number - 1) // third
            for scale in range(keeps_from, 3):
                has_finer = scale > finest
                after = 6 * factor[scale] // (2 if has_finer else 1)
                sources = [(scale, scale)] + ([(scale - 1, scale - 1)] if has_finer else [])
                for source, width_of in sources:
                    before = width * factor[source]
                    inner = min(before, factor[width_of] * after)
                    bill.conv(before, inner, 1, sides[source])
                    bill.conv(inner, after, 3, sides[scale])
            width += 6
            if keeps_from > finest:
                for scale in range(keeps_from, 3):
                    bill.conv(width * factor[scale], width // 2 * factor[scale], 1, sides[scale])
                width //= 2
            finest = keeps_from
        once, twice = math.ceil(sides[2] / 2), math.ceil(math.ceil(sides[2] / 2) / 2)
        bill.conv(width * 4, 128, 3, once)
        bill.conv(128, 128, 3, twice)
        bill.linear(128, classes)
        exits.append(bill.both)
    return exits
