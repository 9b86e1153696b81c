"""What the `container` command does: lists the family, and handles files of weights by their records."""

import json
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import timm
import torch
from safetensors.torch import save
from timm.models import is_model, model_entrypoint, save_for_hf, split_model_name_tag
from timm.models._hub import generate_readme
from torch.utils.flop_counter import FlopCounterMode

from . import weights
from .container import checkpoint_filter_fn
from .files import sha256_of, write_atomically

__all__ = ["convert", "export", "fit", "table", "verify"]


def table(markdown: bool = False) -> str:
    """The family and its weights, a line for each member, from the models and from the manifest.

    Args:
        markdown: The README's table in place of one for a terminal.
    """
    rows: List[Tuple[str, ...]] = [("model", "params", "GMACs", "image", "weights", "what it is")]
    for record in weights.manifest().values():
        architecture, size = record["architecture"], record["input"]["input_size"][-1]
        model = timm.create_model(architecture, pretrained_cfg=record["tag"], device="meta").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *record["input"]["input_size"], device="meta"))
        rows.append(
            (
                f"`{architecture}`" if markdown else architecture,
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                f"{counter.get_total_flops() / 2e9:.2f}",
                f"{size} px",
                _summary(record, markdown),
                _first_sentence(architecture),
            )
        )
    if markdown:
        rows.insert(1, ("---",) * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return columns([row[:-1] for row in rows])


def columns(rows: List[Tuple[str, ...]]) -> str:
    """Rows with their cells below one another."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _first_sentence(architecture: str) -> str:
    doc = " ".join((model_entrypoint(architecture).__doc__ or "").split("\n\n")[0].split())
    return doc.rstrip(".")


def _summary(record: Dict[str, Any], markdown: bool = False) -> str:
    if record["file"] is None:
        return "none yet"
    tag = f"`{record['tag']}`" if markdown else record["tag"]
    top1 = next(
        (f": {r['value']} % ({r['data']}; {r['measured_by']})" for r in record["results"] if r["metric"] == "top1"), ""
    )
    return f"{tag}{top1}{'' if record['status'] == 'available' else '; ' + record['status']}"


def fit(state_dict: Dict[str, torch.Tensor], name: str) -> Dict[str, torch.Tensor]:
    """A checkpoint in the names and shapes of the model that a weights entry is for, with its own classifier.

    Args:
        state_dict: As `weights.read` gives it.
        name: `architecture.tag`; without a record of that name the architecture's own image size is meant.

    Raises:
        ValueError: There is no such model, or the checkpoint does not fit it exactly.
    """
    architecture, _ = split_model_name_tag(name)
    if not is_model(architecture) or architecture not in timm.list_models(module="container"):
        raise ValueError(f"no model {architecture}: choose from {', '.join(timm.list_models(module='container'))}")
    record = weights.manifest().get(name)
    head = state_dict.get("head.weight", state_dict.get("head.fc.weight", torch.empty(0)))
    options: Dict[str, Any] = dict(num_classes=record["num_classes"] if record else len(head))
    if record and record["input"]["fixed_input_size"]:
        options["img_size"] = record["input"]["input_size"][-1]
    model: Any = timm.create_model(architecture, device="meta", **options)
    model.pretrained_cfg["num_classes"] = options["num_classes"]
    fitted, own = checkpoint_filter_fn(dict(state_dict), model), model.state_dict()
    if problems := [key for key in own if key not in fitted or fitted[key].shape != own[key].shape]:
        found = tuple(fitted[problems[0]].shape) if problems[0] in fitted else "missing"
        raise ValueError(f"checkpoint does not fit {name}: {problems[0]} is {found}")
    for key in own:
        if key in state_dict and (found := tuple(state_dict[key].shape)) != fitted[key].shape:
            raise ValueError(f"checkpoint does not fit {name}: {key} {found} is for another image size")
    return fitted


def verify(name: str) -> Tuple[Path, str]:
    """Holds the file of a record that is here against all that the record says: size, hash, layout, finite numbers.

    Args:
        name: `architecture.tag`.

    Returns:
        The file and its sha256.

    Raises:
        KeyError: The manifest has no such record.
        FileNotFoundError: The file is not here.
        RuntimeError: It is not what the record says.
        ValueError: It does not fit the model.
    """
    path = weights.find(name)
    if path is None:
        raise FileNotFoundError(f"no file of {name} in {weights.weights_dir()}")
    digest = weights.check(name, path)
    fit(weights.read(path), name)
    return path, digest


def convert(
    path: Union[str, Path], name: str, out: Union[str, Path], use_ema: Optional[bool] = None
) -> Tuple[str, Dict[str, Any]]:
    """Writes the weights of a checkpoint, released or ours, as safetensors in our layout.

    Args:
        path: The checkpoint. A `summary.json` beside it, of `train_imagenet.py`, goes into the record.
        name: `architecture.tag` that they are to have.
        out: The file to write.
        use_ema: As in `weights.read`.

    Returns:
        The sha256 of what was written, and its record: the manifest's if it has one of that name, with the new file.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        OSError: `out` cannot be written.
        RuntimeError: It cannot be read.
        ValueError: It does not fit the model.
    """
    state_dict = fit(weights.read(path, use_ema), name)
    out = Path(out)
    write_atomically(out, save({key: t.contiguous() for key, t in state_dict.items()}, metadata={"format": "pt"}))
    architecture, tag = split_model_name_tag(name)
    like = next(r for r in weights.manifest().values() if r["architecture"] == architecture)
    new = dict(like, tag=tag, status="available", label_names=None, training=None, results=[], limits=None)
    record = dict(weights.manifest().get(name) or new)
    record["num_classes"] = len(state_dict["head.fc.weight"])
    record["file"] = dict(
        packaged=False,
        url=None,
        hf_hub_id=None,
        bytes=out.stat().st_size,
        sha256=sha256_of(out),
        format="safetensors",
        layout="container",
    )
    if (summary := Path(path).with_name("summary.json")).is_file():
        record.update(_from_run(json.loads(summary.read_text()), Path(path).name))
    return record["file"]["sha256"], record


def _from_run(summary: Dict[str, Any], file: str) -> Dict[str, Any]:
    """What a run's `summary.json` knows of the record of one of its files; an accuracy only of the best weights."""
    hardware = summary["hardware"]
    device = f"{hardware['processes']} x {hardware.get('gpu') or hardware['cpu']}, {hardware['threads']} threads"
    training = dict(
        data=None,
        epochs=summary["epochs"],
        command=f"python {summary['command']}",
        hardware=device,
        time=f"{summary['seconds'] / 3600:.1f} h",
    )
    best = dict(metric="top1", value=summary["best"]["top1"], data="the run's validation images", command=None)
    results = [dict(best, measured_by="train_imagenet.py")] if file == summary["best"]["file"] else []
    return dict(training=training, results=results)


def export(name: str, folder: Union[str, Path]) -> None:
    """Writes a folder that `timm.create_model("local-dir:FOLDER")` and the Hugging Face Hub load, with a model card.

    Args:
        name: `architecture.tag`.
        folder: A new one.

    Raises:
        FileExistsError: The folder is there and not empty.
        KeyError: The manifest has no such record.
        RuntimeError: The weights cannot be had.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    record = weights.manifest()[name]
    weights.obtain(name)
    model = timm.create_model(name, pretrained=True)
    labels = dict(label_names=record["label_names"]) if record["label_names"] else {}
    save_for_hf(model, str(folder), model_config=labels, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes")  # it stands at the top; here transformers' TimmWrapper would pass it twice
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    training, licence = record["training"] or {}, record["license"]
    card = dict(
        license=licence["weights"] or "unknown",
        library_name="timm",
        description=f"{_first_sentence(record['architecture'])}. {record['limits']}",
        details={
            "Trained by": record["trained_by"],
            "Data": training.get("data"),
            "Training": f"{training.get('epochs')} epochs, {training.get('hardware')}: `{training.get('command')}`",
            "Licence": licence["stated"],
            "Results": [
                f"{r['value']} % {r['metric']} on {r['data']}, measured by {r['measured_by']}"
                + (f": `{r['command']}`" if r["command"] else "")
                for r in record["results"]
            ],
            "Paper": "https://arxiv.org/abs/2106.01401",
        },
        usage=textwrap.dedent(
            f"""
            ```python
            import container, timm  # pip install container-timm

            model = timm.create_model("hf-hub:OWNER/{name}", pretrained=True).eval()
            ```"""
        ),
    )
    (folder / "README.md").write_text(generate_readme(card, name), encoding="utf-8")
