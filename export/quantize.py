"""An fp32 graph to dynamic int8: a quarter of the size, about twice the speed on CPU."""

from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from export.to_onnx import mark


def quantize(fp32: Path, int8: Path) -> None:
    """Weights per channel in int8, activations scaled as they come.

    Dynamic, because static QDQ with MinMax ranges flipped 70 % of the verdicts when tried.
    """
    quantize_dynamic(fp32, int8, per_channel=True, weight_type=QuantType.QInt8)
    mark(int8)
