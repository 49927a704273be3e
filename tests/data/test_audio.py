"""The source `audio`: decoding, mixing, resampling, padding and feature extractors."""

from __future__ import annotations

import json
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import gradrun
from gradrun.config.load import load_config
from gradrun.core.errors import ConfigError, RunFailed, SampleError
from gradrun.core.optional import import_transformers
from tests.support.engines import InlineEngines
from tests.support.sources import data, data_error, joined, read_all

RATE = 16_000


def noise(seed: int, samples: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (samples, channels))


def write_clips(folder: Path, lengths: list[int]) -> list[np.ndarray]:
    """Write 16-bit clips a file of which is the rounded noise; return their samples."""
    folder.mkdir(exist_ok=True)
    clips = []
    for number, length in enumerate(lengths):
        whole = (noise(number, length)[:, 0] * 32768).astype(np.int16)
        with wave.open(str(folder / f"{number:03}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(whole.tobytes())
        clips.append(whole.astype(np.float32) / 32768)
    return clips


def statements(source: Any) -> dict[str, str]:
    return {statement.topic: statement.text for statement in source.statements()}


def test_a_pattern_names_clips_in_natural_order(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", [8, 8, 8])
    (tmp_path / "clips" / "002.wav").rename(tmp_path / "clips" / "1.wav")
    source = data("audio", path=tmp_path / "clips" / "*.wav", batch_size=3)
    (batch,) = source.batches()
    assert list(batch.ids) == ["000.wav", "001.wav", "1.wav"]
    np.testing.assert_array_equal(batch.args[0].numpy(), np.stack(clips))
    assert "no file matches" in data_error("audio", path=tmp_path / "clips" / "*.flac")


@pytest.mark.parametrize(("width", "bits"), [(1, 8), (2, 16), (3, 24), (4, 32)])
def test_whole_numbers_of_any_size_become_fractions_of_full_scale(
    tmp_path: Path, width: int, bits: int
) -> None:
    values = [-(2 ** (bits - 1)), -1, 0, 1, 2 ** (bits - 1) - 1]
    stored = [value + 128 for value in values] if width == 1 else values
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(b"".join(v.to_bytes(width, "little", signed=width > 1) for v in stored))
    found = joined(data("audio", path=tmp_path).batches())
    expected = torch.tensor([values], dtype=torch.float64) / 2 ** (bits - 1)
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "subtype"), [("x.wav", "FLOAT"), ("x.wav", "DOUBLE"), ("x.FLAC", "PCM_24")]
)
def test_floating_point_and_flac_files_are_read_with_suffixes_in_any_case(
    tmp_path: Path, name: str, subtype: str
) -> None:
    samples = noise(1, 300)
    soundfile.write(tmp_path / name, samples, RATE, subtype=subtype, format=name[2:].upper())
    (tmp_path / "notes.txt").write_text("not audio")
    source = data("audio", path=tmp_path)
    found = joined(source.batches())
    np.testing.assert_allclose(found, samples.T, rtol=0, atol=2**-23)
    assert statements(source)["files"] == "1 other file (1 .txt) not read"


def test_samples_beyond_full_scale_are_kept_and_counted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.array([0.5, -3.0]), RATE, subtype="FLOAT")
    source = data("audio", path=tmp_path)
    assert joined(source.batches()).tolist() == [[0.5, -3.0]]
    assert "values beyond [-1, 1] (1 of 1 file)" in statements(source)["samples"]


def test_channels_are_mixed_selected_or_kept(tmp_path: Path) -> None:
    samples = noise(2, 50, channels=2).astype(np.float32)
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    left, right = torch.from_numpy(samples.T.copy())
    mean = data("audio", path=tmp_path)
    torch.testing.assert_close(joined(mean.batches()), (left + right)[None] / 2)
    assert statements(mean)["samples"] == (
        "float32, 1 channel, the mean of several (1 of 1 file); 16000 Hz"
    )
    first = data("audio", path=tmp_path, channels="first", channel_axis=True)
    assert torch.equal(joined(first.batches()), left[None, None])
    both = data("audio", path=tmp_path, channels="all")
    assert torch.equal(joined(both.batches())[0], torch.stack([left, right]))


