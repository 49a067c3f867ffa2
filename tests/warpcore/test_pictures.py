"""Grids of pictures and PNG metadata."""

import numpy as np
import pytest

from warpcore import pictures

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
SIZES = [(40, 60), (64, 32), (16, 90)]


def flat(colour, size):
    return np.full((*size, 3), colour, np.uint8)


@pytest.mark.parametrize(
    "captions", [None, ["red", "", "blue, in a wide picture, with a caption that needs lines " * 9]]
)
def test_every_picture_stands_whole_in_the_grid(captions):
    grid = pictures.grid([flat(*pair) for pair in zip(COLOURS, SIZES, strict=True)], 2, captions)
    assert grid.dtype == np.uint8
    for colour, (height, width) in zip(COLOURS, SIZES, strict=True):
        rows, columns = np.nonzero((grid == colour).all(axis=2))
        assert len(rows) == height * width
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)


def test_captions_stand_under_their_pictures_and_inside_the_column():
    red, green = flat(COLOURS[0], (32, 64)), flat(COLOURS[1], (32, 64))
    plain, captioned = (
        pictures.grid([red, green], 2),
        pictures.grid([red, green], 2, ["", "W" * 500 + " " + "i " * 500]),
    )
    assert captioned.shape[1] == plain.shape[1]
    below = captioned[plain.shape[0] - pictures.MARGIN_PX :]
    ink = np.nonzero((below < 128).all(axis=2))[1]
    assert len(ink) > 50
    right = np.nonzero((captioned == COLOURS[1]).all(axis=2))[1]
    assert right.min() <= ink.min() <= ink.max() <= right.max()


def test_a_grid_tells_where_its_pictures_are_and_a_file_of_it_too(tmp_path):
    shown = [flat(*pair) for pair in zip(COLOURS, SIZES, strict=True)]
    captions = ["red", "", "\u202e<b>" + "long " * 99]
    grid, cells = pictures.grid_and_cells(shown, 2, captions)
    assert [cell.caption for cell in cells] == captions
    for cell, picture in zip(cells, shown, strict=True):
        assert np.array_equal(grid[cell.top :, cell.left :][: cell.height, : cell.width], picture)
    pictures.save_png(tmp_path / "grid.png", grid, pictures.cells_metadata(cells))
    assert pictures.read_cells(tmp_path / "grid.png") == cells
    pictures.save_png(tmp_path / "one.png", grid)
    assert pictures.read_cells(tmp_path / "one.png") is None


def test_wrong_pictures_are_refused():
    with pytest.raises(ValueError, match=r"uint8 pictures \(H, W, 3\), got float64"):
        pictures.grid([np.zeros((4, 4, 3))], 1)
    with pytest.raises(ValueError, match="1 pictures, 1 columns, 2 captions"):
        pictures.grid([flat(COLOURS[0], (4, 4))], 1, ["a", "b"])


def test_a_png_keeps_its_pixels_and_metadata(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    metadata = {"prompt": "ein Kätzchen 🐈\nauf zwei Zeilen", "seed": "3"}
    pictures.save_png(tmp_path / "samples" / "one.png", picture, metadata)
    assert pictures.read_metadata(tmp_path / "samples" / "one.png") == metadata
    from PIL import Image

    assert np.array_equal(np.array(Image.open(tmp_path / "samples" / "one.png")), picture)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["one.png"]
