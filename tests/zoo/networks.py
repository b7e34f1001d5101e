"""Networks of timm and torchvision as cases; `make zoo` installs what they need into an environment of its own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn

from tests.zoo.architectures import lively, settled, wave
from tests.zoo.checks import RECIPES, Case

#: By the size of the pictures.
TIMM = {
    64: """
        resnet18 resnet26d resnext26ts legacy_seresnet18 seresnext26d_32x4d resnetv2_18 resnest14d skresnet18
        res2net50_14w_8s densenet121 dla46_c hrnet_w18_small ese_vovnet19b_dw cs3darknet_s dpn48b selecsls42b gernet_s
        mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobilenet_edgetpu_100 mnasnet_small
        efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 mixnet_s fbnetc_100 spnasnet_100 hardcorenas_a tinynet_e
        lcnet_050 ghostnet_050 ghostnetv2_100 regnetx_002 regnety_002 regnetz_005 rexnet_100 starnet_s1 hgnetv2_b0
        repvgg_a0 repghostnet_050 mobileone_s0 repvit_m0_9 fastvit_t8
        convnext_atto convnextv2_atto inception_next_atto mambaout_femto fasternet_t0
        edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientvit_b0 poolformerv2_s12 swiftformer_xs
    """,
    224: """
        vit_tiny_patch16_224 deit3_small_patch16_224 swin_tiny_patch4_window7_224 levit_128s efficientformer_l1
        pit_ti_224 mixer_s32_224 gmlp_ti16_224 xcit_nano_12_p16_224 tiny_vit_5m_224 crossvit_tiny_240
    """,
}
TORCHVISION = {
    64: """
        alexnet vgg11_bn resnet18 resnext50_32x4d squeezenet1_1 densenet121 googlenet shufflenet_v2_x0_5 mobilenet_v2
        mobilenet_v3_small mnasnet0_5 efficientnet_b0 regnet_x_400mf regnet_y_400mf convnext_tiny swin_t swin_v2_t
        fcn_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large
        ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn retinanet_resnet50_fpn fcos_resnet50_fpn
        maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn r3d_18
    """,
    96: "inception_v3",
    224: "vit_b_32",
}
NETWORKS = {f"timm-{name}": size for size, names in TIMM.items() for name in names.split()}
NETWORKS |= {f"torchvision-{name}": size for size, names in TORCHVISION.items() for name in names.split()}
SIZES = {"alexnet": 96, "inception_v3": 96, "crossvit_tiny_240": 240}
#: Networks of torchvision that are given another one's weights unless told not to be.
WITH_BACKBONE = ("fcn", "deeplab", "lraspp", "ssd", "fasterrcnn", "retinanet", "fcos", "maskrcnn", "keypointrcnn")
#: Detectors of torchvision, whose code goes through as many boxes as it finds: they are not compiled.
DETECTORS = ("ssd", "fasterrcnn", "retinanet", "fcos", "maskrcnn", "keypointrcnn")
#: Those of them that scale every picture up to 320 or 800 pixels unless told not to.
SCALING = ("fasterrcnn", "retinanet", "fcos", "maskrcnn", "keypointrcnn")
#: Those whose second stage looks at up to a thousand boxes in every picture unless told to look at fewer.
TWO_STAGES = ("fasterrcnn", "maskrcnn", "keypointrcnn")
#: Networks of linear layers for the most part.
LINEAR = ("vit", "deit", "swin", "mixer", "gmlp", "xcit", "pit", "crossvit", "tiny_vit", "levit")


def ways(name: str) -> tuple[str, ...]:
    """The recipes that a network is converted by."""
    return ("fuse", "int8-calibrated", *(["int8"] if name.partition("-")[2].startswith(LINEAR) else []))


def pictures(name: str, batch: int, phase: float = 0.0) -> torch.Tensor:
    """Smooth pictures: like photographs, each pixel is like its neighbours."""
    size = SIZES.get(name.partition("-")[2], NETWORKS[name])
    shape = (batch, 3, 4, size, size) if name.endswith("r3d_18") else (batch, 3, size, size)
    coarse = wave(*shape[:-2], size // 4, size // 4).add(phase).mul(3.7).sin()
    fine = nn.functional.interpolate(coarse.flatten(0, -4), size=(size, size), mode="bilinear", align_corners=False)
    found = 1.5 * fine.reshape(shape) + 0.1 * wave(*shape)
    return (
        found / 4 + 0.5 if name.partition("-")[2].startswith(DETECTORS) else found
    )  # which shift and scale themselves


def is_detector(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torchvision.models.detection")


def build(name: str) -> nn.Module:
    """A network as its library makes it, in eval mode."""
    library, _, kind = name.partition("-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if library == "timm":
            import timm

            return timm.create_model(kind, pretrained=False, num_classes=10).eval()
        import torchvision

        backbone = {"weights_backbone": None} if kind.startswith(WITH_BACKBONE) else {}
        smaller = {"min_size": 128, "max_size": 192} if kind.startswith(SCALING) else {}
        fewer = {"rpn_post_nms_top_n_test": 40, "box_detections_per_img": 10} if kind.startswith(TWO_STAGES) else {}
        return torchvision.models.get_model(kind, weights=None, **backbone, **smaller, **fewer).eval()


@functools.lru_cache(maxsize=1)
def _trained(name: str) -> nn.Module:
    model = lively(build(name))
    with torch.random.fork_rng(devices=[]):
        return settled(model, [lambda turn=turn: _call(model, pictures(name, 8, turn)) for turn in range(3)])


def _call(model: nn.Module, x: torch.Tensor) -> Any:
    """The answer of a network; of a detector what backbone and head say of each place, and what its answer holds.
    Its boxes prove nothing: of thousands with nearly the same score it keeps a hundred, and Mask R-CNN in
    float64 keeps others than in float32 (6 to 12 dB).
    """
    if not is_detector(model):
        return model(x)
    detector: Any = model
    features = detector.backbone(detector.transform(list(x))[0].tensors)
    head = detector.rpn.head if hasattr(detector, "rpn") else detector.head
    kinds = [sorted(found) for found in detector(list(x))]
    return features, head(list(features.values())), kinds


def make(name: str) -> nn.Module:
    return copy.deepcopy(_trained(name))


def case(name: str, recipe: str, floor: float) -> Case:
    return Case(
        make=lambda: make(name),
        build=lambda: build(name),
        call=lambda model: _call(model, pictures(name, 2)),
        recipe=RECIPES[recipe],
        floor=floor,
        calibration=lambda: [pictures(name, 4, turn) for turn in range(3)],
        first=lambda model: _call(model, pictures(name, 2)[:1]),
        compile_with="aot_eager" if recipe == "fuse" and not name.partition("-")[2].startswith(DETECTORS) else None,
        deep=False,
        convolutional=True,
    )
