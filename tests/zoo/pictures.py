"""Pictures, and pictures with text."""

from __future__ import annotations

from tests.zoo.architectures import SMALL, TEXT, Row, floors, picture_and_text, pixels

VIT = {**SMALL, "image_size": 32, "patch_size": 8}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
CLIP_TEXT = {**SMALL, **TEXT, "projection_dim": 32}
CLIP_VISION = {**VIT, "projection_dim": 32}
STAGES = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}

PICTURES = {
    "vit": Row("ViTForImageClassification", VIT, pixels()),
    "deit": Row("DeiTForImageClassification", VIT, pixels()),
    "beit": Row("BeitForImageClassification", {**VIT, "use_relative_position_bias": True}, pixels()),
    "dinov2": Row("Dinov2Model", {**VIT, "mlp_ratio": 2}, pixels()),
    "dinov3": Row("DINOv3ViTModel", VIT, pixels()),
    "swin": Row("SwinForImageClassification", SWIN, pixels()),
    "swinv2": Row(
        "Swinv2ForImageClassification",
        SWIN,
        pixels(),
        gains={"*continuous_position_bias_mlp*": 0.3},
        floors=floors(28, 24, 30, -3, 7),
    ),
    "hiera": Row(
        "HieraForImageClassification",
        {
            "image_size": [32, 32],
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "num_query_pool": 1,
        },
        pixels(),
    ),
    "convnext": Row(
        "ConvNextForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, pixels()
    ),
    "convnextv2": Row(
        "ConvNextV2ForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, pixels()
    ),
    "resnet": Row(
        "ResNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2], "layer_type": "bottleneck"},
        pixels(),
    ),
    "regnet": Row(
        "RegNetForImageClassification",
        {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 8},
        pixels(),
    ),
    "mobilenet_v1": Row("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": 64}, pixels(64)),
    "mobilenet_v2": Row("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35, "image_size": 64}, pixels(64)),
    "efficientnet": Row(
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.5, "depth_coefficient": 0.3, "image_size": 64, "hidden_dim": 640},
        pixels(64),
    ),
    "mobilevit": Row(
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 64],
            "num_attention_heads": 4,
        },
        pixels(64),
    ),
    "segformer": Row(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 32,
        },
        pixels(64),
    ),
    "poolformer": Row(
        "PoolFormerForImageClassification",
        {
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        },
        pixels(64),
    ),
    "levit": Row(
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        pixels(64),
        settles=False,
        floors=floors(20, 18, 22, 2, 2),
    ),
    "pvt_v2": Row(
        "PvtV2ForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
        },
        pixels(64),
    ),
    "focalnet": Row(
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "embed_dim": 32,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "hidden_sizes": [32, 64],
        },
        pixels(),
    ),
    "yolos": Row(
        "YolosForObjectDetection",
        {**VIT, "image_size": [32, 32], "num_detection_tokens": 5},
        pixels(),
        floors=floors(23, 23, 27, 8, 8),
    ),
    "dpt": Row(
        "DPTForDepthEstimation",
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
        },
        pixels(),
        seed=1,
        gains={"neck.*weight": 1.7, "head.*weight": 1.7},
    ),
    "maskformer": Row(
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": {**STAGES, "model_type": "resnet", "embedding_size": 16},
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": {
                "model_type": "detr",
                "d_model": 32,
                "decoder_layers": 1,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "num_queries": 8,
                "decoder_ffn_dim": 64,
                "encoder_ffn_dim": 64,
            },
        },
        pixels(64),
        floors=floors(28, 18, 31, 9, 9),
    ),
    "upernet": Row(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {**STAGES, "model_type": "convnext"},
            "hidden_size": 32,
            "auxiliary_in_channels": 32,
            "pool_scales": [1, 2],
        },
        pixels(64),
    ),
    "detr": Row(
        "DetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "num_queries": 5,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
        },
        pixels(64),
    ),
    "sam": Row(
        "SamVisionModel",
        {
            "hidden_size": 64,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
            "num_pos_feats": 16,
        },
        pixels(64),
    ),
}

WITH_TEXT = {
    "clip": Row(
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 32},
        picture_and_text(),
        floors=floors(20, 18, 22, 2.5, 1),
    ),
    "siglip": Row(
        "SiglipModel",
        {"text_config": {**SMALL, **TEXT}, "vision_config": VIT},
        picture_and_text(),
        floors=floors(21, 21, 26, 5, 3),
    ),
    "vilt": Row(
        "ViltModel", {**SMALL, **TEXT, "image_size": 32, "patch_size": 8, "max_image_length": -1}, picture_and_text()
    ),
    "git": Row("GitForCausalLM", {**SMALL, **TEXT, "vision_config": VIT}, picture_and_text()),
    "blip": Row(
        "BlipModel",
        {"text_config": {**SMALL, **TEXT, "encoder_hidden_size": 64}, "vision_config": VIT, "projection_dim": 32},
        picture_and_text(),
        floors=floors(25, 25, 29, 6, 5),
    ),
}
