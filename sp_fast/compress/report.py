"""A compression on a terminal: the plan, what of the weights was kept, the errors."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from sp_fast.compress.job import Outcome, Plan, shown
from sp_fast.compress.methods import Spectrum


def print_plan(plan: Plan, console: Console, written: bool) -> None:
    """What goes in, what comes out; parameters, MB and GB."""
    scheme = f", {plan.quantization}" if plan.quantization else ""
    _line(console, f"{plan.source} ({plan.kind}, {plan.dtype}) to {plan.to}{scheme}")
    table = Table("projector", "parameters", "of them spatial", "MB", box=box.SIMPLE)
    for name, size in (("before", plan.before), ("after", plan.after)):
        table.add_row(name, f"{size.parameters:,}", f"{size.spatial_parameters:,}", f"{size.bytes / 1e6:,.1f}")
    share = [
        plan.after.parameters / plan.before.parameters,
        plan.after.spatial_parameters / plan.before.spatial_parameters,
    ]
    table.add_row("share", *(f"{x:.4f}" for x in (*share, plan.after.bytes / plan.before.bytes)))
    console.print(table)
    _line(console, f"fitted to {plan.fitted_to}")
    if plan.distillation_steps:
        _line(console, f"distillation: {plan.distillation_steps} steps, extractor and output layer")
    _line(console, f"judged on {plan.judged_on}")
    _line(console, f"{'written' if written else 'would write'}: {plan.out}")
    _line(console, f"peak memory, estimated: {plan.peak_memory_estimate_bytes / 1e9:,.1f} GB")


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Energies, errors, and the sweep where there was one."""
    for spectrum in outcome.made.spectra:
        _line(console, _kept(spectrum))
    table = Table("judged", "relative error", "of what varies", box=box.SIMPLE)
    for error in outcome.made.errors:
        varied = "" if error.of_variation is None else f"{error.of_variation:.3g}"
        table.add_row(error.name, f"{error.relative:.3g}", varied)
    console.print(table)
    _line(console, f"features: {outcome.features}")
    if outcome.sweep:
        table = Table("tried", "spatial parameters", "error of the spatial tokens", box=box.SIMPLE)
        for value, size, error in outcome.sweep:
            table.add_row(str(value), f"{size:,}", f"{error:.3g}")
        console.print(table)


def _kept(spectrum: Spectrum) -> str:
    taken = f"energy kept, {spectrum.name}: {spectrum.taken:.4f}"
    if spectrum.rank is None:
        return taken
    ranks = "  ".join(f"{rank}: {share:.3f}" for rank, share in shown(spectrum.kept, spectrum.rank).items())
    return f"{taken} at rank {spectrum.rank}; by rank {ranks}"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
