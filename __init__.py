"""Urna: sites that may not pool their records choose a pretrained model together and fine-tune it privately."""

__version__ = "0.1.0"
