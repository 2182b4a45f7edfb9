"""Copies: what counts as one, on which side of a cut they go, and how they are counted."""

import numpy as np
import pytest
from images_support import InMemory, picture

from pspinal_jax.data.dataset import (
    ArraySplit,
    array_dataset,
    copies_of_a_class,
    digest_bytes,
    digest_rows,
    draw_by_class,
    draw_together,
    hold_out,
    split_by_class,
)
from pspinal_jax.data.folder import read_folder
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.errors import DataError

DOUBLED = np.tile(np.arange(20), 2)


def test_digests_of_rows_are_equal_where_the_numbers_are():
    rows = np.random.default_rng(0).normal(size=(50, 5))
    digests = digest_rows(rows)
    assert digests.dtype == np.uint64 and len(set(digests.tolist())) == 50
    np.testing.assert_array_equal(digest_rows(np.asfortranarray(rows, np.float32)), digests)
    np.testing.assert_array_equal(digest_rows(rows[::-1]), digests[::-1])
    assert len(set(digest_rows(np.array([[0.0, 1], [-0.0, 1], [1, 0]])).tolist())) == 2
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), np.uint8)
    assert len(set(digest_rows(np.concatenate([images, images])).tolist())) == 9
    assert digest_rows(rows[:0]).shape == (0,)


def test_copies_of_a_class_have_one_label():
    groups = copies_of_a_class(np.array([7, 7, 8, 8, 9], np.uint64), np.array([0, 0, 0, 1, 1]))
    assert groups[0] == groups[1] >= 0 and len(set(groups.tolist())) == 4
    assert (groups < 0).tolist() == [False, False, True, True, False]


def test_draw_together_takes_the_first_where_there_are_no_copies():
    order = np.random.default_rng(0).permutation(30)
    for groups in (None, np.arange(30)):
        for exact in (True, False):
            np.testing.assert_array_equal(draw_together(order, 7, groups, exact), order[:7])


@pytest.mark.parametrize(
    ("groups", "count", "exact", "drawn"),
    [
        ([0, 0, 1, 1, 2, 2], 2, False, [0, 1]),
        ([0, 1, 2, 2, 0, 3], 3, False, [0, 4, 1]),
        ([0, 0, 1, 1, 2, 2], 3, False, [0, 1]),
        ([0, 0, 1, 1, 2, 2], 1, False, [0, 1]),
        ([0, 0, 1, 1, 1, 1], 3, False, [0, 1]),
        ([0, 0, 0, 1, 2, 2], 2, False, [4, 5]),  # three and none of the others would not be two
        ([0, 0, 0, 1, 1, 1], 1, False, [0]),
        ([0, 0, 0, 0, 0, 0], 2, False, [0, 1]),
        ([0, 0, 1, 1, 2, 2], 3, True, [0, 1, 2]),
        ([0, 0, 0, 1, 2, 2], 3, True, [0, 1, 2]),
        ([0, 0, 0, 0, 0, 0], 2, True, [0, 1]),
    ],
)
def test_draw_together_keeps_copies_whole(groups, count, exact, drawn):
    assert draw_together(np.arange(6), count, np.array(groups), exact).tolist() == drawn


def test_draw_together_draws_as_many_in_every_order():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), rng.integers(1, 5, 12))
    for count in range(1, 12):
        drawn = [draw_together(rng.permutation(len(groups)), count, groups) for _ in range(20)]
        assert {len(each) for each in drawn} == {count}
        assert all(not sides(groups, np.setdiff1d(np.arange(len(groups)), each), each) for each in drawn)
        assert len({tuple(sorted(each)) for each in drawn}) > 1


def sides(copies, train, validation):
    return set(copies[train].tolist()) & set(copies[validation].tolist())


def test_hold_out_keeps_copies_on_one_side_and_its_number():
    train, validation = hold_out(40, 10, 3, DOUBLED)
    assert len(validation) == 10 and not sides(DOUBLED, train, validation)
    assert sides(DOUBLED, *hold_out(40, 10, 3))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), np.arange(40))
    np.testing.assert_array_equal(hold_out(40, 10, 3, np.arange(40))[1], hold_out(40, 10, 3)[1])


