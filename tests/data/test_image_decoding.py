"""Tests of how files become pixels: modes, bit depths, orientation, transparency, pages."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

import gradrun
from gradrun.core.errors import ConfigError, RunFailed
from gradrun.core.optional import library_settings
from gradrun.data.source import BatchSource
from tests.support.pictures import opened, save_noise

Image.init()
HAS_AVIF = "AVIF" in Image.SAVE  # since Pillow 11.3
_RNG = np.random.default_rng(0)
_RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
"""Every level of 8 bits, in 16 bits."""


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with library_settings():
        yield


def pixels_of(path: Path, **changes: Any) -> torch.Tensor:
    """The model's input for a folder of images, [n, channels, height, width]."""
    (batch,) = opened(path, batch_size=64, **changes).batches()
    batch.raise_errors()
    return batch.args[0]


def statements_of(data: BatchSource) -> dict[str, str]:
    """The statements by topic, after all batches were read."""
    for _ in data.batches():
        pass
    found: dict[str, str] = {}
    for statement in data.statements():
        found[statement.topic] = "; ".join(
            filter(None, (found.get(statement.topic), statement.text))
        )
    return found


# --- modes and bit depths ----------------------------------------------------------------------


def noise(channels: int) -> np.ndarray[Any, Any]:
    return _RNG.integers(0, 256, (12, 20, channels), np.uint8)


