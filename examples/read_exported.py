#!/usr/bin/env python
"""Classifies a photo with an exported model, using NumPy, Pillow and ONNX Runtime or OpenVINO, but not PyTorch.

    container export container_light_nano model.onnx --format onnx
    python examples/read_exported.py model.onnx PHOTO

Preprocessing and class names are read from the file.
"""

import argparse
import json
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def load(path: str) -> tuple[dict[str, Any], Any]:
    """Loads an exported model, and returns its metadata and a function from an array of images to one of logits."""
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map["container"]
        return json.loads(told), lambda images: session.run(None, {"images": images})[0]
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    told = json.loads(model.get_rt_info(["container"]).value)
    compiled = core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": told["precision"]} if "precision" in told else {}
    )
    return told, lambda images: compiled(images)[0]


def open_photo(photo: str) -> Image.Image:
    """Opens a photo as the package does: upright, 16 bits scaled to 8, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(photo))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype("uint8"))
    elif image.mode in ("I", "F"):
        raise SystemExit(f"{photo}: the scale of grey values of mode {image.mode} is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def prepare(photo: str, told: dict[str, Any]) -> np.ndarray:
    """Preprocesses a photo as the model expects it, and returns its centre crop as (1, 3, height, width)."""
    _, height, width = told["input_size"]
    if height != width:
        raise SystemExit(f"the file wants {height} x {width} pixels, and this example prepares squares")
    image = open_photo(photo)
    short = int(height / told["crop_pct"])
    size = [short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size]
    image = image.resize(size, Image.Resampling[told["interpolation"].upper()])
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(told["mean"])) / np.float32(told["std"])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], dtype=np.float32)


def main() -> None:
    """Prints the five most likely classes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help=".onnx or .xml file from `container export`")
    parser.add_argument("photo", metavar="PHOTO", help="image file")
    args = parser.parse_args()
    told, run = load(args.file)
    if told["crop_mode"] != "center" or not told["classes"]:
        raise SystemExit(f"{args.file} has no classes, or wants another crop than the middle")
    logits = run(prepare(args.photo, told))[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    for i in np.argsort(-shares)[:5]:
        print(f"{100 * shares[i]:7.1f} %  {told['classes'][i]}")


if __name__ == "__main__":
    main()