def test_a_file_with_another_number_of_channels_is_an_error_if_all_are_kept(
    tmp_path: Path,
) -> None:
    soundfile.write(tmp_path / "a.wav", noise(0, 9), RATE)
    soundfile.write(tmp_path / "b.wav", noise(0, 9, 2), RATE)
    with pytest.raises(SampleError, match=r"b.wav has 2 channels, but the first file has 1"):
        read_all(data("audio", path=tmp_path, channels="all"))


def test_a_resampled_tone_is_the_same_tone(tmp_path: Path) -> None:
    times = np.arange(44_100) / 44_100
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * times), 44_100)
    soundfile.write(tmp_path / "b.wav", np.zeros(100), RATE)
    source = data("audio", path=tmp_path, sample_rate=RATE)
    found = joined(source.batches())
    assert found.shape == (2, RATE)
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(found[0, 200:-200], tone[200:-200], atol=2e-4)
    assert "resampled with soxr (1 of 2 files)" in statements(source)["samples"]


def test_files_of_different_rates_are_an_error_without_a_sample_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(0, 9), RATE)
    soundfile.write(tmp_path / "b.wav", noise(0, 9), 8000)
    words = data_error("audio", path=tmp_path)
    assert "a.wav has 16000 Hz and b.wav has 8000 Hz; set data.sample_rate" in words


def test_shorter_files_are_padded_with_zeros_and_their_lengths_are_an_input(
    tmp_path: Path,
) -> None:
    clips = write_clips(tmp_path, [30, 50, 20])
    source = data("audio", path=tmp_path, input="wave", lengths="samples", batch_size=2)
    one, two = source.batches()
    assert [list(batch.ids) for batch in (one, two)] == [["000.wav", "001.wav"], ["002.wav"]]
    assert one.kwargs["samples"].tolist() == [30, 50]
    assert two.kwargs["samples"].tolist() == [20]
    assert one.lengths[0].tolist() == [30, 50]  # of "wave", for the test of padding
    expected = np.stack([np.pad(clips[0], (0, 20)), clips[1]])
    np.testing.assert_array_equal(one.kwargs["wave"], expected)
    assert two.kwargs["wave"].shape == (1, 20)
    assert statements(source)["padding"] == (
        "zeros at the end, to the longest of the batch; lengths as input samples"
    )


def test_files_are_cut_and_padded_to_a_number_of_seconds(tmp_path: Path) -> None:
    clips = write_clips(tmp_path, [30, 50])
    source = data("audio", path=tmp_path, seconds=40 / RATE)
    expected = np.stack([np.pad(clips[0], (0, 10)), clips[1][:40]])
    np.testing.assert_array_equal(joined(source.batches()), expected)
    assert statements(source)["length"] == "longer files are cut (1 of 2 files)"


def broken_files(folder: Path) -> dict[str, str]:
    """Write files that cannot be decoded; return the words of their errors."""
    whole = folder / "whole.wav"
    soundfile.write(whole, noise(0, 1000), RATE)
    (folder / "cut.wav").write_bytes(whole.read_bytes()[:900])
    soundfile.write(folder / "whole.flac", noise(0, 9000), RATE)
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:5000])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("no audio")
    soundfile.write(folder / "silent.wav", np.zeros((0, 1)), RATE)
    soundfile.write(folder / "nan.wav", np.array([0, np.nan]), RATE, subtype="FLOAT")
    (folder / "link.wav").symlink_to(folder / "nothing.wav")
    return {
        "cut.wav": "cut.wav is truncated: it has 856 of 2,000 bytes",
        "cut.flac": "cut.flac cannot be decoded: ",
        "empty.wav": "empty.wav cannot be read: ",
        "text.wav": "text.wav cannot be read: ",
        "silent.wav": "silent.wav contains no samples",
        "nan.wav": "nan.wav has samples that are NaN or infinite",
        "link.wav": "link.wav does not exist",
    }


def test_broken_files_are_quarantined_one_by_one(tmp_path: Path) -> None:
    words = broken_files(tmp_path)
    source = data("audio", path=tmp_path, lengths="n")
    (batch,) = source.batches()
    found = {batch.ids[row]: str(error) for row, error in batch.errors.items()}
    assert found.keys() == words.keys()
    for name, text in words.items():
        assert found[str(name)].startswith(text), found[str(name)]
    bad = list(batch.errors)
    assert not batch.kwargs["audio"][bad].any()
    assert not batch.kwargs["n"][bad].any()
    assert batch.kwargs["audio"].shape == (9, 9000)


