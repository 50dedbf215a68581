"""`sp-fast bench model` as a user runs it, its result lines and its tables."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from sp_fast.bench import pool, worker
from sp_fast.bench.execute import blank_record
from sp_fast.bench.formats import FORMATS
from sp_fast.bench.model_cases import IMPLEMENTATIONS, STAGES, Lengths, attentions_on, model_cases
from sp_fast.bench.model_shapes import ModelShape, folder_shape, random_shape
from sp_fast.bench.model_subject import ModelJob
from sp_fast.bench.model_suite import MODEL
from sp_fast.bench.model_summary import rows
from sp_fast.bench.record import from_json, read_records
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.run import Plan
from sp_fast.cli import app
from sp_fast.errors import BackendError, ConfigError
from tests.bench_helpers import record
from tests.bench_model_helpers import ROOT, TINY, cases_of, measure

pytestmark = pytest.mark.usefixtures("few_inputs")


@pytest.fixture
def local(monkeypatch, local_workers):
    """No processes, and no peaks to wait for."""
    rates = dict.fromkeys(("float32", "bfloat16", "float16"), 0.1)
    monkeypatch.setattr(worker, "measure_peaks", lambda *_: Peaks(20.0, 22.0, rates))


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_command(local, tmp_path):
    out = tmp_path / "a.jsonl"
    result = bench("model", "--tiny", "--device", "cpu", "--turns", "1", "--stage", "decode", "--stage", "projector",
                   "--attn", "auto", "--attn", "eager", "--out", out, "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [json.loads(r.to_json()) for r in read_records(out)] == values["records"]
    assert {(r["stage"], r["attention"], r["implementation"]) for r in values["records"]} == {
        (s, a, name) for s in ("decode", "projector") for a in ("sdpa", "eager") for name in IMPLEMENTATIONS
    }
    assert "sdpa attention: auto: the model is on cpu" in result.stderr
    shown = bench("show", out, "--format", "md")
    assert "eager attention, eager; 8 text tokens beside the image, 4 new" in shown.stdout
    assert bench("compare", out, out).exit_code == 0
    assert bench("model", "--tiny", "--out", out).exit_code == 1  # it is there


def test_a_folder(local, tmp_path):
    """A model of one's own: all implementations are built from its parts."""
    subject = ModelJob("sp_fast", TINY, torch.float32, "cpu", 5, tmp_path).build()
    subject.module.save_pretrained(tmp_path / "mine")
    shape = folder_shape(tmp_path / "mine")
    assert (shape.llm, shape.tower) == ("mine", "clip_vision_model")
    records = measure(cases_of(["projector"], shape=shape))
    assert [(r.llm, r.withheld) for r in records] == [("mine", None)] * 3
    loaded = ModelJob("sp_reference", shape, torch.float32, "cpu", 0, tmp_path).build().module
    assert torch.equal(loaded.lm_head.weight, subject.module.lm_head.weight)
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(loaded.model.encode_images(pixels), subject.module.model.encode_images(pixels))
    result = bench("model", "--model", tmp_path / "mine", "--llm", "7b", "--device", "cpu")
    assert "leave --llm, --tower and --variant out" in result.stderr


