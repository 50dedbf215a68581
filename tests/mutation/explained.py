"""Mutants that survive because no result can change: (file, operator, lines before, lines after) -> why.

`python -m tests.mutation.campaign --json FILE` writes the keys; ANY stands for whatever the operator makes of the lines.
An entry that fits no mutant any more is stale.
"""

ANY = "*"
WINDOWED, PLAN, POOLED, TAIL = (
    f"kernels/{name}_triton.py" for name in ("windowed_matmul", "windowed_plan", "pooled_rows", "spatial_tail")
)
TORCH = "kernels/windowed_matmul_torch.py"

# fmt: off
EXPLAINED: dict[tuple[str, str, str, str], str] = {
    (POOLED, "comparison", "here = (row >= first) & (row < first + k * k)", "here = (row >= first) & (row <= first + k * k)"):
        "The row behind a level is the next level's first, which has the last word, or lies beyond the mask.",
    (TAIL, "swapped", "centred = tl.where(mask_k, tl.where(finite, finite_or_largest(z, LARGEST), z) - mean[:, None], 0.0)", "centred = tl.where(mask_k, mean[:, None] - tl.where(finite, finite_or_largest(z, LARGEST), z), 0.0)"):
        "It is only squared.",
    (TORCH, "off by one", "dense = rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]", "dense = rows.stride(1) == 1 and rows.stride(1) == rows.shape[2]"):
        "Dense rows are copied in vain; at one channel its stride is never used.",
    (WINDOWED, "sign", "w = tl.load(w_ptrs, mask=(k0 + offs_k < C)[:, None] & mask_d[None, :], other=0.0)", "w = tl.load(w_ptrs, mask=(k0 + offs_k < C)[:, None] & mask_d[None, :], other=1.0)"):
        "Beyond C it meets zeros of x, and columns beyond D are not stored.",
    ("kernels/windowed_matmul_dweight_triton.py", "comparison", "if len(MANY) > 0:", "if len(MANY) >= 0:"):
        "Where there are none, no program gets here: it only keeps the machine code short.",
    (PLAN, "arithmetic", "span = manys + singles * 3 // 4", "span = manys + singles + 3 // 4"):
        "The order of the programs is schedule: each unit still has one.",
    ("kernels/spatial_project_backward_triton.py", "off by one", "is_query, is_key = which == 0, which == 1", "is_query, is_key = which == 0, which == 2"):
        "Keys and values change programs: all that a program does follows from these two.",
    (WINDOWED, "swapped arguments", "block_b, block_d = reduce_tile(batch, depth)", "block_b, block_d = reduce_tile(depth, batch)"):
        "Tiles of the reduction are schedule: each sum is one thread's, in the order of the splits.",
    (WINDOWED, "comparison", "if len(SINGLE) > 0:", "if len(SINGLE) >= 0:"):
        "Where there are none, no program gets here: it only keeps the machine code short.",
}
