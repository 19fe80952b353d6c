"""From bytes to the array that a network takes."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erde.common import images
from erde.common.errors import UserError
from erde.common.images import FORMATS, load_image, open_image, to_array, upright_size


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **settings)
    return file.getvalue()


def test_16_bit_gray_is_scaled_not_clipped() -> None:
    deep = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        array = to_array(open_image(encoded(Image.fromarray(deep), kind), "deep"), 8, 8, 1)[..., 0]
        assert np.array_equal(array, np.round(deep / 257))
        assert len(np.unique(array)) == 64


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_an_agreed_white_are_refused(mode: str) -> None:
    # 0 to 1 would all become black, and what is above 65,535 white.
    with pytest.raises(UserError, match=rf"^x\.tif has pixels of mode '{mode}', .*8 or 16 bits: convert it$"):
        open_image(encoded(Image.new(mode, (4, 4)), "TIFF"), "x.tif")


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_read(kind: str) -> None:
    pixels = np.full((6, 4, 3), 200, dtype=np.uint8)
    array = to_array(open_image(encoded(Image.fromarray(pixels), kind), "x"), 6, 4, 3)
    assert np.abs(array.astype(int) - 200).max() <= 2


def test_of_a_gif_the_first_frame_is_taken() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    array = to_array(
        open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x"), 4, 4, 1
    )
    assert (array == 10).all()


def test_other_formats_start_nothing(tmp_path: Path) -> None:
    # Pillow would look for Ghostscript and call it, whatever the file's name says.
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    eps = encoded(Image.new("RGB", (4, 4)), "EPS")
    (tmp_path / "x.png").write_bytes(eps)
    code = "import sys; from pathlib import Path; from erde.common.images import load_image as load; "
    code += "load(Path(sys.argv[1]), (4, 4, 3))"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.png"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "x.png is not a readable image (PNG, JPEG, WebP, BMP, GIF or TIFF expected)" in done.stderr
    assert not started.exists()
    for kind in ("PPM", "ICNS", "PCX", "TGA", "PDF"):
        with pytest.raises(UserError, match="is not a readable image"):
            open_image(encoded(Image.new("RGB", (64, 64)), kind), "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_set_upright(kind: str, orientation: int) -> None:
    # A bright corner on dark: where it is says how the image stands.
    upright = np.zeros((16, 32), dtype=np.uint8)
    upright[:8, :16] = 255
    to_stored = {
        1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose,
        6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, 3),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(to_stored[orientation](upright))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    sizes: list[tuple[int, int]] = []
    content = encoded(stored, kind, exif=exif)
    image = open_image(content, "x", lambda opened: sizes.append(upright_size(opened)))
    assert image.size == sizes[0] == (32, 16)
    assert np.abs(to_array(image, 16, 32, 1)[..., 0].astype(int) - upright).max() < 60


def test_damaged_exif_is_no_reason_to_refuse() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    opened = open_image(encoded(image, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "x")
    assert np.array_equal(to_array(opened, 8, 8, 1)[..., 0], np.asarray(image))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 10_000)])
def test_a_strip_takes_little_memory(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("L", size, 77).save(tmp_path / "strip.png")
    before = peak_mib()
    array = load_image(tmp_path / "strip.png", (224, 224, 3))
    assert peak_mib() - before < 100
    assert array.shape == (224, 224, 3)
    assert (array == 77).all()


def test_the_middle_of_a_strip() -> None:
    pixels = np.zeros((4, 4000), dtype=np.uint8)
    pixels[:, 1990:2010] = 255
    array = to_array(Image.fromarray(pixels), 8, 8, 1)[..., 0]
    assert (array == 255).all()


def test_up_to_the_limit_nothing_changes() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9 * 16), dtype=np.uint8))
    whole = image.resize((8 * 16, 8), Image.Resampling.BILINEAR).crop((60, 0, 68, 8))
    assert np.array_equal(to_array(image, 8, 8, 1)[..., 0], np.asarray(whole))


def test_huge_images_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    noise = np.random.default_rng(0).integers(0, 256, (10, 10), dtype=np.uint8)
    torn = encoded(Image.fromarray(noise))[:-30]
    with pytest.raises(
        UserError, match=r"^x has 10 x 10 pixels, at most 99 are read: make it smaller or remove it$"
    ):
        open_image(torn, "x")
    path = tmp_path / "large.png"
    path.touch()
    os.truncate(path, images.MAX_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(UserError, match=r"large\.png is larger than 512 MiB"):
        load_image(path, (8, 8, 3))


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"pipe\.png cannot be read: it is not a regular file"):
        load_image(tmp_path / "pipe.png", (8, 8, 3))
    with pytest.raises(UserError, match=r"dangling\.png cannot be read: No such file"):
        load_image(tmp_path / "dangling.png", (8, 8, 3))


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(to_array(Image.fromarray(pixels), 5, 7, 3), pixels)


def test_resize_covers_then_crops_at_the_centre() -> None:
    # Left third black, middle white, right black: the centre crop of a wide image is white.
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    array = to_array(Image.fromarray(pixels), 8, 8, 3)
    assert array.shape == (8, 8, 3)
    assert array[:, 1:-1].min() == 255


def test_text_is_no_image() -> None:
    with pytest.raises(UserError, match=r"note\.png is not a readable image"):
        open_image(b"no picture", "note.png")
