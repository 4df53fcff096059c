"""Weights rounded to 8 bits by torchao: another model, never a faster way to run the same one."""

from importlib.util import find_spec

from transformers import PreTrainedModel

from foretoken.errors import UserError, unknown

KINDS = ("int8",)


def require_quantizable(kind: str, compile: bool) -> None:
    """`UserError` if weights cannot be rounded like that, here, or the step was to be compiled as well."""
    if kind not in KINDS:
        raise unknown("way to round weights", kind, KINDS)
    if find_spec("torchao") is None:
        raise UserError("Rounding weights to int8 needs torchao; install it with pip install 'foretoken[quant]'.")
    if compile:
        raise UserError("A step over int8 weights is not compiled; give quantize or compile, not both.")


def quantized(model: PreTrainedModel, kind: str) -> None:
    """Round the weights of the model's linear layers; its name then says how."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore

    quantize_(model, Int8WeightOnlyConfig())
    model.name_or_path = model.config.name_or_path = f"{model.name_or_path} ({kind})"
