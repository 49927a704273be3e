"""One peer of peers_bench.py: a function that prepares it, and a line in the table PEERS.

As a script, run one peer in this process: prepare, run once, print "ready", then run and print the
seconds for every line of stdin. `peers.py WORK PEER FOLDER THREADS` writes `predictions.npy` into
FOLDER/PEER. Every peer has the weights of gradrun's model, and reads the same files.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import loop_by_hand
import numpy as np
import torch
from peer_work import MEAN, STD, WORKS, Kind, Work
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import gradrun
from gradrun.config.load import load_config
from gradrun.models import load_model

Run = Callable[[], float]
"""Predicts all samples, writes the predictions, and returns the seconds."""

Forward = Callable[..., Any]
"""The network: inputs to outputs, as tensors."""


class Side(NamedTuple):
    """What a peer gets."""

    work: Work
    folder: Path
    """The data and the models."""
    target: Path
    """The predictions that the peer writes."""
    threads: int


class Peer(NamedTuple):
    """A tool that does a work."""

    name: str
    prepare: Callable[[Side], Run]
    kinds: Sequence[Kind]
    modules: Sequence[str] = ()
    """Modules that must be installed."""
    install: str = ""
    """Arguments of `pip install`."""


# --- gradrun -------------------------------------------------------------------------------------


def gradrun_pass(side: Side) -> Run:
    """Time the pass over all samples, from the first read to the last sync to disk."""
    config = side.work.config(side.folder, side.target.parent)
    return lambda: gradrun.infer(config, overwrite=True).measurements[0].seconds


def gradrun_call(side: Side) -> Run:
    """Time the whole call: loading the model, opening the data, warm-up, and memory too."""
    config = side.work.config(side.folder, side.target.parent)
    return _timed(lambda: gradrun.infer(config, overwrite=True))


# --- arrays and images ---------------------------------------------------------------------------


def arrays_by_hand(side: Side) -> Run:
    """Run the loop over memory-mapped files."""
    source, model = side.folder / "x.npy", network(side)
    return _timed(partial(loop_by_hand.run, model, source, side.target, side.work.batch))


class Rows(Dataset[torch.Tensor]):
    """Rows of a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        self.rows = np.load(path, mmap_mode="c")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[index])


class Pictures(Dataset[torch.Tensor]):
    """JPEGs with the usual preparation for ImageNet."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())
        self.mean = np.array(MEAN, np.float32).reshape(3, 1, 1)
        self.std = np.array(STD, np.float32).reshape(3, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as opened:
            image = opened.convert("RGB")
        scale = 256 / min(image.size)
        size = (int(image.width * scale), int(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
        pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)) * np.float32(1 / 255)
        return torch.from_numpy((pixels - self.mean) / self.std)


def data_loader(side: Side, *, workers: int, forward: Forward | None = None) -> Run:
    """Loop over a DataLoader, and collect the outputs."""
    data, model = dataset(side), forward or network(side)

    def run() -> None:
        with torch.inference_mode():
            loader = DataLoader(data, side.work.batch, num_workers=workers)
            outputs = [model(batch) for batch in loader]
            np.save(side.target, torch.cat(outputs).numpy())

    return _timed(run)


def lightning(side: Side) -> Run:
    """Run Trainer.predict over a DataLoader."""
    lit, data, model = import_module("pytorch_lightning"), dataset(side), network(side)

    class Module(lit.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            return self.model(batch)

    module = Module()

    def run() -> None:
        quiet = dict.fromkeys(
            ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
        )
        trainer = lit.Trainer(accelerator="cpu", devices=1, **quiet)
        outputs = trainer.predict(module, DataLoader(data, side.work.batch))
        np.save(side.target, torch.cat(outputs).numpy())

    return _timed(run)


def dataset(side: Side) -> Dataset[torch.Tensor]:
    """Return the samples one by one."""
    if side.work.kind == "images":
        return Pictures(side.folder / "pictures")
    return Rows(side.folder / "x.npy")


def network(side: Side) -> Any:
    """Return gradrun's model."""
    config = load_config(side.work.config(side.folder, side.target.parent)).config
    return load_model(config.model, torch.device("cpu"), data=config.data).module


