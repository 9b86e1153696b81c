"""Entry points of `torch.hub.load(REPOSITORY, NAME, pretrained=True)`: the family, by timm name."""

import timm

import container  # registers the family with timm

dependencies = ["torch", "torchvision", "timm", "filelock", "huggingface_hub", "safetensors"]

globals().update({name: timm.models.model_entrypoint(name) for name in timm.list_models(module=container.__name__)})
