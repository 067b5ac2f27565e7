"""dpo.flops against the published counts of the public model configurations."""

import pytest
import torch

from dpo.training.flops import pair_flops, peak_tflops, unet_flops, vae_encode_flops

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
TERA = 1e12


def test_sd15_at_512():
    assert unet_flops(SD15, 64, 64) / TERA == pytest.approx(0.80, abs=0.005)


def test_sdxl_at_1024():
    assert unet_flops(SDXL, 128, 128) / TERA == pytest.approx(6.76, abs=0.005)


def test_vae_encode():
    assert vae_encode_flops(VAE, 512, 512) / TERA == pytest.approx(1.12, abs=0.005)
    assert vae_encode_flops(VAE, 1024, 1024) / TERA == pytest.approx(4.88, abs=0.005)


def test_count_needs_no_memory_and_leaves_the_default_device():
    unet_flops(
        {
            **SD15,
            "block_out_channels": [32, 64],
            "down_block_types": ["DownBlock2D"] * 2,
            "up_block_types": ["UpBlock2D"] * 2,
        },
        8,
        8,
    )
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"recompute": 1.0, "encode": 1.12}, 10.2),
        ({"recompute": 1.0}, 8.0),
        ({}, 6.4),
        ({"reference": "recorded"}, 4.8),
        ({"trainable": "lora"}, 4.8),
        ({"reference": None, "halves": 1}, 2.4),
    ],
)
def test_cost_of_a_pair(settings, expected):
    assert pair_flops(0.80, **settings) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Intel(R) Xeon(R)", None),
        ("NVIDIA RTX A6000", 154.8),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak
