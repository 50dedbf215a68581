"""What a run says of itself: FLOP against torch's counter, the meter's figures, the log file, the figure, progress."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerState

from sp_fast import ReferenceSPProjector, SPProjectorConfig
from sp_fast.errors import TrainingError
from sp_fast.training import flops, log_file, meter
from sp_fast.training.flops import Flop, measured_peak, model_flop, projector_flop
from sp_fast.training.log_file import LogFile, plot, read_log, running_mean
from sp_fast.training.meter import Meter
from sp_fast.training.progress import ProgressReport
from sp_fast.training.run import train
from sp_fast.training.stage import prepare
from tests import tiny, tiny_training
from tests.helpers import ALL_VARIANTS, small
from tests.tiny_training import Watch, quicken, recipe, start

LAUNCH = Path(flops.__file__).parent / "launch"


# FLOP


def stage_of(rank):
    return SimpleNamespace(lora_rank=rank, alpha=8.0, lora_dropout=0.1, gradient_checkpointing=False)


def counted(model, rows, length):
    """torch's count of forward and backward. Attention to later tokens is taken off, and rotary angles, which older
    releases of transformers compute as a product."""
    text, image = model.config.text_config, model.config.image_seq_length
    ids = torch.randint(4, 200, (rows, length))
    ids[:, 3 : 3 + image] = model.config.image_token_id
    pixels = torch.randn(rows, 3, *2 * [model.config.vision_config.image_size])
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids.clamp(max=tiny.VOCABULARY - 1), pixel_values=pixels).loss.backward()
    head = text.hidden_size // text.num_attention_heads
    later = rows * (length**2 - length * (length + 1) // 2)
    angles = [kinds for name, kinds in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    total = counter.get_total_flops() - sum(sum(kinds.values()) for kinds in angles)
    return total - 3 * 4 * text.num_hidden_layers * text.num_attention_heads * head * later


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize(
    ("tower", "stage", "rank"), [("clip", "pretrain", None), ("siglip", "finetune", 4), ("clip", "finetune", None)]
)
def test_flop_of_a_step_are_torchs(text, tower, stage, rank):
    """Exactly: eager attention is products, and the reference's convolutions are torch's own."""
    model = tiny.model_of(text, tower)
    model.set_attn_implementation("eager")
    model.model.multi_modal_projector = ReferenceSPProjector(model.config.projector)
    flop = model_flop(prepare(model, stage, stage_of(rank)).train())
    rows, length = 2, model.config.image_seq_length + 9
    expected = counted(model, rows, length)
    assert flop.of(rows * length, rows * length * (length + 1) // 2, rows) == expected


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_flop_of_every_projector_are_torchs(variant):
    config = small(variant)
    reference = ReferenceSPProjector(config).train()
    features = torch.randn(1, config.patch_tokens, config.vision_width)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math, FlopCounterMode(display=False) as counter:
        reference(features).sum().backward()
    assert projector_flop(config) == counter.get_total_flops()


def test_flop_of_the_published_projector_by_hand():
    conv, detail, mlp = 1456 * 1024 * 512, 25 * 256 * 1024 * 512, 576 * 1024 * 4096
    later = 576 * 4096 * 4096 + (6 + 25 + 25) * 512 * 512 + 2 * 6 * 25 * 512 + 6 * 1024 * 4096
    assert projector_flop(SPProjectorConfig()) == 2 * 2 * (conv + detail + mlp) + 3 * 2 * later


def test_the_peak_is_the_best_of_many_products(monkeypatch):
    clock = iter([9.0, 0.5, 0.25, 0.5, *[1.0] * 10**4])
    monkeypatch.setattr(flops, "_seconds", lambda a, b: next(clock))
    monkeypatch.setattr(flops.time, "perf_counter", iter(x / 100 for x in range(10**4)).__next__)
    assert measured_peak(torch.device("cpu"), torch.float32) == 2 * 512**3 / 0.25
    monkeypatch.undo()
    assert 1e8 < measured_peak(torch.device("cpu"), torch.float32) < 1e14


# The meter


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(meter.time, "perf_counter", found)
    return found


@pytest.fixture
def metered(monkeypatch, clock):
    monkeypatch.setattr(meter, "model_flop", lambda model: Flop(token=1000, pair=10, image=100_000))
    monkeypatch.setattr(meter, "measured_peak", lambda device, dtype: {torch.bfloat16: 2e6}[dtype])
    found = Meter(None)
    found.on_train_begin(SimpleNamespace(device=torch.device("cpu"), bf16=True), TrainerState(global_step=5), None)
    return found


def batch(*lengths, supervised=2, images=1, device="cpu"):
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.int64) for n in lengths], batch_first=True)
    labels = torch.full_like(mask, -100)
    labels[:, : supervised + 1] = 7  # the first is predicted from nothing
    pixels = torch.empty(images, 3, 8, 8)
    found = {"attention_mask": mask, "labels": labels, "pixel_values": pixels}
    return {name: tensor.to(device) for name, tensor in found.items()}


def alone(rows):
    return rows


def test_a_line_says_what_came_since_the_last(metered, clock):
    clock.now = 100.0
    metered.add(batch(3, 5))
    clock.now = 103.0
    with metered.paused():
        clock.now = 110.0  # of a checkpoint, say
    metered.add(batch(4, images=0))
    clock.now = 111.0
    line = metered.line(7, {"language model": torch.tensor(2.0)}, 3, alone)
    pairs = 3 * 4 // 2 + 5 * 6 // 2 + 4 * 5 // 2
    assert line["step_seconds"] == 4.0 / 2
    assert line["tokens_per_second"] == 12 / 4.0
    assert line["supervised_tokens"] == 3 * 2
    assert line["mfu"] == pytest.approx((12 * 1000 + pairs * 10 + 100_000) / (4.0 * 2e6))
    assert line["gradient_norm_language_model"] == 2.0
    assert line["skipped"] == 3
    metered.add(batch(6, supervised=1))
    clock.now = 116.0
    line = metered.line(8, {}, 3, alone)
    assert (line["step_seconds"], line["tokens_per_second"], line["supervised_tokens"]) == (5.0, 6 / 5.0, 1)


def test_a_line_is_of_all_processes(metered, clock):
    metered.add(batch(8))
    clock.now = 2.0
    line = metered.line(6, {}, 1, lambda rows: torch.cat([rows, rows, 2 * rows]))
    assert line["tokens_per_second"] == 4 * 8 / 2.0
    assert line["skipped"] == 4
    one = (8 * 1000 + 36 * 10 + 100_000) / (2.0 * 2e6)
    assert line["mfu"] == pytest.approx(one)  # four times the work on four times the peak
    assert line["peak_memory_mib"] > 100  # 2 * of one process, not the sum of three
    metered.add(batch(8))
    clock.now = 4.0
    assert line["peak_memory_mib"] == pytest.approx(2 * metered.line(7, {}, 1, alone)["peak_memory_mib"], rel=0.2)


def test_counting_reads_nothing_back(metered):
    """Tensors of the meta device have nothing to read."""
    metered.add(batch(8, device="meta"))
    metered.add(batch(3, 4, device="meta"))


def test_learning_rates_are_those_of_the_step(metered, clock):
    groups = [
        {"name": "projector", "lr": 0.5, "params": [torch.zeros(1)]},
        {"name": "language model", "lr": 0.25, "params": [torch.zeros(2)]},
    ]
    optimizer = torch.optim.SGD(groups)
    metered.add(batch(2))
    metered.on_pre_optimizer_step(None, None, None, optimizer=optimizer, model=None)
    optimizer.param_groups[0]["lr"] = 0.0  # the scheduler's, for the next step
    clock.now = 1.0
    line = metered.line(6, {}, 0, alone)
    assert (line["learning_rate_projector"], line["learning_rate_language_model"]) == (0.5, 0.25)


# A run


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    tiny_training.parts(folder)
    tiny_training.data(folder / "data", 8, text_only=(1, 2))
    start(folder)
    return folder


def settings(parts, output, **changes):
    small = {"projector": str(parts / "start"), "projector_learning_rate": 1e-3, "output": parts / output}
    return recipe("finetune", parts, **(small | changes))


def test_an_interrupted_run_has_every_step_once(parts, capfd, monkeypatch):
    quicken(monkeypatch)
    monkeypatch.setattr(log_file, "plot", plot)
    again = settings(parts, "interrupted", save_steps=100, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train("finetune", again, lambda text: None, [ProgressReport(), Watch(1)])
    log = again.output / "log.jsonl"
    before = read_log(again.output)
    assert [line["step"] for line in before] == [1]
    log.write_text(log.read_text() + json.dumps({"step": 2, "loss": 99.0}) + "\n")  # logged, and never saved
    figure = plot(again.output)
    assert figure.read_text().startswith("<?xml")
    figure.unlink()
    train("finetune", again, lambda text: None, [ProgressReport()])
    lines = read_log(again.output)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:1] == before
    assert all(line["loss"] < 99 for line in lines)
    for line in lines:
        assert line["learning_rate_language_model"] == pytest.approx(10 * line["learning_rate_projector"])
        assert line["learning_rate"] == line["learning_rate_projector"]
        norms = line["gradient_norm_projector"], line["gradient_norm_language_model"]
        assert line["grad_norm"] == pytest.approx(torch.tensor(norms).norm().item(), rel=1e-5)
        assert line["step_seconds"] > 0 < line["tokens_per_second"]
        assert 0 < line["mfu"] < 1
        assert line["skipped"] == 0
    epoch = sum(line["supervised_tokens"] for line in lines[:2])
    assert epoch == sum(line["supervised_tokens"] for line in lines[2:]) > 0
    assert figure.is_file()
    said = capfd.readouterr()
    assert said.out == ""  # the Trainer prints nothing of its own
    assert said.err.count("s/step") == 4
    assert "step 4/4" in said.err


# The log file


def write(run, lines):
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


LINES = [
    {
        "step": 2 * i + 1,
        "epoch": 0.1 * i,
        "loss": 5 / (i + 1),
        "learning_rate_projector": 1e-3,
        "gradient_norm_projector": 0.5,
    }
    for i in range(20)
]


def test_a_figure_shows_every_line_and_is_the_same_again(tmp_path):
    write(tmp_path / "a", LINES)
    first = plot(tmp_path / "a").read_bytes()
    assert plot(tmp_path / "a").read_bytes() == first
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"log.jsonl", "loss.svg"}
    figure = log_file._draw("a", LINES)
    loss, rate, norm = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[line["step"], line["loss"]] for line in LINES]
    assert rate.lines[0].get_xydata().tolist() == [[line["step"], 1e-3] for line in LINES]
    assert norm.lines[0].get_xydata().tolist() == [[line["step"], 0.5] for line in LINES]
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "learning rate", "gradient norm"]


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    write(tmp_path, LINES[:3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert read_log(tmp_path) == LINES[:3]
    plot(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "no line yet"),
        (b'{"step": 1, "loss": 2}\nnone\n{"step": 3, "loss": 2}\n', "line 2 is no JSON"),
        (b'{"step": 1}\n', "line 1 has no step or no loss"),
        (b"[1]\n", "line 1 has no step or no loss"),
        (b"\xff\n", "cannot be read"),
    ],
)
def test_a_log_that_cannot_be_drawn_says_why(tmp_path, content, said):
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(TrainingError, match=said):
        plot(tmp_path)
    assert not (tmp_path / "loss.svg").exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    log = LogFile(tmp_path / "run")
    state = TrainerState(log_history=[LINES[0], {"step": 1, "train_loss": 3.0}])  # the Trainer's summary
    log.on_train_begin(None, state, None)
    assert read_log(tmp_path / "run") == LINES[:1]
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "log.jsonl").mkdir()
    state.log_history.pop()
    for event in (log.on_train_begin, log.on_log):
        with pytest.raises(TrainingError, match="goes on from the last checkpoint"):
            event(None, state, None)


def test_only_the_main_process_writes(tmp_path):
    log, state = LogFile(tmp_path), TrainerState(log_history=[LINES[0]], is_world_process_zero=False)
    for event in (log.on_train_begin, log.on_log, log.on_train_end):
        event(None, state, None)
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_null(tmp_path):
    state = TrainerState(log_history=[{"step": 1, "epoch": 0.5, "loss": 1.0, "grad_norm": float("inf")}])
    LogFile(tmp_path).on_log(None, state, None)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "epoch": 0.5, "loss": 1.0, "grad_norm": null}\n'


def test_a_running_mean_is_of_the_values_around():
    values = torch.randn(400, dtype=torch.float64).numpy()
    found = running_mean(values)
    for i in (0, 3, 200, 399):
        assert found[i] == pytest.approx(values[max(0, i - 10) : i + 11].mean())
    assert running_mean(values[:9])[4] == pytest.approx(values[:9].mean())


# Progress


def report(terminal, steps=((1, 2.0), (2, 1.0)), main=True):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    state = TrainerState(max_steps=4, is_world_process_zero=main)
    with ProgressReport(console) as progress:
        progress.on_train_begin(None, state, None)
        for step, loss in steps:
            state.global_step = step
            progress.on_step_end(None, state, None)
            progress.on_log(None, state, None, logs={"loss": loss, "step_seconds": 30.0, "tokens_per_second": 1234.5})
        progress.on_log(None, state, None, logs={"train_loss": 1.0})
    return console.file.getvalue()


def test_without_a_terminal_every_logged_step_is_a_line():
    assert report(False).splitlines() == [
        "step 1/4  loss 2.0000  30 s/step  1,234 tokens/s  0:01:30 left",
        "step 2/4  loss 1.0000  30 s/step  1,234 tokens/s  0:01:00 left",
    ]
    assert report(False, main=False) == ""


def test_on_a_terminal_there_is_a_bar_and_the_cursor_comes_back():
    out = report(True)
    assert "2/4" in out
    assert "loss 1.0000  30 s/step  1,234 tokens/s" in out
    assert out.index("\x1b[?25l") < out.rindex("\x1b[?25h")  # hidden, and shown again
    assert report(True, main=False) == ""


def test_a_run_that_fails_gives_the_terminal_back():
    console = Console(file=io.StringIO(), force_terminal=True)
    with ProgressReport(console) as progress:
        progress.on_train_begin(None, TrainerState(max_steps=4), None)  # and no end
    assert console.file.getvalue().rindex("\x1b[?25h") > 0


# Launch configurations


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_configuration(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    kinds = {"one_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert path.read_text().startswith("# ")
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_the_units_of_fsdp2_are_layers_of_the_published_parts():
    from accelerate import FullyShardedDataParallelPlugin

    config = load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config
    assert (config["fsdp_version"], config["fsdp_reshard_after_forward"]) == (2, True)
    names = config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy=config["fsdp_auto_wrap_policy"], transformer_cls_names_to_wrap=names
    )
    plugin.set_auto_wrap_policy(prepare(tiny.model_of(), "finetune", stage_of(4)))  # raises for one that is not there
    found = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert found == {"LlamaDecoderLayer", "CLIPEncoderLayer", "SPProjector"}
