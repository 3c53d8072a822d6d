"""Low-rank factors beside the layers of a frozen module (Hu et al. 2021, arXiv:2106.09685): W x becomes W x + (alpha/r) B A x.

Only B is trained; A stays what every site and the server draw from its name by a hash (FFA-LoRA: Sun et al. 2024,
arXiv:2403.12313). With both trained their noises multiply, which diverged at every rate that the head needs
(`benchmarks/LOG.md`), and the mean of sites' products is not the product of their means. B starts at zero.

Covered: Linear, GPT-2's Conv1D, Conv1d/2d with one group; layers whose attributes the model reads (MobileNetV2 pads by them).
Not covered: raw parameters and recurrent layers, which peft cannot adapt; depthwise convolutions, which have no low rank.
"""

import hashlib
import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from urna.models.huggingface import FAMILIES
from urna.models.tunable import Classifier
from urna.protocol.errors import ModelError

ADAPTER = "default"  # peft's name for the only one
SCALE = 0.5  # alpha / rank of what sites train: at 2, the usual one, the factors need a hundredth of the head's learning rate
_READ_OF_A_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


def lora_targets(module: nn.Module) -> tuple[str, ...]:
    """Names of the layers that `add_lora` adapts: those of a known family, else every linear layer and convolution.

    A classifier's head is not among them: it is trained whole.

    Raises:
        ModelError: there is none.
    """
    prefix, body = ("backbone.", module.backbone) if isinstance(module, Classifier) else ("", module)
    known = _family_targets(body)
    names = [name for name, layer in _adaptable(body) if known is None or name.rpartition(".")[2] in known]
    if not names:
        raise ModelError(f"expected layers that LoRA can adapt, found none in {type(body).__name__}: choose head or full")
    return tuple(prefix + name for name in names)


def add_lora(module: nn.Module, rank: int, alpha: float) -> None:
    """Freeze the module and put trainable low-rank factors beside its `lora_targets`, in place; it is in eval mode then.

    Args:
        module: A backbone or a whole model; a `Classifier`'s head stays as it is.
        rank: The factors' inner dimension r, at least 1.
        alpha: The factors' product is multiplied by alpha / r.

    Raises:
        ModelError: no layer can be adapted, or the module already has factors.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    if any(isinstance(part, LoraLayer) for part in module.modules()):
        raise ModelError("expected a module without low-rank factors, found some: load it again")
    targets = lora_targets(module)
    body = module.backbone if isinstance(module, Classifier) else module
    body.requires_grad_(False)
    exactly = "|".join(re.escape(name) for name in targets)  # a list would match by the ends of names
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number serves
        target_modules=f"(?:{exactly})",
        fan_in_fan_out=all(isinstance(module.get_submodule(name), Conv1D) for name in targets),
    )
    inject_adapter_in_model(settings, module, adapter_name=ADAPTER)
    if isinstance(module, Classifier):  # peft freezes all that it does not adapt
        module.head.requires_grad_(True)
    prefix = "backbone." if isinstance(module, Classifier) else ""
    for name in targets:
        _prepare(name.removeprefix(prefix), module.get_submodule(name))
    module.eval()  # the factors are made in training mode


def _prepare(name: str, layer: nn.Module) -> None:
    """Give the factors their public start, and the wrapper what a model may read of a convolution."""
    for kind in ("lora_A", "lora_B"):
        weight = layer.get_parameter(f"{kind}.{ADAPTER}.weight")
        start = public_start(f"{name}.{kind}", weight.shape) if kind == "lora_A" else torch.zeros(weight.shape)
        with torch.no_grad():
            weight.copy_(start)
        weight.requires_grad_(kind == "lora_B")
    base = layer.get_submodule("base_layer")
    if isinstance(base, nn.Conv1d | nn.Conv2d):
        for attribute in _READ_OF_A_CONVOLUTION:
            if not hasattr(layer, attribute):
                setattr(layer, attribute, getattr(base, attribute))


def public_start(name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter's start, float32: uniform within 1/sqrt(fan in), as kaiming, and the same on every machine.

    Drawn by SHAKE-256 from its name and shape: no generator's state or library's version plays a part.
    """
    count, fan_in = shape.numel(), shape[1:].numel()
    stream = hashlib.shake_256(f"urna lora start 1:{name}:{tuple(shape)}".encode()).digest(4 * count)
    uniform = (np.frombuffer(stream, "<u4") >> 8).astype(np.float32) * 2.0**-23 - 1.0  # [-1, 1), exact
    return torch.from_numpy(uniform.astype(np.float32) / np.float32(math.sqrt(fan_in))).reshape(shape)


def _family_targets(body: nn.Module) -> tuple[str, ...] | None:
    """The names of a family's layers, if there is a transformers model in it."""
    for part in body.modules():
        if isinstance(part, PreTrainedModel) and part.config.model_type in FAMILIES:
            return FAMILIES[part.config.model_type].lora
    return None


def _adaptable(body: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside_attention = {  # torch's own attention reads this layer's weight and never calls it
        id(part.out_proj) for part in body.modules() if isinstance(part, nn.MultiheadAttention)
    }
    for name, layer in body.named_modules():
        grouped = isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups > 1
        if isinstance(layer, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d) and not grouped and id(layer) not in inside_attention:
            yield name, layer
