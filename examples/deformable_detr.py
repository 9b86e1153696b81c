"""Deformable DETR from transformers on a timm backbone, with the interface of torchvision's detectors."""

import copy
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import normalize, resize

import container  # noqa: F401  registers the family

try:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig
except ImportError as error:
    raise SystemExit(f'{error}: pip install -e ".[downstream]"') from None

LEVELS = [1, 2, 3]  # strides 8, 16 and 32


class DeformableDetr(nn.Module):
    """Detector that returns losses for images and targets in training, and boxes for images in evaluation.

    Boxes are refined layer by layer, and the first proposals come from the encoder ("two stages"). Both shorten
    training, which is long for DETRs. Every layer has a loss. The proposals have a loss as well, which transformers
    does not provide. transformers freezes the backbone's batch norms, so start from pre-trained weights.

    Source: Zhu et al., "Deformable DETR" (arXiv 2010.04159).

    Args:
        backbone: timm name of a model that supports `features_only`.
        num_classes: Number of object classes.
        size: Short side that images are resized to, in pixels.
        pretrained: Whether to start from the backbone's pre-trained weights.
        channels: Width of the transformer.
        queries: Maximum number of boxes per image.

    Raises:
        SystemExit: `channels` is not a multiple of 32, the number of groups in the norms.
    """

    def __init__(
        self, backbone: str, num_classes: int, size: int, pretrained: bool, channels: int, queries: int = 100
    ) -> None:
        super().__init__()
        if channels % 32:
            raise SystemExit(f"--channels {channels} is not a multiple of 32, the groups of Deformable DETR's norms")
        options = dict(features_only=True, out_indices=LEVELS)
        body = timm.create_model(backbone, pretrained=pretrained, **options)
        config = DeformableDetrConfig(
            backbone_config=TimmBackboneConfig(backbone=backbone, out_indices=LEVELS),
            num_labels=num_classes,
            num_queries=queries,
            num_feature_levels=len(LEVELS),
            d_model=channels,
            encoder_layers=3,
            decoder_layers=3,
            encoder_ffn_dim=4 * channels,
            decoder_ffn_dim=4 * channels,
            with_box_refine=True,
            two_stage=True,
            two_stage_num_proposals=queries,
            auxiliary_loss=True,
        )
        self.detr = DeformableDetrForObjectDetection(config)
        # transformers shares one classifier among all layers, but the proposals need their own: object or not.
        classifiers = nn.ModuleList(copy.deepcopy(layer) for layer in self.detr.class_embed)
        self.detr.class_embed = self.detr.model.decoder.class_embed = classifiers
        self.guesses = copy.deepcopy(config)
        self.guesses.update(dict(num_labels=1, auxiliary_loss=False))
        self.body.load_state_dict(body.state_dict())
        self.size, self.queries = size, queries
        self.data = resolve_model_data_config(body)

    @property
    def body(self) -> nn.Module:
        """The backbone."""
        return next(m for m in self.detr.modules() if isinstance(m, timm.models.FeatureListNet))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Computes the losses, or detects objects.

        Args:
            images: (3, H, W) each, with values in 0 to 1.
            targets: Boxes (left, top, right, bottom) in pixels of the image, and labels.

        Returns:
            With targets, two weighted losses: of all layers' boxes and of the proposals. Without targets, boxes, scores
            and labels of each image.
        """
        resized = [normalize(resize(i, [self.size]), self.data["mean"], self.data["std"]) for i in images]
        height, width = (max(i.shape[dim] for i in resized) for dim in (1, 2))
        pixels = resized[0].new_zeros(len(images), 3, height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.long, device=pixels.device)
        for image, into, seen in zip(resized, pixels, mask, strict=True):
            into[:, : image.shape[1], : image.shape[2]] = image
            seen[: image.shape[1], : image.shape[2]] = 1
        if targets is None:
            return self._boxes(self.detr(pixel_values=pixels, pixel_mask=mask), images)
        labels = [
            dict(
                class_labels=target["labels"],
                boxes=box_convert(target["boxes"], "xyxy", "cxcywh") / _scale(image),
            )
            for image, target in zip(images, targets, strict=True)
        ]
        outputs = self.detr(pixel_values=pixels, pixel_mask=mask, labels=labels)
        objects = [dict(label, class_labels=torch.zeros_like(label["class_labels"])) for label in labels]
        scores, boxes = outputs.enc_outputs_class[..., :1], outputs.enc_outputs_coord_logits.sigmoid()
        guesses, *_ = self.detr.loss_function(scores, objects, pixels.device, boxes, self.guesses)
        return dict(boxes=outputs.loss, guesses=guesses)

    def _boxes(self, outputs: Any, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for logits, boxes, image in zip(outputs.logits, outputs.pred_boxes, images, strict=True):
            scores, best = logits.float().sigmoid().flatten().topk(min(self.queries, logits.numel()))
            corners = box_convert(boxes[best // logits.shape[1]].float(), "cxcywh", "xyxy") * _scale(image)
            found.append(dict(boxes=corners, scores=scores, labels=best % logits.shape[1]))
        return found


def _scale(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return torch.tensor([width, height, width, height], device=image.device, dtype=torch.float32)
