"""Configs of small runs over every data source, for runs on workers."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.small_models import save_bert, save_tokenizer, skewed

BATCH = 4
COUNT = 70
"""Samples of every source but the texts."""

FORMATS = ["npy", "safetensors", "jsonl", "csv", "parquet"]


def write_inputs(folder: Path) -> None:
    """Write the files of all data sources."""
    values = np.arange(COUNT * 3, dtype=np.float32).reshape(COUNT, 3) / 7
    np.save(folder / "x.npy", values)
    values[::9, 1] = np.nan
    lines = ["a,b,c", *(",".join(map(str, row)) for row in values.tolist())]
    (folder / "x.csv").write_text("\n".join(lines) + "\n")
    rows = (json.dumps({"name": f"row {i}", "x": row}) for i, row in enumerate(values.tolist()))
    (folder / "x.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "shards").mkdir()
    for number, part in zip((2, 9, 10), np.split(values, [31, 33]), strict=True):
        lines = ["a,b,c", *(",".join(map(str, row)) for row in part.tolist())]
        (folder / "shards" / f"{number}.csv.gz").write_bytes(
            gzip.compress("\n".join(lines).encode())
        )
    (folder / "images").mkdir()
    for number in range(COUNT):
        pixels = np.full((4, 5, 4 if number % 5 == 0 else 3), number, np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03}.png")
    for number, last in [(9, 23), (10, COUNT)]:
        with tarfile.open(folder / f"part-{number}.tar", "w") as archive:
            for image in range(23 if last == COUNT else 0, last):
                archive.add(folder / "images" / f"{image:03}.png", f"{image}.png")
    save_tokenizer(folder / "bert")
    save_bert(folder / "bert")
    (folder / "t.txt").write_text("\n".join(skewed(150)) + "\n")


LAYERS = {"source": "layers", "layers": [{"Linear": [3, 2]}, "Tanh"]}
DATA: dict[str, dict[str, Any]] = {
    "arrays": {"source": "arrays", "path": "x.npy"},
    "csv": {"source": "records", "path": "x.csv", "inputs": {"x": {"columns": ["a", "b", "c"]}}},
    "jsonl": {
        "source": "records", "path": "x.jsonl", "inputs": {"x": {"columns": ["x"]}}, "id": "name",
    },
    "shards": {
        "source": "records", "path": "shards", "inputs": {"x": {"columns": ["a", "b", "c"]}},
    },
    "tar": {"source": "images", "path": "part-*.tar"},
    "synthetic": {"source": "synthetic", "inputs": {"x": {"shape": [3]}}, "samples": COUNT},
    "images": {"source": "images", "path": "images"},
    "texts": {"source": "text", "path": "t.txt", "group_by_length": True},
    "token batches": {"source": "text", "path": "t.txt", "batch_tokens": 40},
}  # fmt: skip


def config_for(source: str, inputs: Path, folder: Path, form: str = "npy") -> dict[str, Any]:
    data = dict(DATA[source])
    if "path" in data:
        data["path"] = str(inputs / data["path"])
    model: dict[str, Any] = LAYERS
    output: dict[str, Any] = {"path": str(folder), "format": form}
    if source in {"images", "tar"}:
        model = {"source": "layers", "layers": ["Flatten", {"Linear": [60, 2]}]}
    if data["source"] == "text":
        model = {"source": "huggingface", "path": str(inputs / "bert")}
        output |= {"select": "last_hidden_state", "transform": "mean_pool"}
    return {
        "model": model,
        "data": data | {"batch_size": BATCH},
        "run": {"threads": 1},
        "output": output,
        "measure": {"memory": False},
    }
