"""A candidate of some kilobytes, made as `urna models add` makes one."""

from pathlib import Path

import torch
from transformers import ViTConfig, ViTModel

from urna.models.installed import About, install

NAME = "tiny"


def install_tiny(hub: Path, root: Path | None = None) -> Path:
    """A vision transformer with weights of a fixed seed.

    Args:
        hub: a folder for the model as Hugging Face writes it.
        root: of artefacts; None is the cache.

    Returns:
        The artefact's folder.
    """
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(config, add_pooling_layer=False).save_pretrained(hub)
    return install(NAME, hub, About("Apache-2.0", "nothing"), root=root).folder
