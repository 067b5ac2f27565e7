"""Preference alignment of text-to-image diffusion models: Diffusion-DPO and DDE, on one GPU."""

__version__ = "0.1.0"
