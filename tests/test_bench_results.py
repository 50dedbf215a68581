"""Result lines, what they are gathered to, how they are shown, drawn and compared."""

import csv
import io
import json
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from sp_fast.bench import compare, summary
from sp_fast.bench.compare import changes, load, machines_differ, merged
from sp_fast.bench.formats import CHANGE_FORMATS, FORMATS
from sp_fast.bench.implementations import BASELINES
from sp_fast.bench.plots import plot
from sp_fast.bench.record import Record, RecordError, Sink, from_json, read_records
from tests.bench_helpers import record


@pytest.fixture
def results():
    """Two batches and directions; ours beside the official form in one heat and beside F.linear in another."""
    found = []
    for direction, scale in (("forward", 1.0), ("both", 4.0)):
        for batch in (1, 8):
            case = {"direction": direction, "batch": batch, "roof_ms": 2.0 * scale * batch}
            for name, ms, heat in (("fast", 10.0, 0), ("reference", 100.0, 0), ("fast", 12.0, 1), ("linear", 15.0, 1)):
                found.append(record(name, ms * scale * batch, heat=heat, **case))
    return found


def write(path, records):
    sink = Sink(path)
    for one in records:
        sink.add(one)
    return path


class TestRecords:
    def test_one_line_each_and_back(self, tmp_path, results):
        path = write(tmp_path / "new" / "a.jsonl", results)
        assert len(path.read_text().splitlines()) == len(results)
        assert read_records(path) == results
        assert read_records(path.parent) == results

    def test_six_digits_and_no_nan(self):
        line = record(ms=1 / 3, error=float("nan"), reference_error=float("inf")).to_json()
        values = json.loads(line, parse_constant=pytest.fail)
        assert values["ms_p50"] == 0.333333
        assert values["error"] is None is values["reference_error"]

    def test_a_file_that_is_there_is_kept(self, tmp_path, results):
        path = write(tmp_path / "a.jsonl", results)
        with pytest.raises(RecordError, match=r"a.jsonl exists: choose another file, or overwrite it with --force"):
            Sink(path)
        assert read_records(path) == results
        Sink(path, append=True).add(results[0])
        assert len(path.read_text().splitlines()) == len(results) + 1
        forced = Sink(path, force=True)
        assert len(read_records(path)) == len(results)  # kept until there is something in its place
        forced.add(results[0])
        assert read_records(path) == results[:1]

    def test_a_torn_last_line_is_left_out_and_goes_on_append(self, tmp_path, results):
        path = write(tmp_path / "a.jsonl", results)
        with path.open("a") as file:
            file.write(results[0].to_json()[:100])
        assert read_records(path) == results
        Sink(path, append=True).add(record("matmul"))
        assert read_records(path) == [*results, record("matmul")]

    @pytest.mark.parametrize(
        "line", ["nonsense", "[]", "{}", '{"format": 99}', '{"format": 1, "surprise": 2}', '{"format": 1}']
    )
    def test_a_line_that_is_no_result(self, tmp_path, results, line):
        path = tmp_path / "a.jsonl"
        path.write_text(results[0].to_json() + "\n" + line + "\n")
        with pytest.raises(RecordError, match="line 2 is no benchmark result"):
            read_records(path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(RecordError, match=r"none.jsonl cannot be read \(No such file"):
            read_records(tmp_path / "none.jsonl")
        with pytest.raises(RecordError, match="holds no benchmark results"):
            read_records(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RecordError, match="cannot be written"):
            Sink(tmp_path / "file" / "a.jsonl")

    def test_a_repeated_row_counts_as_its_last(self, tmp_path):
        path = write(tmp_path / "a.jsonl", [record(ms=10.0), record(ms=11.0), record(ms=12.0, heat=1)])
        assert [r.ms_p50 for r in read_records(path)] == [11.0, 12.0]

    def test_a_line_is_enough_to_be_understood(self):
        values = json.loads(record().to_json())
        assert values["environment"]["commit"]
        assert {
            "ms_p20",
            "ms_p50",
            "ms_p80",
            "gbps",
            "tflops",
            "roof_share",
            "peak_mib",
            "dtype",
            "batch",
        } <= values.keys()
        assert from_json(record().to_json()) == record()


class TestSummary:
    def test_the_speedup_is_against_the_strongest_within_its_heat(self, results):
        first = summary.rows(results)[0]
        assert (first.any.direction, first.any.batch) == ("forward", 1)
        assert first.speedups == {"reference": 10.0, "linear": 1.25}
        assert (first.best, first.speedup) == ("linear", 1.25)
        assert first.our.ms_p50 == 12.0  # as it ran beside F.linear
        assert list(first.records) == ["reference", "linear", "fast"]

    def test_the_strongest_wins_even_where_we_lose(self, results):
        row = summary.rows([*results, record("matmul", 6.0, heat=1)])[0]
        assert (row.best, row.speedup) == ("matmul", 0.5)

    def test_ours_withheld_quotes_nothing(self):
        ours = record(ms=None, withheld="accuracy: z", error=1.0)
        row = summary.rows([ours, record("linear", 5.0), record("reference", 50.0)])[0]
        assert (row.best, row.speedup, row.speedups) == ("linear", None, {})
        assert summary.withheld([ours, ours]) == [("crop-dfi.whole.forward.b1.float32, sp_fast", "accuracy: z")]

    def test_other_runs_and_shapes_are_not_neighbours(self):
        """A ratio is taken within one run; other widths are another row."""
        row = summary.rows([record(ms=10.0), record("linear", 15.0, run="later-2")])[0]
        assert (row.speedups, row.speedup, row.best) == ({}, None, "linear")
        assert len(summary.rows([record(), record("linear", 15.0, spatial_width=128)])) == 2
        assert record().identity != record(spatial_width=128).identity != record(grid=16).identity

    def test_only_ours(self):
        row = summary.rows([record()])[0]
        assert (row.best, row.speedup, row.our) == (None, None, record())

    def test_rows_come_in_a_readers_order(self):
        cases = [("mlp", "forward", 1), ("whole", "both", 1), ("whole", "forward", 8), ("whole", "forward", 1)]
        rows = summary.rows(record(stage=s, direction=d, batch=b) for s, d, b in cases)
        assert [(r.any.stage, r.any.direction, r.any.batch) for r in rows] == [cases[3], cases[2], cases[1], cases[0]]

    def test_every_implementation_has_a_label(self):
        assert set(summary.LABELS) == {"fast", *BASELINES}
        assert len(set(summary.LABELS.values())) == len(summary.LABELS)


class TestFormats:
    def test_table(self, results, capsys):
        text = FORMATS["table"](
            [*results, record("matmul", None, peak_mib=None, withheld="accuracy: tokens", error=0.5)]
        )
        for part in ("a machine, 2 threads, torch 2.13, commit abc", "read 20 GB/s, copy 22 GB/s, float32 product 0.2 TFLOP/s",
                     "1.25x against F.linear [D, K]", "10.00x our time", "roof (memory)", "crop-dfi, float32: memory, MiB",
                     "withheld: crop-dfi.whole.forward.b1.float32, matmul [K, D]: accuracy: tokens"):  # fmt: skip
            assert part in text, part
        assert "energy" not in text
        withheld = [line for line in text.splitlines() if "matmul" in line]
        assert len(withheld) == 1  # named, without a figure

    def test_energy_where_there_is_some(self):
        text = FORMATS["table"]([record(energy_mj=123.4, power_w=350.0, sm_mhz=1980, throttled=False)])
        assert "123.4" in text
        assert "1980" in text

    def test_judged_only(self):
        text = FORMATS["table"]([record(ms=None, peak_mib=None, error=1e-6, reference_error=2e-6)])
        assert "1.0e-06" in text
        assert "agrees" in text

    def test_markdown(self, results):
        lines = FORMATS["md"](results).splitlines()
        tables = [line for line in lines if line.startswith("|")]
        assert len({line.count("|") for line in tables[:6]}) == 1
        assert "| whole | forward | 1 | 100 | 15 | 12 | 11.8-12.2 | 2 | 50% | F.linear [D, K] | 1.25x |" in lines

    def test_csv(self, results):
        found = list(csv.DictReader(io.StringIO(FORMATS["csv"](results))))
        assert len(found) == len(results)
        assert found[1]["implementation"] == "reference"
        assert float(found[1]["ms_p50"]) == 100.0
        assert found[0]["commit"] == "abc"

    def test_json(self, results):
        values = json.loads(FORMATS["json"](results))
        assert [from_json(json.dumps(r)) for r in values["records"]] == results
        assert values["cases"][0] == {
            "case": "crop-dfi.whole.forward.b1.float32", "best_baseline": "linear", "speedup": 1.25,
            "speedups": {"reference": 10.0, "linear": 1.25},
        }  # fmt: skip


class TestPlots:
    def test_three_figures_in_two_formats(self, results, tmp_path):
        paths = plot(results, tmp_path / "new")
        assert sorted(p.name for p in paths) == sorted(
            f"{name}-crop-dfi-float32.{kind}" for name in ("latency", "memory", "roofline") for kind in ("png", "svg")
        )
        for path in paths:
            if path.suffix == ".png":
                image = Image.open(path)
                assert min(image.size) > 300
                assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10  # not blank
        texts = (tmp_path / "new" / "latency-crop-dfi-float32.svg").read_text()
        for label in ("roof (measured peaks)", "sp_fast", "F.linear", "forward + backward", "commit abc"):
            assert f"<!-- {label}" in texts or label in texts, label

    def test_nothing_is_overwritten(self, results, tmp_path):
        first = plot(results, tmp_path)[0].read_bytes()
        with pytest.raises(RecordError, match="exists: choose another folder, or overwrite with --force"):
            plot(results[:4], tmp_path)
        paths = plot(results, tmp_path, force=True)
        assert paths[0].read_bytes() == first

    def test_without_figures(self, tmp_path):
        with pytest.raises(RecordError, match="nothing can be drawn"):
            plot([record(ms=None, peak_mib=None, tflops=None)], tmp_path)

    def test_where_nothing_can_be_written(self, results, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RecordError, match="cannot be written"):
            plot(results, tmp_path / "file")

    def test_ours_withheld_still_draws_the_baselines(self, tmp_path):
        assert plot([record(ms=None, withheld="wrong", peak_mib=None, tflops=None), record("linear", 5.0)], tmp_path)


class TestCompare:
    def verdict(self, before, after, threshold=0.05):
        return changes([before], [after], threshold)[0].verdict

    def test_verdicts(self):
        base = record(ms=100.0)
        assert self.verdict(base, record(ms=100.0)) == "same"
        assert self.verdict(base, record(ms=104.9)) == "same"
        assert self.verdict(base, record(ms=108.0)) == "slower"
        assert self.verdict(base, record(ms=108.0), threshold=0.1) == "same"
        assert self.verdict(base, record(ms=90.0)) == "faster"
        assert self.verdict(base, record(ms=96.0)) == "same"
        # beyond the threshold, but the runs of one reach into those of the other
        assert self.verdict(record(ms=100.0, spread=0.2), record(ms=108.0, spread=0.2)) == "unclear"
        assert self.verdict(base, record(ms=100.0, peak_mib=530.0)) == "larger"
        assert self.verdict(base, record(ms=None, withheld="wrong")) == "lost"
        assert self.verdict(record(ms=None), base) == "no figure"

    def test_only_what_both_hold(self, results):
        found = changes(results, [record("linear", 15.0), record("matmul", 1.0)], 0.05)
        assert [(c.implementation, c.verdict) for c in found] == [("linear", "same")]
        with pytest.raises(RecordError, match="no case in common"):
            changes(results, [record(batch=64)], 0.05)
        with pytest.raises(RecordError, match="no case in common"):
            changes([record()], [replace(record(), device="cuda")], 0.05)

    def test_rounds_and_heats_are_merged(self):
        (one,) = merged([[record(ms=10.0)], [record(ms=14.0), record(ms=12.0, heat=1, peak_mib=400.0)]])
        assert (one.ms_p20, one.ms_p50, one.ms_p80) == (9.8, 12.0, pytest.approx(14.28))
        assert one.peak_mib == 400.0
        (lost,) = merged([[record(ms=10.0)], [record(ms=None, withheld="wrong")]])
        assert lost.ms_p50 is None

    def test_what_only_one_of_them_holds_is_said(self):
        assert compare.missing([record(), record("linear")], [record(), record(batch=8)]) == [
            "crop-dfi.whole.forward.b1.float32 linear",
            "crop-dfi.whole.forward.b8.float32 fast",
        ]

    def test_machines_that_differ_are_named(self):
        other = record(environment={"machine": "another", "torch": "2.13"})
        assert machines_differ([record()], [record()]) is None
        assert "another" in machines_differ([record()], [other])

    @pytest.mark.parametrize("format_", CHANGE_FORMATS)
    def test_every_format_names_the_verdict(self, format_):
        text = CHANGE_FORMATS[format_](changes([record(ms=100.0)], [record(ms=120.0)], 0.05))
        assert "slower" in text
        assert "1.2" in text
        if format_ == "json":
            assert json.loads(text)["changes"][0]["ratio"] == pytest.approx(1.2)

    def test_revisions_and_checkouts_are_measured_in_turns(self, tmp_path, monkeypatch):
        """A repository with two commits, one of them from before the benchmark; the measuring is a stand-in."""
        monkeypatch.chdir(tmp_path)
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run([*git, "init", "-q"], check=True)
        for folder, file in (("sp_fast", "__init__.py"), ("bench", "compare.py")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / file).write_text("")
            subprocess.run([*git, "add", "."], check=True)
            subprocess.run([*git, "commit", "-q", "-m", folder], check=True)
        calls = []

        def measure(self, options, out):
            calls.append((self.name, tuple(options)))
            assert (self.root / "bench" / "compare.py").is_file()
            return [record(ms=10.0 + len(calls))]

        monkeypatch.setattr(compare.Checkout, "measure", measure)
        before, after = load("HEAD", ".", ("--batch", "2"), lambda text: None)
        assert calls == [("HEAD", ("--batch", "2")), (".", ("--batch", "2"))] * 2
        assert (before[0].ms_p50, after[0].ms_p50) == (12.0, 13.0)
        with pytest.raises(RecordError, match="HEAD~1 is from before `sp-fast bench`"):
            load("HEAD~1", ".", (), lambda text: None)
        with pytest.raises(RecordError, match="no result file, no folder and no git revision"):
            load("nonsense", ".", (), lambda text: None)

    def test_a_checkout_that_fails_says_why(self, tmp_path):
        for folder in ("sp_fast", "bench"):
            (tmp_path / folder).mkdir()
        (tmp_path / "sp_fast" / "__init__.py").write_text("raise ImportError('half a package')")
        with pytest.raises(RecordError, match="x could not be measured: .*half a package"):
            compare.Checkout("x", tmp_path).measure((), tmp_path / "out.jsonl")


def test_a_record_names_units_in_its_fields():
    names = set(Record.__dataclass_fields__)
    assert {"ms_p50", "peak_mib", "gbps", "tflops", "energy_mj", "power_w", "sm_mhz", "temperature_c"} <= names
