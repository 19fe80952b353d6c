"""Images as people have them, and answers as people read them."""

from __future__ import annotations

import base64
import html.parser
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
from numpy.typing import NDArray
from PIL import Image

from erde.common.errors import printable
from erde.common.images import load_image
from erde.runtime import session as sessions
from erde.runtime.prediction import Prediction
from erde.runtime.session import Session
from tests.helpers.checks import user_error
from tests.helpers.hand_made_bundle import convolution_bundle, pixel_bundle, pixel_logits

COLOUR = (8, 8, 3)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """For colour images of 8x8."""
    return Session(convolution_bundle(tmp_path_factory.mktemp("colour") / "bundle"), threads=1)


@pytest.fixture(scope="module")
def gray(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """For gray images of 8x8."""
    return Session(convolution_bundle(tmp_path_factory.mktemp("gray") / "bundle", channels=1), threads=1)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(list(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """A JPEG file larger than the network's input, which lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(30, 20, 3)).save(tmp_path / "turned.jpg", exif=exif)
    return tmp_path / "turned.jpg"


def same(answer: Prediction, expected: Prediction) -> bool:
    return answer.exits.tolist() == expected.exits.tolist() and np.array_equal(answer.logits, expected.logits)


# ---------------------------------------------------------------- images


def test_a_file_in_any_form(session: Session, turned: Path) -> None:
    decoded = load_image(turned, COLOUR)[None]
    expected = session.predict(decoded)
    content = turned.read_bytes()
    for form in (str(turned), turned, content, bytearray(content), memoryview(content), Image.open(turned)):
        answer = session.predict(form)
        assert same(answer, expected)
        assert answer.thumbnails is not None
        assert np.array_equal(answer.thumbnails, decoded)
        assert list(answer.files) == [str(turned) if isinstance(form, str | Path) else ""]


def test_an_opened_image_stays_as_it_is(session: Session, turned: Path) -> None:
    image = Image.open(turned)
    session.predict(image)
    assert image.size == (20, 30)
    assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("shape", [(8, 8, 3), (30, 20, 3), (5, 4, 3), (30, 20, 4), (9, 9, 1), (9, 9)])
def test_an_array_is_answered_as_its_file(
    shape: tuple[int, ...], session: Session, gray: Session, tmp_path: Path
) -> None:
    image = pixels(*shape)
    Image.fromarray(image[:, :, 0] if shape[2:] == (1,) else image).save(tmp_path / "image.png")
    for some in (session, gray):
        expected = some.predict(tmp_path / "image.png")
        assert same(some.predict(image), expected)
        if len(shape) == 3:
            assert same(some.predict(image[None]), expected)


def test_a_list_of_anything(session: Session, turned: Path) -> None:
    batch = pixels(3, 8, 8, 3)
    mixed = [batch[0], turned, turned.read_bytes(), pixels(20, 9), batch[1:], Image.open(turned)]
    for several in (mixed, tuple(mixed)):
        answer = session.predict(several)
        assert answer.files == ["", str(turned), "", "", "", "", ""]
        assert answer.thumbnails is not None
        assert np.array_equal(answer.thumbnails[[0, 4, 5]], batch)
        assert np.array_equal(answer.thumbnails[1], load_image(turned, COLOUR))
        assert same(answer, session.predict(answer.thumbnails))
    assert session.predict([]).labels.shape == (0,)
    assert session.predict(pixels(0, 4, 9, 3)).labels.shape == (0,)


def test_limits_hold_for_any_form(session: Session, turned: Path) -> None:
    with user_error("no profile at"):
        session.predict(turned, deadline_ms=1)
    answer = session.predict([turned, turned], operating_point="no-exit", max_exit=1)
    assert answer.exits.tolist() == [1, 1]
    assert answer.capped
    with user_error("no operating point 'fast'"):
        session.predict(turned, operating_point="fast")


def test_a_batch_that_fits_is_not_looked_at(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(sessions, "read_images", refuse)
    batch = pixels(30, 8, 8, 3)
    given: list[Any] = []
    run = Session._answer

    def record(self: Session, images: NDArray[np.uint8], *rest: Any) -> Prediction:
        given.append(images)
        return run(self, images, *rest)

    monkeypatch.setattr(Session, "_answer", record)
    answer = session.predict(batch)
    assert given[0] is batch
    assert (answer.files, answer.thumbnails) == ((), None)
    with pytest.raises(AssertionError, match="decoded"):
        session.predict(batch[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, r"the image: expected uint8 images of shape \(N, 8, 8, 3\), got NoneType: give such an array"),
        (7, "got int: "),
        ({"image": 1}, "got dict: "),
        ([b"", None], r"image 0 of the list \(from 0\) is not a readable image"),
        ([pixels(8, 8, 3), None], r"image 1 of the list \(from 0\): expected uint8 images .* got NoneType"),
        ([[1, 2], [3]], r"got int64 of shape \(2,\)"),
        ([[[1, 2], [3]]], r"got list \(.*inhomogeneous"),
        (np.zeros((2, 8, 8, 3)), r"got float64 of shape \(2, 8, 8, 3\)"),
        (pixels(2, 3, 8, 8), r"got uint8 of shape \(2, 3, 8, 8\).* channels \(1, 3 or 4\) last"),
        (pixels(2, 8, 8), r"got uint8 of shape \(2, 8, 8\)"),
        (pixels(2, 9, 9, 2), r"got uint8 of shape \(2, 9, 9, 2\)"),
        (pixels(1, 2, 8, 8, 3), r"got uint8 of shape \(1, 2, 8, 8, 3\)"),
        (pixels(2, 0, 8, 3), r"got uint8 of shape \(2, 0, 8, 3\)"),
        ("missing.png", "missing.png cannot be read: No such file"),
        ("two\0parts.png", r"two\\x00parts.png cannot be read: .*embedded null"),
        (b"GIF89a and no more", "the image is not a readable image"),
        (Image.new("F", (8, 8)), "the image has pixels of mode 'F', expected gray or RGB"),
    ],
)
def test_what_is_no_image(wrong: Any, message: str, session: Session) -> None:
    with user_error(message):
        session.predict(wrong)


def test_a_folder_is_no_image(session: Session, tmp_path: Path) -> None:
    with user_error(f"{tmp_path} is a folder: give the image files in it, or use `erde predict`"):
        session.predict(tmp_path)


# ---------------------------------------------------------------- names and probabilities


def by_pixels(tmp_path: Path) -> tuple[Session, NDArray[np.uint8], Prediction]:
    """A session whose logits are known, 40 images, and their answer."""
    some = Session(pixel_bundle(tmp_path / "bundle"), threads=1)
    images = pixels(40, *some.manifest.input_shape)
    images[:, :, -1] = 0
    return some, images, some.predict(images)


def test_names_and_the_likeliest_classes(tmp_path: Path) -> None:
    some, images, answer = by_pixels(tmp_path)
    logits = pixel_logits(images)[answer.exits, np.arange(40)].astype(float)
    temperatures = np.array(some.manifest.temperatures)[answer.exits]
    expected = scipy.special.softmax(logits / temperatures[:, None], axis=1)
    assert answer.names == [some.classes[label] for label in answer.labels]
    for count in (1, 3, 99):
        for row, probabilities, label in zip(answer.top(count), expected, answer.labels, strict=True):
            named = dict(zip(some.classes, probabilities, strict=True))
            assert len(row) == min(count, 4)
            assert row[0][0] == some.classes[label]
            assert [probability for _, probability in row] == pytest.approx(
                sorted(named.values(), reverse=True)[:count]
            )
            assert all(probability == pytest.approx(named[name]) for name, probability in row)
    with user_error("count is 0, expected 1 or more"):
        answer.top(0)


def test_the_likeliest_class_is_the_label_where_probabilities_round_to_the_same(tmp_path: Path) -> None:
    _, _, answer = by_pixels(tmp_path)
    logits = np.array([[0.0, 800.0, 1e-300, 800.0]])
    tied = Prediction(**{**vars(answer), "logits": logits, "labels": np.array([1]), "exits": np.array([0])})
    assert [name for name, _ in tied.top()[0]] == ["class 1", "class 3", "class 2", "class 0"]


# ---------------------------------------------------------------- for people


def test_an_answer_in_print(session: Session, turned: Path) -> None:
    answer = session.predict([turned, pixels(9, 9)], operating_point="no-exit")
    (first, *others), second = answer.top(3)[0], answer.top(3)[1]
    lines = str(answer).splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["image", "class", "probability", "exit", "next"]
    # The end of a long path.
    assert str(turned).endswith(lines[1].split()[0].removeprefix("..."))
    assert f"  {first[0]}  " in lines[1]
    assert f" {first[1]:.1%}     2  {others[0][0]} {others[0][1]:.1%}, {others[1][0]} " in lines[1]
    assert lines[2].startswith("1  ")
    assert f" {second[0][1]:.1%}     2  " in lines[2]
    assert (
        lines[3]
        == "2 images at operating point no-exit: 0 / 0 / 2 left at exits 0 / 1 / 2, 300 MACs an image"
    )
    image = pixels(1, 8, 8, 3)
    limited = str(session.predict(image, operating_point="no-exit", max_exit=0)).splitlines()[-1]
    assert limited == (
        "1 image at operating point no-exit: 1 / 0 / 0 left at exits 0 / 1 / 2, 100 MACs an image; "
        "not certified"
    )
    assert "at thresholds of your own: " in str(session.predict(image, thresholds=[0.5, 0.5]))
    assert str(session.predict([])) == "no images"


def test_many_images_are_not_all_printed(session: Session) -> None:
    answer = session.predict(pixels(1020, 8, 8, 3))
    lines = str(answer).splitlines()
    assert len(lines) == 23
    assert lines[-2] == "... and 1,000 more"
    assert answer._repr_html_().count("<tr>") == 21


class Page(html.parser.HTMLParser):
    """Tags, their attributes and the text of a piece of HTML; every tag has to be closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_an_answer_in_a_notebook(session: Session, turned: Path) -> None:
    answer = session.predict([turned, pixels(300, 200)])
    page = Page(answer._repr_html_())
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert answer.thumbnails is not None
    for source, expected in zip(sources, answer.thumbnails, strict=True):
        kind, _, content = str(source).partition(",")
        assert kind == "data:image/png;base64"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), expected)
    # Nothing from elsewhere, and nothing that runs.
    assert {tag for tag, _ in page.tags} <= {
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "img",
        "br",
        "b",
        "p",
    }
    assert {name for _, attributes in page.tags for name in attributes} == {"alt", "width", "style", "src"}
    for name, probability in (row[0] for row in answer.top(1)):
        assert f"{name}{probability:.1%}" in page.text
    assert page.text.endswith(str(answer).splitlines()[-1])
    # Of a batch the images are not kept.
    assert "<img" not in session.predict(pixels(2, 8, 8, 3))._repr_html_()
    assert Page(session.predict([])._repr_html_()).text == "no images"


def test_large_images_are_small_in_a_notebook(session: Session) -> None:
    answer = session.predict([pixels(9, 9, 3)])
    large = Prediction(**{**vars(answer), "thumbnails": pixels(1, 400, 200, 1)})
    (_, attributes) = next(tag for tag in Page(large._repr_html_()).tags if tag[0] == "img")
    content = base64.b64decode(str(attributes["src"]).partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (48, 96)


def test_names_of_others_are_only_text(tmp_path: Path) -> None:
    _, _, answer = by_pixels(tmp_path)
    evil = "<script>alert('&')</script>\x1b[2J\n"
    shown = Prediction(
        **{**vars(answer), "classes": [evil] * 4, "files": [evil] * 40, "operating_point": evil}
    )
    page = Page(shown._repr_html_())
    assert "script" not in {tag for tag, _ in page.tags}
    assert printable(evil) in page.text
    assert all(line.isprintable() for line in str(shown).splitlines())
    assert len(str(shown).splitlines()) == 23
    long = Prediction(**{**vars(answer), "classes": ["x" * 999] * 4, "files": ["y" * 999] * 40})
    assert max(map(len, str(long).splitlines())) < 300