def over_white(color: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Blend [h, w, channels] with white, by hand."""
    share = alpha.astype(float)[..., None] / 255
    return color * share + 255 * (1 - share)


def eight_bit_cases() -> dict[str, tuple[Image.Image, str, np.ndarray[Any, Any]]]:
    """Name -> an image, the suffix of a format that stores its mode, the expected RGB values."""
    rgb, grey, alpha = noise(3), noise(1), noise(1)[..., 0]
    cmyk = noise(4)
    ink = 255 - cmyk[..., :3].astype(float)
    indexed = Image.fromarray(grey[..., 0] % 4, "P")
    palette = noise(3)[0, :4]
    indexed.putpalette(palette.tobytes())
    clear = indexed.copy()
    clear.info["transparency"] = bytes([0, 255, 128, 255])
    colors = palette[grey[..., 0] % 4].astype(float)
    shares = np.array([0, 255, 128, 255])[grey[..., 0] % 4]
    repeat = np.repeat(grey, 3, 2).astype(float)
    keyed = np.where((rgb == rgb[0, 0]).all(2)[..., None], 255, rgb)
    return {
        "RGB": (Image.fromarray(rgb), ".png", rgb),
        "L": (Image.fromarray(grey[..., 0]), ".png", repeat),
        "1": (Image.fromarray(grey[..., 0] > 127), ".tif", np.where(repeat > 127, 255.0, 0.0)),
        "P": (indexed, ".png", colors),
        "P with transparency": (clear, ".png", over_white(colors, shares)),
        "P in a GIF": (indexed, ".gif", colors),
        "LA": (
            Image.fromarray(np.dstack([grey, alpha[..., None]]), "LA"),
            ".png",
            over_white(repeat, alpha),
        ),
        "RGBA": (
            Image.fromarray(np.dstack([rgb, alpha]), "RGBA"), ".tga", over_white(rgb, alpha)
        ),
        "RGB with a transparent color": (Image.fromarray(rgb), ".png", keyed),
        "CMYK": (Image.fromarray(cmyk, "CMYK"), ".tif", ink * (255 - cmyk[..., 3:]) / 255),
    }  # fmt: skip


CASES = eight_bit_cases()


@pytest.mark.parametrize("name", CASES)
def test_every_mode_of_8_bits_gives_the_colors_that_a_viewer_shows(
    tmp_path: Path, name: str
) -> None:
    image, suffix, expected = CASES[name]
    key = tuple(np.asarray(image)[0, 0]) if "a transparent color" in name else None
    image.save(tmp_path / f"a{suffix}", **({"transparency": tuple(map(int, key))} if key else {}))
    found = pixels_of(tmp_path)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(found - expected).max() <= 1.01, "at most one level, from rounding"
    grey = pixels_of(tmp_path, mode="L")[0, 0].numpy() * 255
    luma = np.asarray(expected, float) @ [0.299, 0.587, 0.114]
    assert np.abs(grey - luma).max() <= 1.51


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_color_spaces_are_converted_as_pillow_converts_them(tmp_path: Path) -> None:
    image = Image.fromarray(noise(3))
    image.convert("YCbCr").save(tmp_path / "a.im")
    image.convert("PA").save(tmp_path / "b.im")
    found = pixels_of(tmp_path).permute(0, 2, 3, 1).numpy() * 255
    for row, mode in enumerate(("YCbCr", "PA")):
        assert np.allclose(found[row], np.asarray(image.convert(mode).convert("RGB")), atol=1e-4)


DEEP: dict[str, tuple[str, np.ndarray[Any, Any], dict[str, Any]]] = {
    "16-bit PNG": ("a.png", _RAMP, {}),
    "16-bit TIFF": ("a.tif", _RAMP, {}),
    "16-bit big-endian TIFF": ("a.tif", _RAMP.astype(">u2"), {}),
    "16-bit PGM": ("a.pgm", _RAMP, {}),
    "16-bit JPEG 2000": ("a.jp2", _RAMP, {}),
    "32-bit TIFF": ("a.tif", _RAMP.astype(np.int32), {"value_range": (0, 65535)}),
    "float TIFF": ("a.tif", (_RAMP / 65535).astype(np.float32), {"value_range": (0, 1)}),
    "12 bits in 16": ("a.png", _RAMP // 16, {"value_range": (0, 4095)}),
}


@pytest.mark.parametrize("name", DEEP)
def test_images_of_more_than_8_bits_are_scaled_by_their_real_range(
    tmp_path: Path, name: str
) -> None:
    file, stored, keys = DEEP[name]
    if file == "a.pgm":
        (tmp_path / file).write_bytes(b"P5 16 16 65535\n" + stored.astype(">u2").tobytes())
    else:
        Image.fromarray(stored).save(tmp_path / file)
    low, high = keys.get("value_range", (0, 65535))
    expected = torch.from_numpy((stored.astype(np.float64) - low) / (high - low)).float()
    found = pixels_of(tmp_path, mode="L", **keys)
    assert torch.allclose(found[0, 0], expected, atol=1e-6), "no precision is lost"
    assert torch.equal(pixels_of(tmp_path, **keys)[0], found[0].expand(3, -1, -1))
    scaled = "by value_range" if keys else "from 16 bits"
    assert statements_of(opened(tmp_path, **keys))["depth"] == f"1 of 1 image scaled {scaled}"


def test_16_bits_pass_a_resize_and_a_preset_like_the_same_image_in_8_bits(tmp_path: Path) -> None:
    for folder, array in (("deep", _RAMP), ("flat", (_RAMP // 257).astype(np.uint8))):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / "a.png")
    for keys in ({"resize": 11, "crop": 9}, {"preprocess": "imagenet", "resize": 20, "crop": 14}):
        deep, flat = (pixels_of(tmp_path / name, **keys) for name in ("deep", "flat"))
        assert torch.allclose(deep, flat, atol=1.01 / 255 / 0.224), "one level"


@pytest.mark.parametrize(
    ("array", "mode"), [(_RAMP.astype(np.int32), "mode I"), (_RAMP.astype(np.float32), "mode F")]
)
def test_pixels_of_unknown_range_are_an_error_that_names_the_mode_and_the_key(
    tmp_path: Path, array: np.ndarray[Any, Any], mode: str
) -> None:
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(
        ConfigError, match=rf"a\.tif has .* \(Pillow's {mode}\).* data\.value_range"
    ):
        opened(tmp_path)


def test_unsigned_integers_of_32_bits_keep_their_upper_half(tmp_path: Path) -> None:
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    Image.fromarray(values.view(np.int32)).save(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[content.index(b"\x53\x01\x03\x00") + 8] = 1  # the sample format: unsigned
    (tmp_path / "a.tif").write_bytes(content)
    with Image.open(tmp_path / "a.tif") as image:
        assert (image.mode, image.tag_v2[339]) == ("I", (1,))
    found = pixels_of(tmp_path, mode="L", value_range=(0, 2**32 - 1))
    assert torch.allclose(found.flatten(), torch.tensor([0, 0.5, 1.0]), atol=1e-6)


def test_a_transparent_level_of_16_bits_has_the_color_of_the_background(tmp_path: Path) -> None:
    Image.fromarray(_RAMP).save(tmp_path / "a.png", transparency=257 * 7)
    expected = torch.from_numpy(np.where(_RAMP == 257 * 7, 1, _RAMP / 65535)).float()
    assert torch.allclose(pixels_of(tmp_path, mode="L")[0, 0], expected, atol=1e-6)
    stored = pixels_of(tmp_path, mode="L", background="stored")[0, 0]
    assert torch.allclose(stored, torch.from_numpy(_RAMP / 65535).float(), atol=1e-6)
    assert statements_of(opened(tmp_path))["transparency"] == "1 of 1 image on white"


def test_a_range_for_images_of_8_bits_is_stated_to_have_no_effect(tmp_path: Path) -> None:
    save_noise(tmp_path / "a.png", 4, 4)
    data = opened(tmp_path, value_range=(0, 100))
    assert statements_of(data)["depth"] == "8 bits per channel; value_range has no effect"


def test_nan_pixels_and_an_empty_range_are_errors(tmp_path: Path) -> None:
    values = np.full((4, 4), np.nan, np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"a\.tif has pixels that are NaN or infinite"):
        opened(tmp_path, value_range=(0, 1))
    with pytest.raises(ConfigError, match="black and white have the same value"):
        opened(tmp_path, value_range=(1, 1))


def test_a_tiff_whose_zero_is_white_is_inverted(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0  # WhiteIsZero
    Image.fromarray(_RAMP).save(tmp_path / "a.tif", tiffinfo=tags)
    expected = torch.from_numpy(1 - _RAMP / 65535).float()
    assert torch.allclose(pixels_of(tmp_path, mode="L")[0, 0], expected, atol=1e-6)


def test_a_tiff_with_an_unsupported_layout_is_an_error_that_names_the_format(
    tmp_path: Path,
) -> None:
    save_noise(tmp_path / "a.tif", 4, 4)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    entry = content.index(b"\x06\x01\x03\x00")  # the photometric interpretation
    content[entry + 8] = 99
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.tif is a TIFF file that Pillow cannot decode"):
        opened(tmp_path)


# --- orientation -------------------------------------------------------------------------------


UPRIGHT: dict[int, Any] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, :, ::-1],
    3: lambda pixels: pixels[:, ::-1, ::-1],
    4: lambda pixels: pixels[:, ::-1],
    5: lambda pixels: pixels.transpose(0, 2, 1),
    6: lambda pixels: np.rot90(pixels, -1, (1, 2)),
    7: lambda pixels: pixels[:, ::-1, ::-1].transpose(0, 2, 1),
    8: lambda pixels: np.rot90(pixels, 1, (1, 2)),
}
"""EXIF orientation -> the function that turns stored pixels [channels, height, width] upright."""


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", *(["avif"] * HAS_AVIF)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright_as_transformers_does(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    file, image = tmp_path / f"a.{suffix}", Image.fromarray(noise(3))
    image.save(file)  # the same pixels, without EXIF
    stored = pixels_of(tmp_path)[0]
    image.save(file, exif=exif)
    data = opened(tmp_path)
    (batch,) = data.batches()
    upright = batch.args[0][0]
    assert torch.equal(upright, torch.from_numpy(UPRIGHT[orientation](stored.numpy()).copy()))
    if suffix != "tif":  # Pillow 10 turns these twice in exif_transpose
        expected = np.asarray(load_image(str(file)))
        assert np.allclose(upright.permute(1, 2, 0) * 255, expected, atol=1e-4)
    turned = "1 of 1 image turned upright" if orientation > 1 else None
    assert statements_of(data).get("exif") == turned
    assert torch.equal(pixels_of(tmp_path, exif=False)[0], stored)


def test_a_damaged_exif_block_leaves_the_image_as_stored(tmp_path: Path) -> None:
    Image.fromarray(noise(3)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    found = pixels_of(tmp_path)[0].permute(1, 2, 0) * 255
    assert np.allclose(found, np.asarray(Image.open(tmp_path / "a.jpg")), atol=1e-4)


def test_the_number_of_turned_images_counts_each_image_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for number in range(5):
        Image.fromarray(noise(3)).save(tmp_path / f"{number}.jpg", exif=exif if number > 2 else b"")
    data = opened(tmp_path, batch_size=2)
    assert statements_of(data)["exif"] == "2 of 5 images turned upright"
    assert statements_of(data)["exif"] == "2 of 5 images turned upright", "after a second pass"
    kept = statements_of(opened(tmp_path, exif=False))
    assert kept["exif"] == "2 of 5 images not turned upright"


# --- transparency ------------------------------------------------------------------------------


def test_a_black_sign_on_nothing_is_visible_unless_the_stored_color_is_requested(
    tmp_path: Path,
) -> None:
    sign = np.zeros((8, 8, 4), np.uint8)
    sign[2:6, 2:6, 3] = 255
    Image.fromarray(sign).save(tmp_path / "sign.png")
    white = 1 - torch.from_numpy(sign[..., 3] / 255).float()
    assert torch.equal(pixels_of(tmp_path)[0], white.expand(3, 8, 8))
    assert pixels_of(tmp_path, background="stored").sum() == 0
    red = pixels_of(tmp_path, background="#ff0000")[0]
    assert torch.equal(red[0], white)
    assert red[1:].sum() == 0
    assert statements_of(opened(tmp_path))["transparency"] == "1 of 1 image on white"
    stored = statements_of(opened(tmp_path, background="stored"))
    assert stored["transparency"] == "1 of 1 image without alpha"
    with pytest.raises(ConfigError, match="unknown color 'vhite'; allowed: stored, a name"):
        opened(tmp_path, background="vhite")


def test_an_alpha_channel_that_hides_nothing_is_not_stated(tmp_path: Path) -> None:
    Image.fromarray(noise(3)).convert("RGBA").save(tmp_path / "a.png")
    assert "transparency" not in statements_of(opened(tmp_path))


# --- pages -------------------------------------------------------------------------------------


@pytest.fixture
def paged(tmp_path: Path) -> Path:
    """Files of three pages of the grey levels 10, 120 and 240, and one of a single page."""
    pages = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 120, 240)]
    for file in ("a.tif", "b.gif", "c.png", "d.webp"):
        lossless = {"lossless": True} if file == "d.webp" else {}
        pages[0].save(tmp_path / file, save_all=True, append_images=pages[1:], **lossless)
    pages[1].save(tmp_path / "e.png")
    return tmp_path


def levels(data: BatchSource) -> dict[str, int]:
    (batch,) = data.batches()
    means = (batch.args[0].mean((1, 2, 3)) * 255).round().int().tolist()
    return dict(zip(map(str, batch.ids), means, strict=True))


def test_the_first_page_is_used_and_the_others_are_counted(paged: Path) -> None:
    data = opened(paged)
    assert levels(data) == {"a.tif": 10, "b.gif": 10, "c.png": 10, "d.webp": 10, "e.png": 120}
    assert statements_of(data)["pages"] == "4 of 5 images with several pages; page 1 is used"


def test_every_page_becomes_a_sample_with_page_all(paged: Path) -> None:
    data = opened(paged, page="all", batch_size=64)
    expected = {
        f"{file}#{page}": level
        for file in ("a.tif", "b.gif", "c.png", "d.webp")
        for page, level in ((1, 10), (2, 120), (3, 240))
    }
    assert levels(data) == expected | {"e.png": 120}
    assert statements_of(data)["pages"] == "13 pages of 5 files, each is a sample"


def test_a_page_that_a_file_lacks_is_an_error_of_that_sample(paged: Path) -> None:
    (batch,) = opened(paged, page=3).batches()
    assert (batch.args[0][:4].mean((1, 2, 3)) * 255).round().tolist() == [240] * 4
    assert str(batch.errors[4]) == "e.png has no page 3, only 1; set data.page"


# --- files -------------------------------------------------------------------------------------


def test_every_suffix_of_an_image_is_read_in_capitals_too_and_other_files_are_counted(
    tmp_path: Path,
) -> None:
    image = Image.fromarray(np.full((8, 8, 3), 99, np.uint8))
    formats = {
        "a.jfif": "JPEG", "b.JPE": "JPEG", "c.tga": "TGA", "d.JP2": "JPEG2000", "e.j2k": "JPEG2000",
        "f.avif": "AVIF", "g.webp": "WEBP", "h.ico": "ICO", "i.PNG": "PNG", "j.qoi": "QOI",
        "k.dds": "DDS", "l.pcx": "PCX", "m.ppm": "PPM", "n.sgi": "SGI", "o.icns": "ICNS",
    }  # fmt: skip
    formats = {name: form for name, form in formats.items() if form in Image.SAVE}
    for name, form in formats.items():
        image.save(tmp_path / name, form, **({"sizes": [(8, 8)]} if form == "ICO" else {}))
    for name in ("x.heic", "y.txt", "z.txt", "none"):
        (tmp_path / name).touch()
    data = opened(tmp_path, resize=(8, 8), batch_size=64)
    (batch,) = data.batches()
    assert batch.ids == sorted(formats)
    assert torch.allclose(batch.args[0], torch.tensor(99 / 255), atol=2 / 255)
    assert statements_of(data)["files"] == (
        f"{len(formats)} images, sorted by path as text; "
        "4 other files (2 .txt, 1 .heic, 1 no suffix) not read"
    )  # fmt: skip


def test_a_folder_without_images_is_an_error_that_counts_the_other_files(tmp_path: Path) -> None:
    for name in ("a.heic", "b.HEIC", "c.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(
        ConfigError, match=r"contains no images; it has 3 other files \(2 \.heic, 1"
    ):
        opened(tmp_path)


def test_linked_folders_are_read_and_a_link_to_a_parent_is_not_followed(tmp_path: Path) -> None:
    save_noise(tmp_path / "store" / "cat" / "1.png", 4, 4)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (batch,) = opened(tmp_path / "data").batches()
    assert batch.ids == ["cats/1.png"]


def test_an_image_of_100_million_pixels_is_read_and_a_limit_is_named(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "scan.png")
    found = pixels_of(tmp_path, mode="L", resize=(8, 8), interpolation="nearest")
    assert torch.equal(found, torch.ones(1, 1, 8, 8))
    for limit in (99_999_999, 1_000_000):
        with pytest.raises(
            ConfigError, match=f"more than {limit:,} pixels.* raise data.max_pixels"
        ):
            opened(tmp_path, max_pixels=limit)


def test_warnings_and_limits_of_pillow_are_as_before_after_a_run(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).convert("P")
    (tmp_path / "pics").mkdir()
    indexed.save(tmp_path / "pics/a.png", transparency=bytes([0] + [255] * 255))
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "images", "path": str(tmp_path / "pics"), "background": "stored"},
        "output": {"path": str(tmp_path / "out")},
    }
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradrun.infer(config)
    assert not [str(warning.message) for warning in caught if "PIL" in warning.filename]
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_run_over_images_resumes_only_with_the_same_keys(tmp_path: Path) -> None:
    save_noise(tmp_path / "pics" / "a.png", 4, 4)
    config = {
        "model": {"source": "layers", "layers": ["Identity"]},
        "data": {"source": "images", "path": str(tmp_path / "pics")},
        "output": {"path": str(tmp_path / "out")},
    }
    result = gradrun.infer(config)
    topics = [statement.topic for statement in result.interpretation]
    assert {"files", "preprocess", "pixels"} <= set(topics)
    with pytest.raises((ConfigError, RunFailed), match=r"data\.background changed|exists"):
        gradrun.infer(config, resume=True, data={"background": "black"})
