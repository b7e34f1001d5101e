"""The networks that diffusion models call at each step, and what turns pictures into their numbers and back."""

from __future__ import annotations

import torch

from tests.zoo.architectures import Row, floors, wave


def latents(channels: int = 4, size: int = 16) -> torch.Tensor:
    return wave(2, channels, size, size)


TIME = torch.tensor([3, 500])
DIFFUSION = {
    "unet": Row(
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
        lambda: {"sample": latents(), "timestep": TIME, "encoder_hidden_states": wave(2, 6, 32)},
        library="diffusers",
        floors={"int8-calibrated": 22},
    ),
    "unet_plain": Row(
        "UNet2DModel",
        {
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        lambda: {"sample": latents(3), "timestep": TIME},
        library="diffusers",
    ),
    "vae": Row(
        "AutoencoderKL",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "sample_size": 32,
        },
        lambda: {"sample": wave(2, 3, 32, 32)},
        library="diffusers",
        floors={"int8-calibrated": 19},
    ),
    "dit": Row(
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 2,
            "sample_size": 8,
            "norm_num_groups": 4,
            "num_embeds_ada_norm": 10,
        },
        lambda: {"hidden_states": latents(4, 8), "timestep": TIME, "class_labels": torch.tensor([1, 2])},
        library="diffusers",
    ),
    "pixart": Row(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_layers": 2,
            "sample_size": 8,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "norm_num_groups": 4,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": latents(4, 8),
            "timestep": TIME,
            "encoder_hidden_states": wave(2, 6, 32),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        library="diffusers",
    ),
    "sd3": Row(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "caption_projection_dim": 64,
            "pooled_projection_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
        lambda: {
            "hidden_states": latents(4, 8),
            "encoder_hidden_states": wave(2, 6, 32),
            "pooled_projections": wave(2, 32),
            "timestep": TIME,
        },
        library="diffusers",
    ),
    "flux": Row(
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        lambda: {
            "hidden_states": wave(2, 16, 16),
            "encoder_hidden_states": wave(2, 6, 32),
            "pooled_projections": wave(2, 32),
            "timestep": torch.tensor([0.3, 0.9]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(6, 3),
        },
        library="diffusers",
    ),
    "sana": Row(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "sample_size": 8,
        },
        lambda: {"hidden_states": latents(4, 8), "encoder_hidden_states": wave(2, 6, 32), "timestep": TIME},
        library="diffusers",
    ),
    "vq": Row(
        "VQModel",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "latent_channels": 3,
            "num_vq_embeddings": 16,
        },
        lambda: {"sample": wave(2, 3, 32, 32)},
        library="diffusers",
        floors=floors(13, 9, 15, 4, 5),
    ),
    "controlnet": Row(
        "ControlNetModel",
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "conditioning_embedding_out_channels": (8, 16),
        },
        lambda: {
            "sample": latents(4, 16),
            "timestep": TIME,
            "encoder_hidden_states": wave(2, 5, 32),
            "controlnet_cond": wave(2, 3, 32, 32),
        },
        library="diffusers",
    ),
}