def other_runtime(side: Side, convert: Callable[[Side, Any, Sequence[Any]], Forward]) -> Run:
    """Run the loop by hand with the network in another runtime."""
    with torch.inference_mode():
        if side.work.kind in {"embeddings", "classes"}:
            return texts_by_hand(side, partial(convert, side))
        data = dataset(side)
        example = torch.stack([data[number] for number in range(side.work.batch)])
        forward = convert(side, network(side), [example])
    if side.work.kind == "images":
        return data_loader(side, workers=0, forward=forward)
    return _timed(
        partial(loop_by_hand.run, forward, side.folder / "x.npy", side.target, side.work.batch)
    )


def onnxruntime(side: Side, model: Any, example: Sequence[torch.Tensor]) -> Forward:
    """Export the network to ONNX; texts have free batch sizes and lengths."""
    runtime = import_module("onnxruntime")
    path = side.target.with_suffix(".onnx")
    names = [f"input{number}" for number in range(len(example))]
    free = [{0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in names]
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operator, which has no export
    torch.onnx.export(
        model, tuple(example), path, input_names=names, dynamo=True, verbose=False,
        dynamic_shapes=tuple(free) if len(example) > 1 else None,
    )  # fmt: skip
    options = runtime.SessionOptions()
    options.intra_op_num_threads = side.threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return forward


def openvino(side: Side, model: Any, example: Sequence[torch.Tensor]) -> Forward:
    """Convert the network for OpenVINO, in float32; texts have free batch sizes and lengths."""
    ov = import_module("openvino")
    torch.backends.mha.set_fastpath_enabled(False)
    free = [-1, -1] if len(example) > 1 else None
    shapes = [free or list(tensor.shape) for tensor in example]
    given = tuple(example) if len(example) > 1 else example[0]
    converted = ov.convert_model(model, example_input=given, input=shapes)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": side.threads}
    compiled = ov.Core().compile_model(converted, "CPU", settings)

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        # A copy, because the next inference writes to the same memory.
        return torch.from_numpy(compiled([tensor.numpy() for tensor in inputs])[0].copy())

    return forward


# --- texts ---------------------------------------------------------------------------------------

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class _Output(torch.nn.Module):
    """A model of transformers with its inputs by position and one tensor as output."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(**dict(zip(_INPUTS, inputs, strict=True)))[0]
        return output


def read_texts(side: Side) -> list[str]:
    """Return the sentences."""
    return (side.folder / "sentences.txt").read_text(encoding="utf-8").splitlines()


def texts_by_hand(
    side: Side, convert: Callable[[Any, Sequence[Any]], Forward] | None = None
) -> Run:
    """Tokenize all texts, run them sorted by length, and restore the order."""
    tokenizer, model = _of_transformers(side)
    wrapped = _Output(model)
    if convert:
        example = tokenizer(["a text", "another one"], padding=True, return_tensors="pt")
        wrapped = convert(wrapped, [example[name] for name in _INPUTS])
    finish = _pooled if side.work.kind == "embeddings" else _softmax

    def run() -> None:
        tokens = tokenizer(read_texts(side), truncation=True, max_length=256)["input_ids"]
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        rows: list[Any] = [None] * len(tokens)
        with torch.inference_mode():
            for start in range(0, len(order), side.work.batch):
                chosen = order[start : start + side.work.batch]
                lengths = [len(tokens[i]) for i in chosen]
                ids, mask = np.zeros((2, len(chosen), max(lengths)), np.int64)
                for row, i in enumerate(chosen):
                    ids[row, : lengths[row]] = tokens[i]
                    mask[row, : lengths[row]] = 1
                inputs = torch.from_numpy(ids), torch.from_numpy(mask)
                output = finish(wrapped(*inputs, torch.zeros_like(inputs[0])), inputs[1])
                for row, i in zip(output.numpy(), chosen, strict=True):
                    rows[i] = row
        np.save(side.target, np.stack(rows))

    return _timed(run)


def _of_transformers(side: Side) -> tuple[Any, Any]:
    transformers = import_module("transformers")
    path = side.folder / side.work.model["path"]
    kind = getattr(transformers, side.work.model.get("auto_class", "AutoModel"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return tokenizer, kind.from_pretrained(path).eval()


def _pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    counted = mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * counted).sum(1) / counted.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, dim=1)


def _softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


def encode(side: Side) -> Run:
    """Run SentenceTransformer.encode with the same batch size; it sorts by length too."""
    library = import_module("sentence_transformers")
    model = library.SentenceTransformer(str(side.folder / "minilm"), device="cpu")

    def run() -> None:
        embeddings = model.encode(
            read_texts(side), batch_size=side.work.batch, show_progress_bar=False
        )
        np.save(side.target, embeddings)

    return _timed(run)


def pipeline(side: Side) -> Run:
    """Run a text-classification pipeline with the same batch size."""
    tokenizer, model = _of_transformers(side)
    make = import_module("transformers").pipeline
    classify = make("text-classification", model=model, tokenizer=tokenizer, device="cpu")

    def run() -> None:
        found = classify(read_texts(side), batch_size=side.work.batch, top_k=None, truncation=True)
        scores = [[entry["score"] for entry in sorted(row, key=_label)] for row in found]
        np.save(side.target, np.array(scores, np.float32))

    return _timed(run)


def _label(entry: dict[str, Any]) -> str:
    return str(entry["label"])


# --- the table -----------------------------------------------------------------------------------


def _timed(function: Callable[[], Any]) -> Run:
    def run() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return run


_TENSORS: tuple[Kind, ...] = ("arrays", "images")
_TEXTS: tuple[Kind, ...] = ("embeddings", "classes")
_ONNX = ("onnxruntime", "onnx", "onnxscript")

PEERS = (
    Peer("gradrun", gradrun_pass, _TENSORS + _TEXTS),
    Peer("gradrun again", gradrun_pass, _TENSORS + _TEXTS),
    Peer("gradrun, whole call", gradrun_call, _TENSORS + _TEXTS),
    Peer("loop over memory maps", arrays_by_hand, ("arrays",)),
    Peer("loop, sorted by length", texts_by_hand, _TEXTS),
    Peer("DataLoader, 0 workers", partial(data_loader, workers=0), _TENSORS),
    Peer("DataLoader, 1 worker", partial(data_loader, workers=1), _TENSORS),
    Peer("DataLoader, 2 workers", partial(data_loader, workers=2), _TENSORS),
    Peer("Lightning predict", lightning, _TENSORS, ("pytorch_lightning",), "pytorch-lightning"),
    Peer(
        "SentenceTransformer.encode", encode, ("embeddings",),
        ("sentence_transformers",), "sentence-transformers",
    ),
    Peer("transformers pipeline", pipeline, ("classes",), ("transformers",), "transformers"),
    Peer(
        "onnxruntime", partial(other_runtime, convert=onnxruntime), _TENSORS + _TEXTS,
        _ONNX, " ".join(_ONNX),
    ),
    Peer(
        "OpenVINO", partial(other_runtime, convert=openvino), _TENSORS + _TEXTS,
        ("openvino",), "openvino",
    ),
)  # fmt: skip
"""The first is the one that the others are compared with."""


def main() -> None:
    work, name, folder, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    torch.set_num_threads(int(threads))
    peer = next(peer for peer in PEERS if peer.name == name)
    target = Path(folder) / "runs" / name / "predictions.npy"
    target.parent.mkdir(parents=True)
    run = peer.prepare(Side(WORKS[work], Path(folder), target, int(threads)))
    for seconds in _answers(run):
        print(seconds, file=replies, flush=True)


def _answers(run: Run) -> Iterator[float]:
    yield run()  # a warm-up
    for _ in sys.stdin:
        yield run()


if __name__ == "__main__":
    main()
