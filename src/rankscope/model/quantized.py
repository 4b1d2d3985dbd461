"""A frozen base with linear layers that bitsandbytes has quantized: extra `quantization`.

nf4   4 bits a weight, NormalFloat in blocks of 64 with doubly quantized scales: Dettmers et al. 2023, arXiv:2305.14314
int8  8 bits a weight, with one scale for each row: Dettmers et al. 2022, arXiv:2208.07339

transformers quantizes all linear layers but the output layer while it loads. Products are of the base's dtype, over
weights that are dequantized for each product and again in its backward: y = x dequantize(W).T + b. bitsandbytes' own
forwards are not used: that of int8 quantizes activations by what else is in the batch, so that a trial's numbers would
depend on its pack; and on CPUs with AVX512-BF16 that of nf4 rearranges the weights.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from rankscope.errors import ModelError, require
from rankscope.model.mixed import FrozenForward

_NF4_BLOCK = 64
_SCALES_BLOCK = 256
"""Values that share a scale, and scales that do, as bitsandbytes has them by default."""


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration for `model.quantization`; other weights and all products have `dtype`. Raises
    MissingExtraError: bitsandbytes is not installed."""
    require("bitsandbytes", "quantization", f"model.quantization: {kind}")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


class DequantizedForward(FrozenForward):
    """The forward of one quantized layer."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The layer's weight, (O, D), dequantized."""
        if self.layer.quant_state is None:
            scales = self.layer.state.SCB / 127  # the largest of each row, which is 127 in the weight
            return self.layer.weight.data.to(dtype).mul_(scales[:, None])  # type: ignore[no-any-return]
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.layer.weight.data, self.layer.quant_state).to(dtype)


def is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), DequantizedForward)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Quantized layers as (name, module)."""
    return ((name, layer) for name, layer in model.named_modules() if is_quantized(layer))


def use_dequantized_forward(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give this forward, with products of `dtype`, to the bitsandbytes layers of a loaded model. Raises ModelError: no
    layer is quantized."""
    for kind, layer in _layers_of_bitsandbytes(model):
        if kind == "int8":
            layer.init_8bit_state()  # which its own forward does first: the scales move from the weight to the layer
            layer.quant_state = None
        layer.forward = DequantizedForward(layer, dtype)


def _layers_of_bitsandbytes(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers of bitsandbytes as (kind, module). Raises ModelError: there are none."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    kinds: dict[type[nn.Module], str] = {Linear4bit: "nf4", Linear8bitLt: "int8"}
    layers = [(kind, layer) for layer in model.modules() for cls, kind in kinds.items() if isinstance(layer, cls)]
    if not layers:
        raise ModelError(
            f"model.quantization: no layer of a {type(model).__name__} can be quantized: its linear layers are of a "
            "class of its own",
            "Leave it out, or use bfloat16.",
        )
    return layers


def quantize_skeleton(model: PreTrainedModel, config: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Quantize a model on the meta device as loading quantizes a real one: layers and tensors have the same shapes and
    types. Raises MissingExtraError: bitsandbytes is not installed; ModelError: no layer can be quantized."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # for the biases
    try:
        quantizer.preprocess_model(model=model, device_map=None)
    finally:
        torch.set_default_dtype(before)
    quantizer.postprocess_model(model)
    from bitsandbytes.functional import QuantState

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    nested, digits = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    for kind, layer in _layers_of_bitsandbytes(model):
        rows, columns = layer.out_features, layer.in_features
        if kind == "int8":
            weight: Any = nn.Parameter(empty(rows, columns, dtype=torch.int8), requires_grad=False)
            layer.quant_state, layer.state.SCB = None, empty(rows)
        else:
            weight = nn.Parameter(empty(-(-rows * columns // 2), 1, dtype=torch.uint8), requires_grad=False)
            weight.compress_statistics, weight.quant_type = nested, digits  # which PEFT reads
            blocks = -(-rows * columns // _NF4_BLOCK)
            scales = {"code": empty(256), "blocksize": _SCALES_BLOCK, "dtype": torch.float32}
            twice = {"offset": empty(), "state2": QuantState(empty(-(-blocks // _SCALES_BLOCK)), **scales)}
            shape, absmax = torch.Size([rows, columns]), empty(blocks, dtype=torch.uint8 if nested else torch.float32)
            digit = {"code": empty(16), "blocksize": _NF4_BLOCK, "dtype": dtype, "quant_type": digits, "shape": shape}
            layer.quant_state = QuantState(absmax, **digit, **(twice if nested else {}))
        layer.weight, layer.forward = weight, DequantizedForward(layer, dtype)
        # PEFT's DoRA dequantizes by the weight's type, which this one lacks, or as HQQ's layers do.
        layer.W_q, layer.dequantize = weight, partial(layer.forward.weight, dtype)


def quantization_tensors(model: nn.Module) -> list[tuple[Any, str]]:
    """Tensors of quantized layers beside their weights, each as (holder, attribute name)."""
    places: list[tuple[Any, str]] = []
    for _, layer in quantized_layers(model):
        state = layer.quant_state
        if state is None:
            places.append((layer.state, "SCB"))
            continue
        places += [(state, "absmax"), (state, "code")]
        if state.nested:
            places += [(state, "offset"), (state.state2, "absmax"), (state.state2, "code")]
    return places


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that hold the model's weights: its parameters, and the scales of quantized layers."""
    yield from model.parameters()
    for holder, name in quantization_tensors(model):
        yield getattr(holder, name)


def base_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights as they are stored, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held_tensors(model)}
    return sum(storages.values())


def parameter_count(model: nn.Module) -> int:
    """Number of the model's weights, each once, in whatever form they are stored."""
    quantized = {id(layer.weight): layer.in_features * layer.out_features for _, layer in quantized_layers(model)}
    return sum(quantized.get(id(parameter), parameter.numel()) for parameter in model.parameters())