def test_split_by_class_keeps_copies_on_one_side():
    labels = DOUBLED % 2
    rest, drawn = split_by_class(labels, 0.2, 1, DOUBLED)
    assert np.bincount(labels[drawn]).tolist() == [4, 4] and not sides(DOUBLED, rest, drawn)
    assert sides(DOUBLED, *split_by_class(labels, 0.2, 1))
    np.testing.assert_array_equal(split_by_class(labels, 0.2, 1, np.arange(40))[1], split_by_class(labels, 0.2, 1)[1])
    rest, drawn = draw_by_class(labels, lambda _: 3, 1, DOUBLED)
    assert len(drawn) == 4 and not sides(DOUBLED, rest, drawn)


def folder(place, doubled):
    """Three classes of ten pictures, with `doubled` each of them a second time, all of them at `place`/set."""
    for number in range(30):
        file = place / "set" / "abc"[number // 10] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
        if doubled:
            file.with_name(f"{number} (copy).png").write_bytes(picture(number))
    return place / "set"


def cut(path, fraction=0.25, together=True):
    options = {"image_size": 8, "test_fraction": fraction, "split_seed": 0, "strict": False}
    data = read_folder(path, **options, keep_copies_together=together)
    return data.with_validation(fraction, 0, together)


def test_a_folder_is_cut_with_copies_on_one_side(tmp_path):
    path = folder(tmp_path, doubled=True)
    data = cut(path)
    held = [set(data.splits[name].digests.tolist()) for name in ("train", "validation", "test")]
    assert [len(each) for each in held] == [len(data.splits[n]) // 2 for n in ("train", "validation", "test")]
    assert len(set.union(*held)) == sum(map(len, held)) == 30
    apart = cut(path, together=False)
    assert set(apart.train.digests.tolist()) & set(apart.test.digests.tolist())
    assert data.uncut is not None and len(data.uncut) == 60


def test_a_folder_without_copies_is_cut_as_it_always_was(tmp_path):
    path = folder(tmp_path, doubled=False)
    assert cut(path).fingerprint() == cut(path, together=False).fingerprint()
    np.testing.assert_array_equal(cut(path).test.encoded.indices, [4, 6, 11, 19, 22, 28])


def test_a_folder_too_small_to_be_cut_is_read_where_no_test_is_needed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(ord(name)))
    with pytest.raises(DataError, match=r"too few images to test on 0.25 of each class"):
        cut(tmp_path)
    options = {"image_size": 8, "test_fraction": 0.25, "split_seed": 0, "strict": False}
    data = read_folder(tmp_path, **options, needs_test=False)
    assert len(data.test) == 0 and len(data.uncut) == 2


def test_digests_of_images_are_those_of_their_bytes(tmp_path):
    path = folder(tmp_path, doubled=False)
    split = cut(path).train.join(cut(path).test)
    expected = [digest_bytes(split.encoded[index]) for index in range(len(split))]
    assert split.digests.tolist() == expected
    assert (
        ImageSplit(InMemory([split.encoded[index] for index in range(3)]), np.zeros(3)).digests.tolist() == expected[:3]
    )


def test_find_copies_counts_and_names_what_is_on_both_sides():
    rows = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    splits = {
        "train": ArraySplit(rows[:6], np.array([0, 1] * 3)),
        "validation": ArraySplit(rows[[6, 1]], np.array([0, 1])),
        "test": ArraySplit(rows[[8, 6, 0, 2]], np.array([0, 0, 0, 1])),
    }
    contents = array_dataset(splits, ("a", "b"), "small").contents()
    counts, text = contents.find_copies(np.arange(6), np.arange(6, 8), np.arange(8, 12))
    assert counts == {"test_in_train": 3, "validation_in_train": 1, "in_several_classes": 2}
    assert "3 of 4 test examples are also in train, identical: test row 1, test row 2, test row 3;" in text
    assert "1 of 2 validation examples are also in train: validation row 1;" in text
    assert text.endswith("2 examples have identical copies in another class: train row 2, test row 3")
    alone = array_dataset(
        {"train": splits["train"], "test": ArraySplit(rows[8:], np.zeros(4, int))}, ("a", "b"), "small"
    )
    assert alone.contents().find_copies(np.arange(6), np.arange(0), np.arange(6, 10))[1] == ""
