"""Rows of the field of projectors, as its tests ask for them."""

from sp_fast.bench.field_projectors import field_cases

QUANTIZED = ("crop-dfi-int8", "crop-dfi-fp8", "crop-dfi-int4")


def case_of(name, direction="forward", batch=1, dtype="float32", tiny=False):
    [case] = field_cases([name], [direction], [batch], [dtype], tiny=tiny)
    return case
