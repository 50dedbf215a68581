"""`sp-fast compress`: full to compact to an answer from the command line, the figures that it prints, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sp_fast import SPProjector
from sp_fast.cli import app
from sp_fast.compress.full import Full
from sp_fast.compress.job import Compression
from sp_fast.llava_sp.official_names import PROJECTOR
from sp_fast.tensor_files import stored_tensors
from tests import official, tiny
from tests.helpers import features_for, randomised

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole model, its projector alone and in the official layout, its tower, images, features."""
    root = tmp_path_factory.mktemp("compress")
    model = tiny.model_of()
    model.save_pretrained(root / "model")
    tiny.processor_of(model.config).save_pretrained(root / "model")
    projector = model.model.multi_modal_projector
    projector.save_pretrained(root / "projector")
    torch.save(official.projector(), root / "model.bin")
    model.model.vision_tower.save_pretrained(root / "tower")
    (root / "images").mkdir()
    for i in range(8):
        tiny.image(i).save(root / "images" / f"{i}.png")
    (root / "three").mkdir()
    for i in range(3):
        tiny.image(i).save(root / "three" / f"{i}.png")
    x = features_for(projector.config, 8)
    save_file({"features": x}, root / "features.safetensors")
    save_file({"features": x[:, :, :5].contiguous()}, root / "narrow.safetensors")
    save_file({"features": x[:, :49].contiguous()}, root / "small.safetensors")
    save_file({"a": x, "b": x.clone()}, root / "two.safetensors")
    small = randomised(SPProjector(type(projector.config)(**{**projector.config.to_dict(), "extractor": "depthwise"})))
    small.save_pretrained(root / "compact")
    projector.quantized("int8").save_pretrained(root / "quantised")
    SPProjector(type(projector.config).variant("mlp", vision_width=8, text_width=8, spatial_width=8)).save_pretrained(
        root / "mlp"
    )
    return root


def run(made, source, out, *words):
    # A word with a dot or of a folder's name is a path of the fixture.
    there = {path.name for path in made.iterdir()}
    words = [str(made / word) if word in there else word for word in map(str, words)]
    return CliRunner().invoke(app, ["compress", str(made / source), "--out", str(out), *words])


