"""ONNX models that are made here, with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

#: Inverted residuals of MobileNetV2 (Sandler et al. 2018, table 2): expansion, channels, repeats, stride.
BLOCKS = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class _Net:
    """A chain of layers."""

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.nodes: list[object] = []
        self.weights: list[object] = []
        self.top = "photos"

    def convolution(
        self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        number = len(self.nodes)
        scale = np.sqrt(2 / (kernel * kernel * before / groups))
        weight = self.generator.normal(0, scale, (after, before // groups, kernel, kernel)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(weight, f"w{number}"))
        bias = self.generator.normal(0, 0.1, after).astype(np.float32)
        self.weights.append(numpy_helper.from_array(bias, f"b{number}"))
        self.add(
            "Conv",
            [f"w{number}", f"b{number}"],
            strides=[stride, stride],
            pads=[kernel // 2] * 4,
            group=groups,
            kernel_shape=[kernel, kernel],
        )
        if relu:
            self.add("Relu")

    def add(self, kind: str, others: list[str] | None = None, name: str | None = None, **attributes: object) -> None:
        name = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.top, *(others or [])], [name], **attributes))
        self.top = name


def _save(path: Path, net: _Net, inputs: list[object], outputs: list[object]) -> Path:
    graph = helper.make_graph(net.nodes, "net", inputs, outputs, net.weights)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def _photos(shape: list[int | str], kind: int = TensorProto.FLOAT) -> object:
    return helper.make_tensor_value_info("photos", kind, shape)


def _vectors(shape: list[int | str], name: str = "vectors") -> object:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def mobilenet(path: Path, dimensions: int = 1280, size: int | str = "side", seed: int = 0) -> Path:
    """A model of MobileNetV2's layers and size: 2.2 million weights, 0.3 billion products a photo of 224 x 224."""
    net = _Net(seed)
    net.convolution(3, 32, 3, 2)
    before = 32
    for expansion, channels, repeats, stride in BLOCKS:
        for repeat in range(repeats):
            start = net.top
            wide = before * expansion
            if expansion > 1:
                net.convolution(before, wide, 1)
            net.convolution(wide, wide, 3, stride if repeat == 0 else 1, wide)
            net.convolution(wide, channels, 1, relu=False)
            if repeat:
                net.add("Add", [start])
            before = channels
    net.convolution(before, dimensions, 1)
    net.add("GlobalAveragePool")
    net.add("Flatten", name="vectors")
    return _save(path, net, [_photos(["photos", 3, size, size])], [_vectors(["photos", dimensions])])


def small(
    path: Path, dimensions: int = 16, batch: int | str = "photos", side: int | str = "side", seed: int = 0
) -> Path:
    """One convolution and a mean: vectors that tell photos apart, in no time."""
    net = _Net(seed)
    net.convolution(3, dimensions, 5, 4)
    net.add("GlobalAveragePool")
    net.add("Flatten", name="vectors")
    return _save(path, net, [_photos([batch, 3, side, side])], [_vectors([batch, dimensions])])


def channels_last(path: Path) -> Path:
    """The same of photos whose channels come last."""
    net = _Net(0)
    net.add("Transpose", perm=[0, 3, 1, 2])
    net.convolution(3, 16, 5, 4)
    net.add("GlobalAveragePool")
    net.add("Flatten", name="vectors")
    return _save(path, net, [_photos(["photos", "side", "side", 3])], [_vectors(["photos", 16])])


def two_outputs(path: Path) -> Path:
    """One that gives its feature maps too."""
    net = _Net(0)
    net.convolution(3, 16, 5, 4)
    net.add("GlobalAveragePool", name="pooled")
    net.nodes.append(helper.make_node("Flatten", ["pooled"], ["vectors"]))
    net.nodes.append(helper.make_node("Identity", [net.nodes[1].output[0]], ["maps"]))
    maps = _vectors(["photos", 16, "rows", "columns"], "maps")
    return _save(path, net, [_photos(["photos", 3, "side", "side"])], [_vectors(["photos", 16]), maps])


def no_number_for_dark_photos(path: Path) -> Path:
    """The mean of each channel's logarithm: NaN where a photo's mean level is under what is subtracted."""
    net = _Net(0)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.add("Log", name="vectors")
    return _save(path, net, [_photos(["photos", 3, "side", "side"])], [_vectors(["photos", 3])])


def less_the_mean_of_all(path: Path, batch: int | str = "photos") -> Path:
    """One whose vectors depend on the photos that come with them."""
    net = _Net(0)
    net.convolution(3, 16, 5, 4)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.nodes.append(helper.make_node("ReduceMean", [net.top], ["mean"], axes=[0]))
    net.add("Sub", ["mean"], name="vectors")
    return _save(path, net, [_photos([batch, 3, "side", "side"])], [_vectors([batch, 16])])


def text(path: Path) -> Path:
    """One that takes words."""
    net = _Net(0)
    net.top = "words"
    net.add("Cast", name="vectors", to=TensorProto.FLOAT)
    words = helper.make_tensor_value_info("words", TensorProto.INT64, ["photos", 7])
    return _save(path, net, [words], [_vectors(["photos", 7])])


def grey(path: Path) -> Path:
    """One that takes one channel."""
    net = _Net(0)
    net.convolution(1, 16, 5, 4)
    net.add("GlobalAveragePool")
    net.add("Flatten", name="vectors")
    return _save(path, net, [_photos(["photos", 1, "side", "side"])], [_vectors(["photos", 16])])
