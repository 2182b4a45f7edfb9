import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "augmentation_contact_sheet.py"))
main, sheet_rows = SCRIPT["main"], SCRIPT["sheet_rows"]


def test_it_writes_four_rows_of_images(digits, tmp_path):
    np.savez(tmp_path / "digits.npz", train_images=digits[:12, :, :, 0])
    main(["--data", str(tmp_path / "digits.npz"), "--out", str(tmp_path / "sheet.png"), "--count", "12"])
    assert (tmp_path / "sheet.png").stat().st_size < 150_000
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    # The last image of the first row stands enlarged in the upper right corner, within the gap around it.
    raw = pixels[4 : 4 + 28 * 3, -4 - 28 * 3 : -4]
    np.testing.assert_array_equal(raw, np.kron(digits[11, :, :, 0], np.ones((3, 3), np.uint8)))
    assert pixels.shape[0] == 4 + 4 * (28 * 3 + 4)


def test_the_rows_are_what_their_labels_say(digits):
    rows = sheet_rows(digits[:12], seed=0)
    assert list(rows) == ["raw", "perspective", "rotated", "both"]
    np.testing.assert_array_equal(rows["raw"], digits[:12])
    for one, other in [("raw", "perspective"), ("raw", "rotated"), ("perspective", "both"), ("rotated", "both")]:
        # A small angle may leave a digit as it is.
        assert (rows[one] != rows[other]).any((1, 2, 3)).sum() >= 8


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((12, 4, 4), np.uint8)}, "has no array 'train_images'; it has images"),
        ({"train_images": np.zeros((3, 4, 4), np.uint8)}, "must be 12 or more uint8 images"),
        ({"train_images": np.zeros((12, 4, 4))}, "got float64"),
        (None, "No such file"),
    ],
)
def test_a_file_without_images_is_named(arrays, message, tmp_path, capsys):
    path = tmp_path / "data.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(SystemExit):
        main(["--data", str(path), "--out", str(tmp_path / "sheet.png")])
    error = capsys.readouterr().err
    assert "data.npz" in error and message in error
    assert not (tmp_path / "sheet.png").exists()