def reported(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def answers(folder, image):
    words = [
        "--model",
        str(folder),
        "--image",
        str(image),
        "--prompt",
        "what is it?",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    result = CliRunner().invoke(app, ["generate", *words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["text"]


def test_full_to_compact_to_an_answer(made, tmp_path):
    out, plot = tmp_path / "small", tmp_path / "plot.svg"
    words = ("--to", "bottleneck", "--rank", 8, "--images", "images", "--distill", 2, "--plot", plot, "--json")
    report = reported(run(made, "model", out, *words))
    assert report["features"] == f"8 images of {made / 'images'}"
    assert answers(out, made / "images" / "0.png")
    before, after = (stored_tensors(made / "model")[1], stored_tensors(out)[1])
    others = {name for name in before if not name.startswith(PROJECTOR)}
    assert others == {name for name in after if not name.startswith(PROJECTOR)}
    assert all(torch.equal(before[name].load(), after[name].load()) for name in others)
    card = (out / "README.md").read_text()
    assert card.splitlines()[0] == "# small"
    assert "## Compressed" in card
    assert "fitted" not in card
    size = sum(t.load().numel() * t.load().itemsize for name, t in after.items() if name.startswith(PROJECTOR))
    assert report["after"]["bytes"] == size == 4 * report["after"]["parameters"]
    assert [point["value"] for point in report["sweep"]] == [1, 2, 4, 8, 16]
    errors = {point["value"]: point["error"] for point in report["sweep"]}
    assert errors[16] < 1e-3 * errors[8] < errors[1]  # a rank as high as the features are wide loses nothing
    assert errors[8] == report["errors"][-1]["relative"]
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("words", "extractor", "scheme"),
    [
        (("--to", "separable", "--rank", 4), "separable", None),
        (("--to", "bottleneck", "--rank", 8, "--quantize", "int8"), "bottleneck", "int8"),
        (("--quantize", "int4"), "full", "int4"),
    ],
)
def test_the_errors_are_those_of_what_was_written(made, tmp_path, words, extractor, scheme):
    """Held out are the fourth and the eighth image; where nothing is fitted, all are."""
    result = run(made, "projector", tmp_path / "out", *words, "--features", "features.safetensors", "--json")
    report = reported(result)
    full, small = (SPProjector.from_pretrained(path) for path in (made / "projector", tmp_path / "out"))
    assert (small.config.extractor, small.config.quantization) == (extractor, scheme)
    assert small.config.to_dict() == report["config"]
    x = features_for(full.config, 8)[[3, 7] if extractor != "full" else slice(None)]
    with torch.no_grad():
        exact, found = full.intermediates(x), small.intermediates(x)
    count = full.config.spatial_tokens
    pairs = [*zip(found.z_small.unbind(1), exact.z_small.unbind(1), strict=True)]
    pairs += [(found.z_big[0], exact.z_big[0]), (found.tokens[:, :count], exact.tokens[:, :count])]
    for error, (a, b) in zip(report["errors"], pairs, strict=True):
        assert error["relative"] == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-3)
        assert error["of_variation"] == pytest.approx(float((a - b).norm() / (b - b.mean(0)).norm()), rel=1e-3)
    assert torch.equal(found.tokens[:, count:], exact.tokens[:, count:])
    stored = stored_tensors(tmp_path / "out")[1]
    assert report["after"]["bytes"] == sum(t.load().numel() * t.load().itemsize for t in stored.values())


def test_a_quantised_model_answers(made, tmp_path):
    report = reported(run(made, "model", tmp_path / "int8", "--quantize", "int8", "--json"))
    assert report["errors"][-1]["relative"] < 1e-2
    assert report["fitted_to"].startswith("nothing")
    assert "Nothing was fitted" in (tmp_path / "int8" / "README.md").read_text()
    assert answers(tmp_path / "int8", made / "images" / "0.png")


def test_quantising_alone_fits_nothing(made, tmp_path, monkeypatch):
    """All images judge, be they few, and no more of them are computed."""
    counts = []
    z = Full.z
    monkeypatch.setattr(Full, "z", lambda self, x: counts.append(len(x)) or z(self, x))
    result = run(made, "model", tmp_path / "out", "--quantize", "int8", "--images", "three")
    assert result.exit_code == 0, result.output
    assert counts == [3]
    assert "fitted to nothing, as weights are quantised" in result.stdout
    assert f"judged on all images of {made / 'three'}, 256 at most" in result.stdout
    assert "held" not in result.stdout.replace(str(tmp_path), "")
    save_file({"features": torch.zeros(0, 64, 16)}, tmp_path / "none.safetensors")
    result = run(made, "projector", tmp_path / "no", "--quantize", "int8", "--features", tmp_path / "none.safetensors")
    assert (result.exit_code, (tmp_path / "no").exists()) == (1, False)
    assert "has no images: give one at least" in result.stderr


def test_official_files_by_a_tower(made, tmp_path):
    """In their own type; the plan is the same before."""
    official.tower_folder(tmp_path / "tower")
    words = ("--to", "grouped", "--groups", 4, "--images", "images", "--vision-tower", tmp_path / "tower", "--json")
    plan = reported(run(made, "model.bin", tmp_path / "out", *words, "--dry-run"))
    assert not (tmp_path / "out").exists()
    report = reported(run(made, "model.bin", tmp_path / "out", *words))
    assert {name: report[name] for name in plan} == plan
    small = SPProjector.from_pretrained(tmp_path / "out")
    assert next(small.parameters()).dtype == torch.float16
    assert report["after"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert (
        small.expanded().official_state_dict().keys()
        == SPProjector.from_official(made / "model.bin").official_state_dict().keys()
    )


def test_the_tables(made, tmp_path):
    result = run(made, "projector", tmp_path / "out", "--to", "nested", "--rank", 4)
    assert result.exit_code == 0, result.output
    for text in ("to nested", "share", "the weights alone", "energy kept, shared by the levels", "at rank 4",
                 "8x8", "spatial tokens", "random features with a common mean", "written: "):  # fmt: skip
        assert text in result.stdout
    result = run(made, "projector", tmp_path / "out", "--to", "depthwise")
    assert result.exit_code == 1
    assert "is not empty" in result.stderr
    assert run(made, "projector", tmp_path / "out", "--to", "depthwise", "--force").exit_code == 0
    assert SPProjector.from_pretrained(tmp_path / "out").config.extractor == "depthwise"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


WRONG = {
    "nothing asked for": ("projector", (), "nothing is asked for: say --to bottleneck"),
    "the same kind": ("projector", ("--to", "full"), "--to full is what the source is already"),
    "no kind": ("projector", ("--to", "small"), "--to small is no compact extractor"),
    "no rank": ("projector", ("--to", "bottleneck"), "extractor='bottleneck' needs rank"),
    "rank": ("projector", ("--to", "bottleneck", "--rank", 17), "rank=17 is more than the vision_width=16"),
    "rank of none": ("projector", ("--to", "depthwise", "--rank", 4), "rank=4 is not read by extractor='depthwise'"),
    "groups": ("projector", ("--to", "grouped", "--groups", 5), "groups=5 does not divide vision_width=16"),
    "kernel": ("projector", ("--to", "resampled", "--base-kernel", 9), "base_kernel=9 is larger"),
    "quantisation": ("projector", ("--quantize", "int3"), "quantization='int3' is unknown"),
    "compact": ("compact", ("--to", "nested"), "is compact already (extractor='depthwise')"),
    "quantised": ("quantised", ("--quantize", "int8"), "is quantised to int8 already"),
    "no extractor": ("mlp", ("--to", "depthwise"), "has extractor='none', and so no convolutions"),
    "no source": ("nowhere", ("--to", "depthwise"), "nowhere does not exist"),
    "no tower": ("projector", ("--to", "depthwise", "--images", "images"), "--images needs the vision tower"),
    "two towers": (
        "model", ("--to", "depthwise", "--images", "images", "--vision-tower", "tower"), "has a vision tower of its own"
    ),
    "no images": ("model", ("--to", "depthwise", "--images", "compact"), "holds no images"),
    "no folder": ("model", ("--to", "depthwise", "--images", "model.bin"), "is no folder: give one with images"),
    "few images": ("model", ("--to", "depthwise", "--images", "three"), "has 3 images, and 4 are needed"),
    "width": ("projector", ("--to", "depthwise", "--features", "narrow.safetensors"), "width 5 do not fit vision_width=16"),
    "grid": ("projector", ("--to", "depthwise", "--features", "small.safetensors"), "that is a 7x7 map"),
    "two tensors": ("projector", ("--to", "depthwise", "--features", "two.safetensors"), "has no floating-point tensor"),
    "no file": ("projector", ("--to", "depthwise", "--features", "nowhere"), "is no file"),
    "both": (
        "model", ("--to", "depthwise", "--features", "features.safetensors", "--images", "images"), "leave one out"
    ),
    "distilling nothing": ("projector", ("--to", "depthwise", "--distill", 5), "--distill needs what the model will see"),
    "distilling quantised": (
        "projector", ("--quantize", "int8", "--distill", 5, "--features", "features.safetensors"), "--distill trains"
    ),
    "plot of nothing": ("projector", ("--to", "depthwise", "--plot", "plot.svg"), "--plot tries ranks or groups"),
    "plot elsewhere": ("projector", ("--to", "nested", "--plot", "plot.png"), "must be an .svg file"),
    "grid of ours": ("projector", ("--to", "depthwise", "--grid", 8), "--grid is for official checkpoints"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_said(case, made, tmp_path):
    source, words, message = WRONG[case]
    result = run(made, source, tmp_path / "out", *words)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_memory_is_for_the_images_that_are_used(made, tmp_path):
    """Of a file as of a folder, and of many images in it 256."""

    def estimate(*words):
        result = run(made, "projector", tmp_path / "out", "--to", "depthwise", "--dry-run", "--json", *words)
        return reported(result)["peak_memory_estimate_bytes"]

    for count in (256, 300):
        x = torch.zeros(count, 64, 16, dtype=torch.float16)
        save_file({"features": x}, tmp_path / f"{count}.safetensors")
    few = estimate("--features", "features.safetensors")
    assert few == estimate("--images", "images", "--vision-tower", "tower")
    many = estimate("--features", tmp_path / "256.safetensors")
    assert many - few == (256 - 8) * 3 * 4 * 64 * 16
    assert estimate("--features", tmp_path / "300.safetensors") == many


def test_too_little_memory_and_an_interruption_leave_nothing(made, tmp_path, monkeypatch):
    from sp_fast.compress import job

    monkeypatch.setattr(job, "_PROGRAM", 2**60)
    result = run(made, "projector", tmp_path / "out", "--to", "depthwise")
    assert (result.exit_code, list(tmp_path.iterdir())) == (1, [])
    assert "GB of memory are needed" in result.stderr

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Compression, "run", interrupted)
    result = run(made, "projector", tmp_path / "out", "--to", "depthwise")
    assert (result.exit_code, list(tmp_path.iterdir())) == (130, [])
