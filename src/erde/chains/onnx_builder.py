"""Nodes before and after those of a graph; among them the resizing of images as Pillow does it."""

from __future__ import annotations

from typing import Any

import numpy as np

from erde.chains.onnx_files import add_constant, import_onnx

ImageShape = tuple[int, int, int]


class Builder:
    """Nodes before and after those of a graph."""

    def __init__(self, model: Any, prefix: str = "erde/") -> None:
        self.model = model
        self.prefix = prefix
        self.onnx = import_onnx()
        self.first: list[Any] = []
        self.count = 0

    def constant(self, values: Any) -> str:
        """Add a weight; its name."""
        self.count += 1
        return add_constant(self.model, f"{self.prefix}{self.count}", values)

    def before(self, kind: str, x: str, name: str | None = None, *others: str, **attributes: Any) -> str:
        """Add a node in front of the graph, behind those already there; the name of what it gives."""
        self.count += 1
        name = name or f"{self.prefix}{self.count}"
        node = self.onnx.helper.make_node(
            kind, [x, *others], [name], f"{self.prefix}{kind}_{self.count}", **attributes
        )
        self.first.append(node)
        return name

    def after(self, kind: str, inputs: list[str], name: str | None = None, **attributes: Any) -> str:
        """Add a node at the end."""
        self.count += 1
        name = name or f"{self.prefix}{self.count}"
        node = self.onnx.helper.make_node(
            kind, inputs, [name], f"{self.prefix}{kind}_{self.count}", **attributes
        )
        self.model.graph.node.append(node)
        return name

    def insert(self) -> None:
        """Put the nodes of :meth:`before` in their place."""
        nodes = [*self.first, *self.model.graph.node]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def set_ends(self, image_shape: list[Any], logits_shape: list[Any]) -> None:
        """Insert the nodes, and name the input and output of the graph."""
        self.insert()
        graph, helper, kinds = self.model.graph, self.onnx.helper, self.onnx.TensorProto
        del graph.input[:], graph.output[:]
        graph.input.append(helper.make_tensor_value_info("images", kinds.UINT8, image_shape))
        graph.output.append(helper.make_tensor_value_info("logits", kinds.FLOAT, logits_shape))


def resized(
    builder: Builder, x: str, image_shape: ImageShape, resize: tuple[int, int], size: tuple[int, int]
) -> str:
    """Images (N, H, W, C) so that they cover ``resize``, then the middle of that, ``size``; as ``common.images`` does it."""
    height, width = image_shape[:2]
    if (height, width) != resize:
        factor = max(resize[0] / height, resize[1] / width)
        covering = (max(resize[0], round(height * factor)), max(resize[1], round(width * factor)))
        if covering != (height, width):
            scales = [1, _scale(height, covering[0]), _scale(width, covering[1]), 1]
            # On uint8 with these settings ONNX Runtime gives Pillow's pixels. (Sizes along two axes would be plainer, but
            # its optimiser loses them where a transposition follows.)
            x = builder.before(
                "Resize",
                x,
                None,
                "",
                builder.constant(np.array(scales, dtype=np.float32)),
                mode="linear",
                antialias=1,
                exclude_outside=1,
                coordinate_transformation_mode="half_pixel",
            )
            height, width = covering
    middle = [(height - resize[0]) // 2 + (resize[0] - size[0]) // 2]
    middle.append((width - resize[1]) // 2 + (resize[1] - size[1]) // 2)
    if (height, width) != size:
        ends = [middle[0] + size[0], middle[1] + size[1]]
        limits = [builder.constant(np.array(values)) for values in (middle, ends, [1, 2])]
        x = builder.before("Slice", x, None, *limits)
    return x


def _scale(source: int, target: int) -> np.float32:
    """The float32 nearest to target / source with which a side of ``source``, rounded down, becomes ``target``."""
    scale = np.float32(target / source)
    while np.floor(np.float32(source) * scale) < target:
        scale = np.nextafter(scale, np.float32(2) * scale)
    return scale
