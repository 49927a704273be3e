"""Decode image files to one mode: upright, without transparency, in the range of 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import IntFlag
from typing import IO, Any

import numpy as np

from gradrun.config.data import ImagesData
from gradrun.core.errors import ConfigError, SampleError, first_line
from gradrun.core.optional import import_optional, import_pillow
from gradrun.core.units import pluralize
from gradrun.results.result import Statement

_FORMATS = (
    "PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "ICO", "ICNS", "CUR",
    "DIB", "DDS", "PSD", "QOI", "SGI", "SUN", "PCX", "DCX", "XBM", "XPM", "MSP", "PIXAR", "FLI",
    "BLP", "FTEX", "GBR", "FITS", "IM", "TGA",
)  # fmt: skip
"""Formats that Pillow decodes itself; TGA and IM last, because they have no signature.

For EPS it starts Ghostscript, controlled by the file; GRIB, BUFR, HDF5, WMF and MPEG need other
libraries. .pcd is usually a point cloud.
"""

OpenFile = Callable[[], IO[bytes]]
"""Opens a file, at its beginning, for reading."""

_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0102, 0x0106, 0x0153
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> the number of Pillow's transposition that turns the image upright."""
_TURNS_BACK = _TURNS | {6: 2, 8: 4}


class Trait(IntFlag):
    """A property of an image that the decoder had to interpret."""

    READ = 1
    TURNED = 2
    """The EXIF orientation is not upright."""
    TRANSPARENT = 4
    DEEP = 8
    """More than 8 bits per channel, in one channel."""
    PAGES = 16
    """The file has several pages or frames."""
    CMYK = 32


class ImageDecoder:
    """Decodes files to Pillow images of one mode.

    Images with one channel of more than 8 bits become images of the mode F, with values from 0 to
    255, so that no precision is lost.
    """

    def __init__(self, config: ImagesData, mode: str) -> None:
        """Prepare Pillow.

        Raises:
            ConfigError: Pillow is missing, or a color or range of the config is invalid.
        """
        if config.value_range and config.value_range[0] == config.value_range[1]:
            raise ConfigError("black and white have the same value", "data.value_range")
        self._config, self._mode = config, mode
        self._pillow = import_pillow("data.source", config.max_pixels)
        self._pillow.init()
        self._formats = [name for name in _FORMATS if name in self._pillow.OPEN]
        self._background = None
        if config.background != "stored":
            colors = import_optional("PIL", "data.source", "ImageColor")
            try:
                self._background = colors.getcolor(config.background, "RGBA")
            except ValueError as error:
                raise ConfigError(
                    f"unknown color {config.background!r:.60}; allowed: stored, a name such as "
                    "white, or #rrggbb",
                    "data.background",
                ) from error

    def suffixes(self) -> set[str]:
        """Return the suffixes of the supported formats, in lower case."""
        registered = self._pillow.registered_extensions().items()
        return {suffix for suffix, name in registered if name in {*self._formats, "MPO"}}

    def pages(self, open_file: OpenFile) -> int:
        """Return the number of pages or frames of a file; 1 if it cannot be opened."""
        try:
            with open_file() as file, self._pillow.open(file, formats=self._formats) as image:
                return int(getattr(image, "n_frames", 1))
        except Exception:  # reported when the file is decoded
            return 1

    def decode(self, open_file: OpenFile, name: str, page: int) -> tuple[Any, Trait]:
        """Return a page of an image, counted from 1, and its traits.

        Raises:
            SampleError: the file cannot be decoded.
        """
        try:
            with open_file() as file, self._pillow.open(file, formats=self._formats) as image:
                return self._convert(image, page)
        except self._pillow.UnidentifiedImageError as error:
            raise SampleError(f"{name} {self._describe_unknown(open_file, name)}") from error
        except self._pillow.DecompressionBombError as error:
            raise SampleError(f"{name} {self._too_large()}") from error
        except (MemoryError, ConfigError):
            raise
        except SampleError as error:
            raise SampleError(f"{name} {error}") from error
        except Exception as error:  # Pillow raises many types of error for a damaged image
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SampleError(f"{name} cannot be read: {reason}") from error

    def _convert(self, image: Any, page: int) -> tuple[Any, Trait]:
        traits = Trait.READ
        if getattr(image, "is_animated", False):
            traits |= Trait.PAGES
        if page > 1:
            self._select_page(image, page)
        if image.width * image.height > self._config.max_pixels:
            raise SampleError(self._too_large())
        orientation = _orientation(image)
        image.load()
        if image.mode == "CMYK":
            traits |= Trait.CMYK
        if image.mode[0] in "IF":
            converted, transparent = self._from_deep(image)
            traits |= Trait.DEEP | (Trait.TRANSPARENT if transparent else 0)
        elif _may_be_transparent(image):
            converted, transparent = self._without_alpha(image)
            traits |= Trait.TRANSPARENT if transparent else 0
        else:
            converted = self._to_mode(image)
        if orientation in _TURNS:
            traits |= Trait.TURNED
            is_upright = image.format == "TIFF"  # Pillow turns these itself
            if is_upright != self._config.exif:
                turns = _TURNS_BACK if is_upright else _TURNS
                converted = converted.transpose(turns[orientation])
        return converted, traits

    def _select_page(self, image: Any, page: int) -> None:
        try:
            image.seek(page - 1)
        except EOFError:
            pages = getattr(image, "n_frames", 1)
            raise SampleError(f"has no page {page}, only {pages}; set data.page") from None

    def _to_mode(self, image: Any) -> Any:
        if image.mode == self._mode:
            return image
        try:
            return (image.convert("LA") if image.mode == "La" else image).convert(self._mode)
        except ValueError as error:
            raise SampleError(
                f"has the mode {image.mode}, which Pillow cannot convert to {self._mode}; save it "
                "as RGB"
            ) from error

    def _without_alpha(self, image: Any) -> tuple[Any, bool]:
        """Return the image over the background, and whether a pixel was transparent."""
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] == 255:
            return self._to_mode(image), False
        if self._background is None:
            return self._to_mode(image), True
        ground = self._pillow.new("RGBA", rgba.size, self._background)
        return self._pillow.alpha_composite(ground, rgba).convert(self._mode), True

    def _from_deep(self, image: Any) -> tuple[Any, bool]:
        """Return an image with one channel of more than 8 bits, scaled to 0 to 255 (mode F).

        The flag tells whether a pixel was transparent.
        """
        low, high = self._config.value_range or _value_range(image)
        stored = np.asarray(image)
        tags = image.tag_v2 if image.format == "TIFF" else {}
        if tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1:
            stored = stored.view(np.uint32)  # Pillow reads unsigned integers as signed ones
        if not np.isfinite(stored).all():
            raise SampleError("has pixels that are NaN or infinite; replace them")
        values = (stored - np.float64(low)) * (255 / (high - low))
        if tags.get(_PHOTOMETRIC) == 0:  # 0 is white
            values = 255 - values
        clear = stored == image.info.get("transparency")
        if self._background is not None:
            ground = self._pillow.new("RGB", (1, 1), self._background[:3]).convert("L")
            values[clear] = ground.getpixel((0, 0))
        return self._pillow.fromarray(values.clip(0, 255).astype(np.float32)), bool(clear.any())

    def _too_large(self) -> str:
        return (
            f"has more than {self._config.max_pixels:,} pixels; if you trust the file and have the "
            "memory, raise data.max_pixels"
        )

    def _describe_unknown(self, open_file: OpenFile, file_name: str) -> str:
        """Say why a file was not identified: another format, or an unusual form of a known one."""
        with open_file() as file:
            start = file.read(16)
            for name in self._formats:
                factory, accepts = self._pillow.OPEN[name]
                if not _accepts(accepts, start):
                    continue
                try:
                    file.seek(0)
                    factory(file, file_name)
                except Exception as error:
                    return (
                        f"is a {name} file that Pillow cannot decode: {first_line(error)}; convert "
                        "it to PNG, or to an array"
                    )
        return "is not an image of a supported format"


