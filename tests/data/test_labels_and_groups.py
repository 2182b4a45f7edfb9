"""Labels from a table, groups that lie on one side of a cut, and images that look alike."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from pspinal_jax.data import near
from pspinal_jax.data.dataset import joined_groups, split_by_class
from pspinal_jax.data.folder import read_folder
from pspinal_jax.data.load import load_data
from pspinal_jax.errors import DataError, UsageError
from pspinal_jax.recipes import DataConfig, load_recipe
from pspinal_jax.recipes.rules import check_settings


def textured(seed, side=48):
    """A picture of its own."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """24 pictures pNUMBER_SHOT.png in one folder: eight animals, three shots of each."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(24):
        textured(number).save(root / f"p{number // 3}_{number % 3}.png")
    return root


def write_table(folder, header, rows):
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return path


def read(path, **options):
    return read_folder(path, **({"image_size": 8, "test_fraction": 0.25, "split_seed": 0, "strict": False} | options))


def files(split):
    return [split.name(index).rpartition("/")[2] for index in range(len(split))]


def listed(count=24):
    return [f"p{n // 3}_{n % 3}.png,{'cat' if n < 12 else 'dog'}" for n in range(count)]


def test_labels_from_a_table(folder):
    table = write_table(folder, "path,label", listed())
    data = read(folder, labels=table)
    assert data.class_names == ("cat", "dog") and len(data.train) == 18 and len(data.test) == 6
    by_file = dict(zip(files(data.train), data.train.labels, strict=True))
    assert all(label == (int(name[1]) >= 4) for name, label in by_file.items())
    config = DataConfig("folder", labels=table, image_size=8, test_fraction=0.25)
    assert load_data(config).fingerprint() == data.fingerprint()  # the table's own folder without data.path


def test_labels_with_splits_and_what_the_table_leaves_out(folder, capsys):
    rows = [f"{line},{('train', 'Valid', 'TEST')[n % 3]}" for n, line in enumerate(listed(21))]
    data = read(folder, labels=write_table(folder, "path,label,split", [*rows, "gone.png,cat,train"]))
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [7, 7, 7]
    assert {name[3] for name in files(data.test)} == {"2"}
    assert data.skipped == ("gone.png",) and "left out 3 pictures that" in data.passed_over[0]
    assert "1 images cannot be decoded: gone.png (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path,label", ["p0_0.png,cat", "p0_0.png,dog"], "line 3 gives p0_0.png another label .* one label an image"),
        ("path,label", ["p0_0.png,cat;dog"], "line 2 gives p0_0.png the label 'cat;dog'; one label an image"),
        ("path,label", ['p0_0.png,"cat,dog"', "p0_1.png,cat", "p0_2.png,dog"], "line 2 gives .* one label an image"),
        ("path,cat,dog", ["p0_0.png,1,1"], "has the columns path, cat, dog, expected path and label"),
        ("path,label", ["p0_0.png,"], "line 2 lacks a label"),
        ("path,label", [",cat"], "line 2 lacks a path"),
        ("path,label,split", ["p0_0.png,cat,dev"], "line 2 lacks a split"),
        ("path,label,split", ["p0_0.png,cat,train"], "has images of train, expected train and test"),
        ("path,label", ["p0_0.png,cat,1"], "cannot be read as a table of labels"),
        ("path,label", ["p0_0.png,cat"], "has 1 labels .cat., expected two or more"),
    ],
)
def test_table_of_labels_is_refused_with_one_line(folder, header, rows, message):
    with pytest.raises(DataError, match=message) as error:
        read(folder, labels=write_table(folder, header, rows))
    assert "\n" not in str(error.value)


def test_label_with_a_comma_is_one_label(folder):
    rows = ['p0_0.png,"cat, wild"', 'p0_1.png,"cat, wild"', *(f"p1_{n}.png,dog" for n in range(3))]
    assert read(folder, labels=write_table(folder, "path,label", rows)).class_names == ("cat, wild", "dog")


@pytest.mark.parametrize("group", [r"p(\d)_", r"^[^_]*", None])
def test_group_lies_on_one_side(folder, group):
    column = [f"{line},animal {n // 3}" if group is None else line for n, line in enumerate(listed())]
    table = write_table(folder, "path,label,group" if group is None else "path,label", column)
    data = read(folder, labels=table, group=group)
    data = data.with_validation(0.4, 0)
    sides = [{name[1] for name in files(data.splits[split])} for split in ("train", "validation", "test")]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 8
    assert len(data.test) == 6  # one animal of each class


