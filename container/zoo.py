"""Functions behind the `container` command: the table of the family, and weights files with their records."""

import hashlib
import importlib.util
import json
import logging
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models import get_pretrained_cfg, model_entrypoint, save_for_hf, split_model_name_tag
from timm.models._hub import generate_readme
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from . import weights
from .container import default_cfgs
from .files import read_text, write_atomically

__all__ = ["accuracy", "card", "columns", "convert", "export", "fetch", "table", "verify"]


_SHARED_BYTES, _SHARED_SECONDS = 500 * 10**6, 1800  # of a download from Google Drive
_logger = logging.getLogger(__name__)


def table(markdown: bool = False) -> str:
    """Returns a table of the family and its weights, one line per model, from the models and the manifest.

    Args:
        markdown: Whether to return the Markdown table of docs/models.md instead of one for a terminal.
    """
    rows: list[tuple[str, ...]] = [("model", "params", "GMACs", "image", "weights", "what it is")]
    for architecture, cfgs in default_cfgs.items():
        tag, size = cfgs.tags[0], cfgs.default.input_size
        params, gmacs = _cost(architecture, size, cfgs.default.num_classes)
        records = [record for record in weights.manifest().values() if record["architecture"] == architecture]
        records.sort(key=lambda record: record["tag"] != tag)  # the default first
        rows.append(
            (
                f"`{architecture}`" if markdown else architecture,
                f"{params:.2f} M",
                f"{gmacs:.2f}",
                f"{size[-1]} px",
                (", ".join(map(_link, records)) if markdown else "; also ".join(map(_summary, records))) or "none yet",
                _first_sentence(architecture),
            )
        )
    if markdown:
        rows.insert(1, ("---",) * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return columns([row[:-1] for row in rows])


def _cost(architecture: str, size: Sequence[int], num_classes: int) -> tuple[float, float]:
    """Returns millions of parameters, and billions of multiply-adds for one image of the given channels and sides."""
    model = timm.create_model(architecture, num_classes=num_classes, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size, device="meta"))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def columns(rows: list[tuple[str, ...]]) -> str:
    """Formats rows as aligned columns."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _first_sentence(architecture: str) -> str:
    doc = " ".join((model_entrypoint(architecture).__doc__ or "").split("\n\n")[0].split())
    return doc.rstrip(".")


def _link(record: dict[str, Any]) -> str:
    """Returns the tag in Markdown, with a link to the card of a file that there is."""
    tag = f"`{record['tag']}`"
    card = f"cards/{record['architecture']}.{record['tag']}.md"
    return f"[{tag}]({card})" if record["status"] == "available" else tag


def _summary(record: dict[str, Any]) -> str:
    top1, *_ = [f": {r['value']} % ({_data(r)})" for r in record["results"] if r["metric"] == "top1"] or [""]
    return f"{record['tag']}{top1}{'' if record['status'] == 'available' else ', ' + record['status']}"


def _data(result: dict[str, Any]) -> str:
    """Returns what a result was measured on, and by whom if not by us."""
    by = result["measured_by"]
    return result["data"] if by == "the authors of this package" else f"{result['data']}; {by}"


def accuracy(name: str) -> str:
    """Returns one line that says how often the weights are right, or '' if their record does not.

    Args:
        name: `architecture.tag`; there need not be such a record.
    """
    results = weights.record(name)["results"] if name in weights.names() else []
    top1: dict[str, Any] = next((r for r in results if r["metric"] == "top1"), {})
    if not top1:
        return ""
    line = f"{name} is right for {top1['value']} % of {_data(top1)}"
    top5: list[float] = [r["value"] for r in results if r["metric"] == "top5" and r["data"] == top1["data"]]
    return f"{line}, and names the right class among five for {top5[0]} %" if top5 else line


def verify(name: str) -> tuple[Path, str]:
    """Checks a weights file against its record: size, hash, layout, finite values.

    Args:
        name: `architecture.tag`.

    Returns:
        The file and its sha256.

    Raises:
        UnknownWeightsError: There is no such record.
        FileNotFoundError: The file is not on this machine.
        RuntimeError: The file differs from its record.
        ValueError: The weights do not fit the model.
    """
    path = weights.find(name)
    if path is None:
        raise FileNotFoundError(f"no file of {name} in {weights.weights_dir()}")
    digest = weights.check(name, path)
    weights.fit(weights.read(path), name)
    return path, digest


def convert(
    path: str | Path,
    name: str,
    out: str | Path | None = None,
    use_ema: bool | None = None,
    trained_by: str | None = None,
    license: str | None = None,
    data: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Converts a checkpoint, released or ours, to safetensors in our layout, and writes its record next to it.

    The record is filled from the file, the arguments, and a `summary.json` of `train_imagenet.py` next to the
    checkpoint. All other fields are null. The record pins the sha256: from then on, no other file is loaded from or
    saved to `weights_dir()` under that name.

    Args:
        path: The checkpoint.
        name: `architecture.tag` for the weights.
        out: Output file. None means `NAME.safetensors` in `weights_dir()`, where `timm.create_model` finds it.
        use_ema: As in `weights.read`.
        trained_by: Who trained the weights.
        license: Their licence.
        data: What they were trained on.

    Returns:
        The file, and its record.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        OSError: `out` cannot be written.
        RuntimeError: The checkpoint cannot be read.
        ValueError: The checkpoint does not fit the model, or the name is invalid or taken by other weights.
    """
    architecture, tag = split_model_name_tag(name)
    if not re.fullmatch("[a-z0-9_]+", tag):
        raise ValueError(f"{name} is not ARCHITECTURE.TAG with a tag of a-z, 0-9 and _")
    state_dict = weights.fit(weights.read(path, use_ema), name)
    content = save({key: t.contiguous() for key, t in state_dict.items()}, metadata={"format": "pt"})
    digest = hashlib.sha256(content).hexdigest()
    known = weights.record(name) if name in weights.names() else None
    if known and known["file"]["sha256"] not in (None, digest):
        pin = known["file"]["sha256"]
        raise ValueError(f"{name} is pinned to sha256 {pin}, and {path} becomes {digest}: choose another tag")
    record = dict(weights.manifest().get(name) or _blank(architecture, tag, len(state_dict.get("head.fc.weight", ()))))
    record["file"] = dict(
        packaged=False, url=None, hf_hub_id=None, bytes=len(content), sha256=digest, format="safetensors"
    )
    names = weights.class_names(path)
    if names and len(names) == record["num_classes"]:
        record["label_names"] = names
    if (summary := Path(path).with_name("summary.json")).is_file():
        try:
            record.update(_from_run(json.loads(read_text(summary)), Path(path).name))
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError):
            _logger.warning("%s is not used: it is no summary of train_imagenet.py", summary)
    if trained_by:
        record["trained_by"] = trained_by
    if license:
        record["license"] = dict(record["license"], weights=license)
    if data:
        record["training"] = dict(record["training"] or dict.fromkeys(_TRAINING), data=data)
    out = Path(out or weights.weights_dir() / f"{name}.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, content)
    text = json.dumps(dict(weights={name: record}), indent=2, ensure_ascii=False) + "\n"
    write_atomically(out.with_suffix(".json"), text.encode())
    return out, record


_TRAINING = ("data", "epochs", "command", "hardware", "time")


def _blank(architecture: str, tag: str, num_classes: int) -> dict[str, Any]:
    """Returns a record with nothing filled in but the model, its number of classes and its preprocessing."""
    cfg = get_pretrained_cfg(architecture)
    of_input = ("input_size", "pool_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct")
    return dict(
        architecture=architecture,
        tag=tag,
        status="imported",
        **dict.fromkeys(("trained_by", "date", "origin_url", "label_names", "training", "limits")),
        num_classes=num_classes,
        license=dict.fromkeys(("code", "weights", "stated")),
        input={key: getattr(cfg, key) for key in of_input},
        results=[],
    )


def fetch(name: str) -> Path:
    """Downloads a file that was published without a hash to `weights_dir()`, then converts, checks and pins it.

    A file that was published with a hash, or that is pinned and present, is only obtained and verified.

    Args:
        name: `architecture.tag`.

    Returns:
        The file.

    Raises:
        ImportError: gdown is not installed.
        UnknownWeightsError: There is no such record.
        OSError: The download failed, or the file cannot be written.
        RuntimeError: The download is not a checkpoint.
        ValueError: The download does not fit the model, or a different file was pinned before.
    """
    file = weights.manifest().get(name, weights.record(name))["file"]
    if file["sha256"] or (weights.record(name)["file"]["sha256"] and weights.find(name)):
        return weights.obtain(name)
    if importlib.util.find_spec("gdown") is None:
        raise ImportError("this needs gdown: pip install gdown")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{name}.{file['format']}")
        _download_shared(file["url"], path)
        return convert(path, name)[0]


def _download_shared(url: str, path: Path) -> None:
    """Downloads a file that is shared on Google Drive, by gdown in a process of its own, which can be ended.

    Raises:
        OSError: The download failed, is larger than 500 MB, or took over half an hour.
    """
    command = [sys.executable, "-m", "gdown", "--quiet", "--no-cookies", "--timeout", "60", "-O", str(path), url]
    late = time.monotonic() + _SHARED_SECONDS
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process,
        tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while process.poll() is None:
            with suppress(FileNotFoundError):  # gdown renames its file at the end
                bar.update(sum(part.stat().st_size for part in path.parent.iterdir()) - bar.n)
            if bar.n > _SHARED_BYTES or time.monotonic() > late:
                process.kill()
                raise OSError(f"cannot download {url}: {bar.n:,} bytes came, and it is not at its end")
            time.sleep(0.1)
        _, error = process.communicate()
    if process.returncode or not path.is_file():
        raise OSError(f"cannot download {url}: {' '.join(error.split())[-500:]}")
    if path.stat().st_size > _SHARED_BYTES:
        raise OSError(f"cannot download {url}: {path.stat().st_size:,} bytes are more than {_SHARED_BYTES:,}")


def _from_run(summary: dict[str, Any], file: str) -> dict[str, Any]:
    """Returns the fields of a weights file's record that are known from the `summary.json` of its training run.

    The top-1 accuracy is included for the best weights only.
    """
    hardware = summary["hardware"]
    for text in (summary["command"], hardware.get("gpu") or hardware["cpu"]):
        if not isinstance(text, str) or len(text) > 10_000:
            raise TypeError(text)
    for number in (
        summary["epochs"],
        summary["seconds"],
        summary["best"]["top1"],
        hardware["processes"],
        hardware["threads"],
    ):
        if not isinstance(number, int | float):
            raise TypeError(number)
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


def export(name: str, folder: str | Path) -> None:
    """Exports weights to a folder for `timm.create_model("local-dir:FOLDER")` and the Hugging Face Hub.

    The folder includes a model card.

    Args:
        name: `architecture.tag`.
        folder: Output folder, new or empty.

    Raises:
        FileExistsError: The folder exists and is not empty.
        UnknownWeightsError: There is no such record.
        RuntimeError: The weights cannot be loaded.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    record = weights.record(name)
    model = timm.create_model(name, pretrained=True)
    labels = dict(label_names=record["label_names"]) if record["label_names"] else {}
    save_for_hf(model, str(folder), model_config=labels, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes")  # also at the top level; transformers' TimmWrapper would pass it twice
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card(name, f"hf-hub:OWNER/{name}"), encoding="utf-8")


def card(name: str, source: str | None = None) -> str:
    """Returns a model card in Markdown, generated from the record. What the record does not say is left out.

    Args:
        name: `architecture.tag`.
        source: Where timm finds the weights, such as `hf-hub:OWNER/NAME`; the name itself if None.

    Raises:
        UnknownWeightsError: There is no such record.
    """
    record = weights.record(name)
    training, licence, size = record["training"] or {}, record["license"], record["input"]["input_size"]
    params, gmacs = _cost(record["architecture"], size, record["num_classes"])
    epochs = training.get("epochs") and f"{training['epochs']} epochs"
    details = {
        "Parameters": f"{params:.2f} M",
        "GMACs": f"{gmacs:.2f}",
        "Image size": " x ".join(map(str, size[1:])),
        "File": record["file"]["bytes"] and f"{record['file']['bytes'] / 1e6:.1f} MB",
        "Trained by": record["trained_by"],
        "Data": training.get("data"),
        "Training": ", ".join(filter(None, (epochs, training.get("hardware"), training.get("time")))),
        "Command": training.get("command") and f"`{training['command']}`",
        "Licence": licence["stated"] or licence["weights"],
        "Results": [
            f"{r['value']} % {r['metric']} on {r['data']}, measured by {r['measured_by']}"
            + (f": `{r['command']}`" if r["command"] else "")
            for r in record["results"]
        ],
        "Paper": "https://arxiv.org/abs/2106.01401",
    }
    fields = dict(
        license=licence["weights"] or "unknown",
        library_name="timm",
        description=f"{_first_sentence(record['architecture'])}. {record['limits'] or ''}".rstrip(),
        details={key: value for key, value in details.items() if value},
        usage=textwrap.dedent(
            f"""
            ```python
            import container, timm  # of the package container-timm

            model = timm.create_model("{source or name}", pretrained=True).eval()
            ```"""
        ),
    )
    return generate_readme(fields, name)