def _accepts(accepts: Any, start: bytes) -> bool:
    """Whether a format's signature is at the start of a file."""
    try:
        accepted = accepts is not None and accepts(start)
    except Exception:  # a file of a few bytes
        return False
    return bool(accepted) and not isinstance(accepted, str)  # a text says what is missing


def trait_statements(traits: np.ndarray[Any, Any], config: ImagesData) -> Iterator[Statement]:
    """Describe how often an image needed an interpretation.

    Args:
        traits: the traits of each sample that was decoded, 0 for the others.
    """
    read = int(np.count_nonzero(traits))
    stored = config.background == "stored"
    shades = "by value_range" if config.value_range else "from 16 bits"
    texts = {
        Trait.TURNED: ("exif", "turned upright" if config.exif else "not turned upright"),
        Trait.TRANSPARENT: (
            "transparency", "without alpha" if stored else f"on {config.background}"
        ),
        Trait.DEEP: ("depth", f"scaled {shades}"),
        Trait.CMYK: ("color", "in CMYK, converted without a color profile"),
        Trait.PAGES: ("pages", f"with several pages; page {config.page} is used"),
    }  # fmt: skip
    for trait, (topic, text) in texts.items():
        count = np.count_nonzero(traits & trait)
        if count and not (trait is Trait.PAGES and config.page == "all"):
            yield Statement(topic=topic, text=f"{count:,} of {pluralize(read, 'image')} {text}")
    if config.value_range and not np.any(traits & Trait.DEEP):
        yield Statement(topic="depth", text="8 bits per channel; value_range has no effect")


def _orientation(image: Any) -> int:
    """Return the EXIF orientation, or 1 (upright) if there is none or EXIF is damaged."""
    try:
        found: int = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data may raise anything; the pixels are not affected
        return 1
    return found


def _may_be_transparent(image: Any) -> bool:
    return (
        image.mode in {"LA", "La", "PA", "RGBA", "RGBa"}
        or "transparency" in image.info
        or (image.mode == "P" and getattr(image.palette, "mode", "").endswith("A"))
    )


def _value_range(image: Any) -> tuple[float, float]:
    """Return the values of black and white of an image with one channel of more than 8 bits."""
    if image.format != "FITS":
        if image.mode.startswith("I;16"):
            bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if image.format == "TIFF" else 16
            return 0, 2**bits - 1
        if image.mode == "I" and image.format in {"PNG", "PPM"}:  # Pillow scales these to 16 bits
            return 0, 65535
    kind = "floating-point" if image.mode == "F" else "integer"
    raise SampleError(
        f"has {kind} pixels (Pillow's mode {image.mode}) without a defined range; set "
        "data.value_range to the values of black and white, such as [0, 1]"
    )