def test_what_does_not_fit_is_said(local, monkeypatch):
    monkeypatch.setattr(pool, "available_mib", lambda _: 20_000.0)
    result = bench("model", "--llm", "7b", "--device", "cpu")
    assert result.exit_code == 1
    assert "7b.clip-l-336.crop-dfi in float32 at batch 1 needs about" in result.stderr
    assert "choose a smaller --llm or --batch, fewer --implementation, or bfloat16" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llm", "7B"], "'7B' is no llm; known: tiny, 0.5b, 1b, 7b, 13b"),
        (["--tower", "clip"], "is no tower"),
        (["--variant", "crop-dif"], "did you mean 'crop-dfi'"),
        (["--stage", "decod"], "did you mean 'decode'"),
        (["--implementation", "fast"], "'fast' is no implementation; did you mean 'sp_fast'?"),
        (["--mode", "compile"], "did you mean 'compiled'"),
        (["--dtype", "fp8"], "'fp8' is no dtype"),
        (["--mode", "compiled", "--stage", "tower"], "mode compiled has no stage tower: choose from ttft, decode"),
        (
            ["--prompt-tokens", "2000"],
            "582 image tokens, 2000 of text and 4 new ones are 2586, but the language model's",
        ),
        (["--attn", "flash_attention_2"], "was requested, but the model is on cpu: use attention='auto'"),
        (["--batch", "0"], "batch 0 is no number of images"),
        (["--model", "nowhere"], "nowhere holds no config.json: give a LlavaSp folder"),
        (["--variant", "conv_block"], "BatchNorm"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = bench("model", "--tiny", "--device", "cpu", *arguments, "--out", "a.jsonl")
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("sp-fast bench model: ")
    assert list(tmp_path.iterdir()) == []


def test_attentions_follow_device_and_dtype(monkeypatch):
    assert list(attentions_on("cpu", "float32", ["auto", "sdpa", "eager"])) == ["sdpa", "eager"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("sp_fast.attention.find_attention", lambda: dict.fromkeys(
        ("flash_attention_4", "flash_attention_3", "flash_attention_2", "sdpa")))  # fmt: skip
    assert next(iter(attentions_on("cuda", "bfloat16", ["auto"]))) == "flash_attention_4"
    assert next(iter(attentions_on("cuda", "float32", ["auto"]))) == "sdpa"
    with pytest.raises(BackendError, match=r"float32 is neither"):
        attentions_on("cuda", "float32", ["flash_attention_2"])
    with pytest.raises(ConfigError, match="'fp8' is no dtype"):
        attentions_on("cpu", "fp8", ["auto"])


def test_lengths_are_checked():
    with pytest.raises(ConfigError, match="new-tokens=1 must be at least 1 and 2"):
        model_cases([TINY], ["ttft"], [1], ["float32"], {"float32": ["sdpa"]}, ["eager"], Lengths(1, 1))
    assert random_shape("tiny", "tiny", "pool").config().projector.pyramid == "pool"


class TestRecords:
    def test_lines_come_back(self, finished):
        for r in finished:
            back = from_json(r.to_json())
            assert back.identity == r.identity
            assert (back.llm, back.tower, back.attention, back.mode) == ("tiny", "tiny", "sdpa", "eager")
            assert (back.image_tokens, back.prompt_tokens, back.new_tokens) == (r.image_tokens, 8, 4)

    def test_old_lines_still_load(self):
        """Of result files in the repository, from before there was a model's benchmark."""
        for path in sorted((ROOT / "bench" / "results" / "projector-cpu").glob("*.jsonl")):
            line = path.read_text().splitlines()[0]
            assert "tokens_per_second" not in line
            found = from_json(line)
            assert (found.benchmark, found.llm, found.tokens_per_second) == ("projector", None, None)

    @pytest.mark.parametrize(
        "change",
        [
            {"attention": "eager"}, {"mode": "compiled"}, {"prompt_tokens": 9}, {"new_tokens": 5}, {"batch": 2},
            {"shape": ModelShape("0.5b", "tiny")}, {"shape": ModelShape("tiny", "clip-l-336")},
            {"shape": ModelShape("tiny", "tiny", "pool")}, {"dtype": "bfloat16"}, {"stage": "ttft"},
        ],
    )  # fmt: skip
    def test_identities_tell_cases_apart(self, change):
        case = cases_of(["decode"])[0]
        blank = blank_record(Plan((), ()), {})
        one, other = (replace(blank, **MODEL.fields(c, "sp_fast")).identity for c in (case, replace(case, **change)))
        assert one != other

    def test_cases_and_jobs_go_to_processes(self, tmp_path):
        case = cases_of(["decode"])[0]
        job = MODEL.job(case, "cpu", 0, tmp_path)
        assert pickle.loads(pickle.dumps((case, job))) == (case, job)


class TestShown:
    def test_ratios_are_taken_within_a_heat(self):
        case = MODEL.fields(cases_of(["decode"])[0], "sp_fast") | {"tokens_per_second": 100.0}
        del case["stage"], case["direction"], case["batch"]

        def one(name, ms, heat):
            return record(name, ms, stage="decode", heat=heat, **case)

        [row] = rows(
            [one("sp_fast", 10.0, 0), one("sp_reference", 30.0, 0), one("sp_fast", 20.0, 1), one("llava", 16.0, 1)]
        )
        assert row.speedup == 3.0
        assert row.cost == 1.25
        assert row.our.ms_p50 == 10.0
        assert list(row.records) == list(IMPLEMENTATIONS)
        [alone] = rows([one("sp_fast", 10.0, 0), one("llava", 16.0, 1)])
        assert alone.speedup is None is alone.cost

    @pytest.mark.parametrize("format_", FORMATS)
    def test_the_other_model_is_never_a_speedup(self, finished, format_):
        text = FORMATS[format_]([*finished, record()])  # beside a record of the projector
        assert "sp_fast" in text
        assert "llava" in text.lower()
        if format_ in ("table", "md"):
            assert "LLaVA-1.5 is another model" in text
            assert "582 image tokens" in text
            assert "576 image tokens" in text
            assert "decode (TPOT)" in text
            assert "best baseline" in text or "crop-dfi, float32: time" in text
        if format_ == "json":
            cases = json.loads(text)["cases"]
            assert len(cases) == 1 + len(STAGES)
            assert {"speedup_over_official_form", "time_over_llava_1_5"} <= cases[-1].keys()

    def test_withheld_rows_are_named_and_notes_are_told(self, finished):
        wrong = replace(finished[0], ms_p50=None, withheld="accuracy: logits has an error of 1")
        text = FORMATS["md"]([wrong, *finished[1:2], replace(finished[2], note="within rounding")])
        assert f"withheld: {wrong.case}, sp_fast: accuracy: logits" in text
        assert f"{wrong.case}, LLaVA-1.5: within rounding" in text
        assert "x |" not in text.split("withheld")[0].split("memory")[0]  # no ratio without our time
