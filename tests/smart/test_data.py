from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from smart.data import ImageData, augment, batches, load_data, stratified_split


def write_image(path, size=(6, 5), mode="RGB", value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def make_folder(root, per_class=5, **options):
    for name in ("cat", "dog"):
        for i in range(per_class):
            write_image(root / "train" / name / f"{i}.png", **options)
    return root


def test_digits_are_split_by_class_and_by_seed():
    data = load_data("digits")
    sizes = [len(getattr(data, split)[1]) for split in ("train", "val", "test")]
    assert sum(sizes) == 1797 and abs(sizes[2] - 0.2 * 1797) < 10 and abs(sizes[1] - 0.1 * 1797) < 10
    assert data.image_shape == (1, 8, 8) and data.num_classes == 10
    for split in ("train", "val", "test"):
        images, labels = getattr(data, split)
        assert labels.bincount().min() / len(labels) > 0.08
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() == 1
    assert data.mean == pytest.approx([float(data.train[0].mean())], rel=1e-5)
    assert data.std == pytest.approx([float(data.train[0].std())], rel=1e-3)
    again, other = load_data("digits"), load_data("digits", seed=1)
    assert torch.equal(again.test[0], data.test[0])
    assert other.test[0].shape != data.test[0].shape or not torch.equal(other.test[0], data.test[0])


def test_splits_do_not_overlap_and_lose_nothing():
    images = torch.arange(60).reshape(60, 1, 1, 1).float()
    labels = torch.arange(60) % 3
    (rest, rest_labels), (away, away_labels) = stratified_split(images, labels, 0.25, torch.Generator().manual_seed(0))
    assert sorted([*rest.flatten().tolist(), *away.flatten().tolist()]) == list(range(60))
    assert away_labels.bincount().tolist() == [5, 5, 5]
    assert torch.equal(rest.flatten().long() % 3, rest_labels)


def test_folder_of_colour_images(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "test" / "dog" / "a.jpg")
    data = load_data(tmp_path)
    assert data.class_names == ["cat", "dog"] and data.image_shape == (3, 5, 6)
    assert data.test[1].tolist() == [1] and len(data.val[1]) == 2 and len(data.train[1]) == 8
    assert data.train[0][0, :, 0, 0].tolist() == [128, 0, 255]


def test_folder_of_grey_images_has_one_channel(tmp_path):
    assert load_data(make_folder(tmp_path, mode="L")).image_shape == (1, 5, 6)
    write_image(tmp_path / "train" / "dog" / "colour.png")
    assert load_data(tmp_path).image_shape == (3, 5, 6)


def test_folder_of_deep_images_is_refused(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(tmp_path / "train" / "dog" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png .* more than 8 bits"):
        load_data(tmp_path)


def test_folder_of_mixed_sizes_needs_a_size(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "train" / "dog" / "large.png", size=(9, 9))
    with pytest.raises(ValueError, match="image_size"):
        load_data(tmp_path)
    assert load_data(tmp_path, image_size=(4, 7)).image_shape == (3, 4, 7)
    assert load_data(tmp_path, image_size=4).image_shape == (3, 4, 4)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data"):
        load_data(tmp_path / "missing")
    with pytest.raises(ValueError, match="no folder 'train'"):
        load_data(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        load_data(tmp_path)
    make_folder(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match="eel holds no images"):
        load_data(tmp_path)
    write_image(tmp_path / "train" / "eel" / "one.png")
    with pytest.raises(ValueError, match="class 2 has 1 images"):
        load_data(tmp_path)
    (tmp_path / "train" / "eel" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        load_data(tmp_path)
    (tmp_path / "train" / "eel" / "broken.png").unlink()
    write_image(tmp_path / "test" / "fox" / "one.png")
    with pytest.raises(ValueError, match="fox is a class"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("shape", "expected"), [((20, 5, 4), (1, 5, 4)), ((20, 5, 4, 3), (3, 5, 4)), ((20, 3, 5, 4), (3, 5, 4))]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_npz_layouts(tmp_path, shape, expected, dtype):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    if dtype is np.float64:
        images /= 255
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(20) % 2, test_images=images[:3], test_labels=[0, 1, 1])
    data = load_data(tmp_path / "d.npz", val_fraction=0.2)
    assert data.image_shape == expected and len(data.test[1]) == 3 and len(data.val[1]) == 4
    assert 0.9 < float(data.floats("train").max()) <= 1 and (data.train[0].dtype == torch.uint8) == (dtype is np.uint8)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 2, 2))}, "'labels'"),
        ({"images": np.zeros((4, 2)), "labels": np.zeros(4, int)}, "shape"),
        ({"images": np.zeros((4, 2, 2), int), "labels": np.zeros(4, int)}, "uint8"),
        ({"images": np.full((4, 2, 2), 255.0), "labels": np.zeros(4, int)}, "outside"),
        ({"images": np.zeros((4, 2, 2)), "labels": np.zeros(4)}, "integers"),
        ({"images": np.zeros((4, 2, 2)), "labels": np.array([0, 1, -1, 0])}, "labels from -1"),
        ({"images": np.zeros((4, 2, 2)), "labels": np.zeros(3, int)}, "one label per image"),
        ({"images": np.zeros((0, 2, 2)), "labels": np.zeros(0, int)}, "no images"),
        ({"images": np.array([None]), "labels": np.zeros(1, int)}, "plain arrays"),
    ],
)
def test_npz_errors(tmp_path, arrays, words):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        load_data(tmp_path / "d.npz")


