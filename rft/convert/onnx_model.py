"""A classifier as ONNX: uint8 images in, logits out, for any number of images.

The input is decoded, resized and cropped RGB, and the graph normalises it. Therefore an application
needs no mean and deviation, and its input has a quarter of the bytes of floats.
"""

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rft.clip.architecture import Architecture
from rft.clip.classifier import build_classifier

OPSET = 20  # the first with GELU as one operator; onnxruntime 1.17 and newer
BYTES = 2**31 - 2**20  # limit of the weights: protobuf ends at 2 GiB
INPUT, OUTPUT, BATCH = "images", "logits", "batch"
PACKAGES = ("onnx", "onnxscript")


def require_packages() -> None:
    """Check that the packages that write ONNX are installed.

    Raises:
        ValueError: with the command that installs it.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"--to onnx needs {' and '.join(missing)}; in rft's clone: pip install '.[onnx]'"
        )


def to_bytes(
    state: dict[str, Tensor], architecture: Architecture, entries: Mapping[str, Any]
) -> bytes:
    """Export a classifier as an ONNX file, with JSON values as its metadata.

    Raises:
        ValueError: if the weights are too large for one file.
    """
    size = sum(value.nbytes for value in state.values())
    if size > BYTES:
        raise ValueError(f"the weights have {size:,} bytes; ONNX files are limited to {BYTES:,}")
    model = build_classifier(state, architecture)
    side = architecture.image_size
    # two images, because the exporter would take a batch of one for a constant
    images = torch.zeros((2, 3, side, side), dtype=torch.uint8)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter warns of constants that it does not fold
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
    finally:
        logging.disable(level)
    assert program is not None
    proto: Any = program.model_proto
    # the exporter records source lines with paths of this machine
    for part in _parts(proto):
        del part.metadata_props[:]
    for name, value in entries.items():
        proto.metadata_props.add(key=name, value=json.dumps(value))
    return proto.SerializeToString(deterministic=True)


def _parts(proto: Any) -> Iterator[Any]:
    graph = proto.graph
    yield from (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output)
    yield from graph.initializer
    for function in proto.functions:
        yield from (function, *function.node, *function.value_info)
