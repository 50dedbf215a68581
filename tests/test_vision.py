"""Images: read safely, preprocessed as CLIP does, and errors that say what is wrong."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from sp_fast.errors import ImageError
from sp_fast.vision import MAX_PIXELS, VisionTower, clip_tower, load_image, patch_features, sample_photograph

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "projection_dim": 8}  # fmt: skip


def tiny_tower():
    return VisionTower(CLIPVisionModel(CLIPVisionConfig(**TINY)).eval(), "tiny")


def png_that_claims(path, width, height):
    """A few hundred bytes that would decode to width x height pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_the_sample_photograph_is_there():
    image = load_image(sample_photograph())
    assert image.mode == "RGB"
    assert image.size == (512, 600)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "image.tiff")
    assert load_image(tmp_path / "image.tiff").mode == "RGB"


def test_unreadable_images(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImageError, match="is none of PNG, JPEG"):
        load_image(tmp_path / "text.png")
    photograph = sample_photograph().read_bytes()
    (tmp_path / "cut.jpg").write_bytes(photograph[: len(photograph) // 2])
    with pytest.raises(ImageError, match=r"cut\.jpg cannot be read.*truncated"):
        load_image(tmp_path / "cut.jpg")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match="is none of"):
        load_image(tmp_path / "empty.png")


@pytest.mark.parametrize("side", [8001, 30_000])
def test_enormous_images_are_refused_before_decoding(tmp_path, side):
    path = tmp_path / "bomb.png"
    png_that_claims(path, side, side)
    assert path.stat().st_size < 500
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=f"bomb.png.*({side}x{side} pixels, more than 64,000,000|bomb)"):
        load_image(path)


def test_more_than_8_bits_are_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ImageError, match="more than 8 bits"):
        load_image(tmp_path / "deep.png")


def test_other_formats_are_not_even_tried(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "page.eps")
    with pytest.raises(ImageError, match="is none of PNG"):
        load_image(tmp_path / "page.eps")


def test_thin_images_are_refused_before_they_are_resized():
    with pytest.raises(ImageError, match="1x200000 pixels is too thin"):
        patch_features(tiny_tower(), [Image.new("RGB", (1, 200_000))])


def test_one_can_train_on_the_features():
    features = patch_features(tiny_tower(), [Image.new("RGB", (28, 28))])
    layer = torch.nn.Linear(16, 1)
    layer(features).sum().backward()
    assert layer.weight.grad is not None


def test_features_are_the_penultimate_layer_without_cls():
    tower = tiny_tower()
    array = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    features = patch_features(tower, [Image.fromarray(array)] * 2)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(array) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        hidden = tower.model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert features.shape == (2, 4, 16)
    torch.testing.assert_close(features[0], hidden[-2][0, 1:], rtol=1e-4, atol=1e-4)


def test_towers_from_folders(tmp_path):
    tower = tiny_tower()
    tower.model.save_pretrained(tmp_path)
    again = clip_tower(tmp_path)
    image = [load_image(sample_photograph())]
    torch.testing.assert_close(patch_features(again, image), patch_features(tower, image))
    with pytest.raises(ImageError, match="is no folder"):
        clip_tower(tmp_path / "none")
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model", "hidden_size": "wide"}')
    with pytest.raises(ImageError, match="cannot be loaded"):
        clip_tower(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="cannot be loaded"):
        clip_tower(tmp_path / "empty")


def test_towers_that_lack_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_tower().model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop(next(k for k in state if "layers.1.mlp.fc1.weight" in k))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ImageError, match=r"lacks .*fc1\.weight"):
        clip_tower(tmp_path)


def test_random_towers_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tower = clip_tower(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert "random weights (seed 1)" in tower.origin
    assert tower.model.config.hidden_size == 1024