def test_a_folder_without_readable_audio_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("no audio")
    assert "no audio file can be read; the last error: text.wav" in data_error(
        "audio", path=tmp_path
    )
    (tmp_path / "text.wav").rename(tmp_path / "text.dat")
    words = data_error("audio", path=tmp_path)
    assert words.endswith("contains no audio files; it has 1 other file (1 .dat)")


def test_labels_are_the_folders_and_a_list_keeps_its_order(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        write_clips(tmp_path / name, [5])
    source = data("audio", path=tmp_path, labels="folder")
    assert source.classes == ("cat", "dog")
    assert torch.cat(list(source.labels())).tolist() == [0, 1]
    (tmp_path / "list.csv").write_text("file,y\ndog/000.wav,2.5\ncat/000.wav,1\n")
    listed = data("audio", path=tmp_path / "list.csv", labels="y")
    assert torch.cat(list(listed.labels())).tolist() == [2.5, 1]
    assert [list(batch.ids) for batch in listed.batches()] == [["dog/000.wav", "cat/000.wav"]]


def test_files_in_an_archive_are_those_of_the_folder(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", [30, 30])
    with tarfile.open(tmp_path / "clips.tar", "w") as archive:
        archive.add(tmp_path / "clips", "clips")
    source = data("audio", path=tmp_path / "clips.tar")
    np.testing.assert_array_equal(joined(source.batches()), np.stack(clips))


# --- feature extractors ------------------------------------------------------------------------

LENGTHS = [900, 400, 1300, 650, 2000]
EXTRACTORS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "with a mask": (
        "Wav2Vec2FeatureExtractor", {"return_attention_mask": True}, {"padding": True},
    ),
    "without a mask": ("Wav2Vec2FeatureExtractor", {}, {"padding": True}),
    "spectrogram": ("WhisperFeatureExtractor", {"feature_size": 8, "chunk_length": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", EXTRACTORS)
def test_inputs_are_those_of_the_feature_extractor(tmp_path: Path, case: str) -> None:
    name, settings, call = EXTRACTORS[case]
    extractor = getattr(import_transformers(""), name)(**settings)
    extractor.save_pretrained(tmp_path / "extractor")
    clips = write_clips(tmp_path / "clips", LENGTHS)
    source = data(
        "audio", path=tmp_path / "clips", processor=tmp_path / "extractor", batch_size=3,
        preprocess="processor",
    )  # fmt: skip
    for batch, rows in zip(source.batches(), (clips[:3], clips[3:]), strict=True):
        expected = extractor(rows, sampling_rate=RATE, return_tensors="pt", **call)
        assert batch.kwargs.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch.kwargs[key], value)
    words = statements(source)["padding"]
    assert ("with attention_mask" in words) == (case == "with a mask")


def test_a_file_that_the_extractor_cuts_is_counted(tmp_path: Path) -> None:
    settings = {"feature_size": 8, "chunk_length": 1}
    folder = tmp_path / "extractor"
    import_transformers("").WhisperFeatureExtractor(**settings).save_pretrained(folder)
    write_clips(tmp_path / "clips", [RATE + 1, RATE])
    keys = {"path": tmp_path / "clips", "processor": folder}
    source = data("audio", **keys)
    read_all(source)
    assert statements(source)["length"] == "longer files are cut (1 of 2 files)"
    assert statements(source)["padding"].startswith("by the processor to 1 s")


def test_seconds_cut_and_pad_through_the_extractor(tmp_path: Path) -> None:
    extractor = import_transformers("").Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(tmp_path / "extractor")
    clips = write_clips(tmp_path / "clips", [300, 500])
    keys = {"path": tmp_path / "clips", "processor": tmp_path / "extractor"}
    (batch,) = data("audio", seconds=400 / RATE, **keys).batches()
    expected = extractor([clips[0], clips[1][:400]], sampling_rate=RATE, padding="max_length",
                         max_length=400, return_tensors="pt")  # fmt: skip
    assert torch.equal(batch.kwargs["input_values"], expected["input_values"])
    assert batch.kwargs["attention_mask"].sum(1).tolist() == [300, 400]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Wav2Vec2 with its feature extractor."""
    transformers, folder = import_transformers(""), tmp_path_factory.mktemp("wav2vec2")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8, 8], conv_kernel=[10, 8], conv_stride=[5, 4], num_feat_extract_layers=2,
        feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=8, id2label={0: "cat", 1: "dog", 2: "cow"},
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    extractor.save_pretrained(folder)
    return folder


def config_for(model: Path, clips: Path, output: Path) -> dict[str, Any]:
    return {
        "model": {
            "source": "huggingface",
            "path": str(model),
            "auto_class": "AutoModelForAudioClassification",
        },
        "data": {"source": "audio", "path": str(clips), "batch_size": 8},
        "run": {"threads": 1, "warmup": 0},
        "output": {"path": str(output), "format": "jsonl", "transform": "softmax"},
        "measure": {"memory": False},
    }


@pytest.mark.slow
def test_a_hundred_files_through_a_classifier_two_workers_and_a_resume(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = write_clips(tmp_path / "clips", [200 + 7 * (i * 37 % 50) for i in range(100)])
    transformers = import_transformers("")
    model = transformers.AutoModelForAudioClassification.from_pretrained(classifier).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(classifier)
    expected = []
    for start in range(0, 100, 8):
        rows = extractor(clips[start : start + 8], sampling_rate=RATE, padding=True,
                         return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            expected.append(model(**rows).logits.softmax(1))

    config = config_for(classifier, tmp_path / "clips", tmp_path / "one")
    result = gradrun.infer(config)
    lines = (tmp_path / "one" / "predictions.jsonl").read_bytes()
    rows = [json.loads(line)["prediction"] for line in lines.splitlines()]
    torch.testing.assert_close(torch.tensor(rows), torch.cat(expected), rtol=1e-5, atol=1e-6)
    assert json.loads(lines.splitlines()[1])["id"] == "001.wav"
    texts = {s.topic: s.text for s in result.interpretation}
    assert texts["files"] == "100 audio files, sorted by path as text"

    InlineEngines(monkeypatch)
    two = config | {"output": config["output"] | {"path": str(tmp_path / "two")}}
    gradrun.infer(two, engine={"source": "processes", "workers": 2})
    assert (tmp_path / "two" / "predictions.jsonl").read_bytes() == lines

    broken = tmp_path / "clips" / "070.wav"
    broken.write_bytes(broken.read_bytes()[:100])
    stopped, whole = (
        config | {"output": config["output"] | {"path": str(tmp_path / name)}}
        for name in ("three", "four")
    )
    with pytest.raises(RunFailed, match=r"070.wav is truncated"):
        gradrun.infer(stopped)
    gradrun.infer(stopped, resume=True, **{"run.on_error": "quarantine"})
    gradrun.infer(whole, **{"run.on_error": "quarantine"})
    resumed = (tmp_path / "three" / "predictions.jsonl").read_bytes()
    assert resumed == (tmp_path / "four" / "predictions.jsonl").read_bytes()
    (line,) = (tmp_path / "four" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "070.wav"


# --- errors ------------------------------------------------------------------------------------

CONFIG = """\
model: {source: layers, layers: [Identity]}
data: {source: audio, path: clips, KEYS}
output: {path: out}
"""


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("preprocess: processor", "preprocess: processor needs data.processor"),
        ("processor: extractor, preprocess: none", "data.processor is not used by preprocess"),
        ("processor: extractor, lengths: n", "data.lengths is not used by preprocess: processor"),
        ("processor: extractor, channels: all", "a processor takes one channel"),
        ("sample_rate: 0", "sample_rate: 0 must be more than 0"),
        ("chanels: all", "did you mean channels?"),
    ],
)
def test_keys_without_an_effect_are_errors(tmp_path: Path, keys: str, words: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "extractor").mkdir()
    (tmp_path / "c.yaml").write_text(CONFIG.replace("KEYS", keys))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert words in str(caught.value)


def test_another_rate_than_the_extractors_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "extractor"
    import_transformers("").Wav2Vec2FeatureExtractor().save_pretrained(folder)
    write_clips(tmp_path / "clips", [9])
    words = data_error("audio", path=tmp_path / "clips", processor=folder, sample_rate=8000)
    assert words == "Wav2Vec2FeatureExtractor needs 16000 samples per second"