def test_damaged_npz(tmp_path):
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="readable"):
        load_data(tmp_path / "d.npz")


def test_image_data_checks_labels(data):
    images, labels = data.train
    with pytest.raises(ValueError, match="labels from 0 to 2: with 2 classes"):
        ImageData("d", ["a", "b"], (images, labels), data.val, data.test)
    with pytest.raises(ValueError, match="must be alike"):
        ImageData("d", ["a", "b", "c"], (images, labels), (images[..., :4], labels), data.test)


def test_fractions_are_checked():
    with pytest.raises(ValueError, match="val_fraction"):
        load_data("digits", val_fraction=1.0)


def test_batches_cover_each_image_once_and_repeat_by_seed():
    images = torch.arange(10).reshape(10, 1, 1, 1).float()
    labels = torch.arange(10)

    def epoch(seed):
        return list(batches(images, labels, 3, torch.Generator().manual_seed(seed)))

    first = epoch(0)
    assert [len(y) for _, y in first] == [3, 3, 3]
    seen = torch.cat([y for _, y in first])
    assert len(seen.unique()) == 9 and torch.equal(torch.cat([x for x, _ in first]).flatten().long(), seen)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, epoch(0), strict=True))
    assert not torch.equal(seen, torch.cat([y for _, y in epoch(1)]))
    assert [len(y) for _, y in batches(images, labels, 64)] == [10]


def test_augmentation_shifts_and_mirrors():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 1] = 1
    out = augment(image.expand(400, 1, 5, 5), torch.Generator().manual_seed(0), 1, True)
    assert out.shape == (400, 1, 5, 5) and (out.sum((1, 2, 3)) == 1).all()
    places = {tuple(place) for place in torch.nonzero(out[:, 0])[:, 1:].tolist()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2, 3, 4)}
    assert torch.equal(augment(image, None, 0, False), image)


def test_bytes_train_as_floats_do(data):
    """The same statistics and the same batches, from a quarter of the memory."""
    as_bytes = [((images * 255).round().to(torch.uint8), labels) for images, labels in (data.train, data.val)]
    as_float = [(images.float() / 255, labels) for images, labels in as_bytes]
    small, large = (ImageData("d", data.class_names, *splits, splits[1]) for splits in (as_bytes, as_float))
    assert small.mean == pytest.approx(large.mean, rel=1e-6) and small.std == pytest.approx(large.std, rel=1e-6)
    for (x, y), (x_float, y_float) in zip(
        *(batches(*d.train, 8, torch.Generator().manual_seed(0), 2, True) for d in (small, large)), strict=True
    ):
        assert x.dtype == torch.float32 and torch.equal(x, x_float) and torch.equal(y, y_float)
    assert torch.equal(small.floats("val", 3), large.val[0][:3])


def test_statistics_of_bytes_need_no_copy_of_them_all():
    images = torch.randint(0, 256, (3000, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 2] = 7
    labels = torch.arange(3000) % 2
    found = ImageData("d", ["a", "b"], (images, labels), (images, labels), (images, labels))
    expected = (images.double() / 255).transpose(0, 1).flatten(1)
    assert found.mean == pytest.approx(expected.mean(1).tolist(), rel=1e-12)
    assert found.std[:2] == pytest.approx(expected[:2].std(1, correction=0).tolist(), rel=1e-12)
    assert found.std[2] == 1.0 or found.std[2] < 1e-12