def test_groups_that_cannot_be_are_refused(folder):
    table = write_table(folder, "path,label", listed())
    with pytest.raises(UsageError, match=r"data.group is 'q', which matches none of 24 paths, such as p0_0.png"):
        read(folder, labels=table, group="q")
    with pytest.raises(UsageError, match=r"data.group is '\(', expected near or a regular expression"):
        read(folder, labels=table, group="(")
    table = write_table(folder, "path,label,group", [f"{line},1" for line in listed()])
    with pytest.raises(UsageError, match="expected None where the table of labels has a column group"):
        read(folder, labels=table, group="p")
    with pytest.raises(UsageError, match=r"data.group is p, expected None without data.image_size"):
        digits = load_recipe("digits")
        check_settings(dataclasses.replace(digits, data=dataclasses.replace(digits.data, group="p")))


def test_groups_may_span_classes_and_no_class_loses_all():
    labels = np.repeat([0, 1, 2], 40)
    groups = np.tile(np.arange(40), 3) // 2  # 20 groups with two examples of each class
    rest, drawn = split_by_class(labels, 0.2, 0, groups=groups)
    assert not set(groups[rest]) & set(groups[drawn]) and np.bincount(labels[drawn]).tolist() == [8, 8, 8]
    assert not len(split_by_class(labels, 0.5, 0, groups=np.zeros(120, int))[1])
    other = split_by_class(labels, 0.2, 1, groups=groups)[1]
    assert set(groups[other]) != set(groups[drawn])


def test_joined_groups_connect_over_others():
    found = joined_groups(np.array([0, 0, 1, 2, 3]), np.array([5, 6, 6, 7, 8]), pairs=np.array([[3, 4]]))
    assert len({*found[:3]}) == 1 and found[3] == found[4] != found[0]


@pytest.fixture
def copied(tmp_path):
    """Two classes of 12 pictures, of which some are copies of others in another form."""
    changed = {
        "smaller": lambda image: image.resize((36, 36)),
        "grey": lambda image: image.convert("L"),
        "worse": lambda image: Image.open(_jpeg(image)),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }
    for label, first in (("a", 0), ("b", 100)):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(12):
            textured(first + number).save(tmp_path / "set" / label / f"{number}.png")
        for number, (name, change) in enumerate(changed.items()):
            change(textured(first + number)).save(tmp_path / "set" / label / f"{name}.png")
    return tmp_path / "set"


def _jpeg(image):
    content = io.BytesIO()
    image.save(content, "JPEG", quality=50)
    return content


def test_images_that_look_alike_are_found_and_counted(copied):
    data = read(copied)
    contents = data.contents()
    names = [
        tuple(sorted(contents.name(i).rpartition("/")[2] for i in pair)) for pair in contents.near_pairs().tolist()
    ]
    changed = [("0.png", "smaller.png"), ("1.png", "grey.png"), ("2.png", "worse.png"), ("3.png", "mirrored.png")]
    assert sorted(names) == sorted(changed * 2)
    train = np.arange(len(data.train))
    counts, text = contents.find_copies(train, train[:0], len(train) + np.arange(len(data.test)))
    assert counts["near_pairs"] == 8 and counts["test_near_train"] > 0
    assert f"{counts['test_near_train']} of {len(data.test)} test examples look like ones in train: test " in text


def test_group_near_keeps_them_on_one_side(copied):
    data = read(copied, group="near")
    contents = data.contents()
    sides = [[data.place(index)[0] for index in pair] for pair in contents.near_pairs().tolist()]
    assert len(sides) == 8 and all(one == other for one, other in sides) and len(data.test) > 4


def test_near_pairs_of_nothing_and_of_one_grey():
    assert len(near.find_pairs(near.as_array([]))[0]) == 0
    grey = near.look(np.full((32, 32, 3), 7, np.uint8))
    assert len(near.find_pairs(near.as_array([grey, grey]))[0]) == 0
    one = near.look(np.asarray(textured(0, 32)))
    pairs, cosines = near.find_pairs(near.as_array([one, grey, one]))
    assert pairs.tolist() == [[0, 2]] and cosines[0] == pytest.approx(1)
