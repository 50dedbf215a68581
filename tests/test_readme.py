"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch

from sp_fast import SPProjector, SPProjectorConfig
from tests import standin, tiny

README = (Path(__file__).parent.parent / "README.md").read_text()


def example(section):
    """The only python block of a section."""
    (code,) = re.findall(r"```python\n(.+?)```", README.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    return code


def test_the_example_runs(tmp_path, monkeypatch):
    """On a LoRA checkpoint of the published shape but few outputs, as the official code saves it."""
    folder = tmp_path / "llava-sp-cropping-lora"
    folder.mkdir()
    projector = SPProjector(SPProjectorConfig(spatial_width=8, text_width=16), dtype=torch.float16)
    torch.save(projector.official_state_dict("base_model.model.model."), folder / "non_lora_trainables.bin")
    monkeypatch.chdir(tmp_path)
    code = example("Use")
    names = {}
    exec(code, names)
    assert names["tokens"].shape == (1, 582, 16)
    assert names["attention"].shape == (1, 6, 25)
    again = SPProjector.from_pretrained("my-projector")
    torch.testing.assert_close(again(names["features"]), names["tokens"])
    assert SPProjector.from_official("model.bin").config == again.config


def test_the_model_answers(tmp_path, monkeypatch):
    model = tiny.model_of()
    model.save_pretrained(tmp_path / "llava-sp-7b")
    tiny.processor_of(model.config).save_pretrained(tmp_path / "llava-sp-7b")
    tiny.image().save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("The whole model"), names)
    assert (names["inputs"]["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length
    assert names["answer"].shape[1] == names["inputs"]["input_ids"].shape[1] + 64


def test_the_line_for_the_official_code_runs():
    model = standin.randomise(standin.Model("conv336_cropping_sfe_dfi")).eval()
    tokens = model.encode_images(standin.batch(model)["images"])
    names = {"model": model}
    exec(example("I already have LLaVA-SP running"), names)
    assert "encode_images" in vars(model)
    torch.testing.assert_close(model.encode_images(standin.batch(model)["images"]), tokens)
    assert names["restore"](model) is model
    assert "encode_images" not in vars(model)


def test_the_file_map_names_every_module():
    root = Path(__file__).parent.parent
    named = set(re.findall(r"`([\w/]+\.py)`", README))
    folders = {"sp_fast": "sp_fast/", "kernels": "kernels/", "bench": "bench/", "training": "training/"}
    for name in named:
        assert any(
            (root / folder / name.removeprefix(folder)).is_file()
            for folder in ("", "sp_fast/official/", "sp_fast/llava_sp/", *folders.values())
        ), name
    for path in [path for folder in folders.values() for path in (root / folder).glob("*.py")]:
        small = path.name in {"__init__.py", "__main__.py", "version.py", "errors.py", "backend.py"}
        assert small or path.name in {Path(n).name for n in named}, path
    for folder in [path for path in (root / "sp_fast").iterdir() if any(path.glob("*.py"))]:
        assert f"`sp_fast/{folder.name}/" in README, folder
