"""What `torch.hub.load(REPOSITORY, NAME, pretrained=True)` finds: the members of the family, by their names in timm."""

import timm

import container  # registers them

dependencies = ["torch", "torchvision", "timm", "filelock", "huggingface_hub", "safetensors"]

globals().update({name: timm.models.model_entrypoint(name) for name in timm.list_models(module=container.__name__)})
