"""What the tests of `sp-fast bench static` compile and judge."""

import functools
from dataclasses import replace

from sp_fast.bench.breaches import STREAM
from sp_fast.bench.shipped import QUANTIZED_BATCHES, configurations
from sp_fast.bench.static import judge
from sp_fast.kernels.tiles import bucket_of

FEWER = QUANTIZED_BATCHES  # of each bucket what is a multiple of 16 and what is none, in place of 256 batches
configured = functools.cache(lambda chip, dtype: configurations([str(chip)], [dtype]))


def shipped_for(chip, batch, dtype="bfloat16", kernel=STREAM):
    """What crop-dfi launches at that batch, which is a bucket's bound."""
    users = [c for c in configured(chip, dtype) if c.source.kernel == kernel and "crop-dfi" in c.variants]
    return max((c for c in users if bucket_of(batch) in c.buckets and c.batch <= batch), key=lambda c: c.batch)


def planted(configuration, constants=(), **fields):
    """With some constants or fields of its source replaced."""
    source = configuration.source
    return replace(configuration, source=replace(source, constants=tuple({**dict(source.constants), **dict(constants)}.items()), **fields))  # fmt: skip


judged_once = functools.cache(judge)
