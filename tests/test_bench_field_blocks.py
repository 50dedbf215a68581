"""The peers' blocks against slow forms written from their papers, and the exact form of ours."""

import torch
import torch.nn.functional as F
from torch import nn

from sp_fast import SPProjector
from sp_fast.bench import field_peers
from sp_fast.bench.field_exact import Streamed
from sp_fast.bench.field_subject import filled
from sp_fast.bench.implementations import Exact
from sp_fast.bench.weights import random_weights
from tests.helpers import small

TINY = field_peers.Shape(24, 16, 64, 64)  # a Q-Former of 12 channels


def built(make, shape=TINY):
    return filled(make, shape, torch.float64, 0, torch.device("cpu"))


def features(batch=2, shape=TINY):
    return torch.randn(batch, shape.patches, shape.vision, dtype=torch.float64)


class TestBlocks:
    def test_deco_pools_squares_of_patches(self):
        deco, x = built(field_peers.DeCo), features()
        means = x.view(2, 12, 2, 12, 2, -1).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(deco(x), deco.mlp(means))

    def test_ldpv2_adds_what_its_neighbours_say(self):
        ldp, x = built(field_peers.LDPv2), features()
        pooled = F.pad(ldp.mlp(x).view(2, 12, 2, 12, 2, -1).mean((2, 4)), (0, 0, 1, 1, 1, 1))
        weight = ldp.peg.weight[:, 0]
        told = (
            sum(pooled[:, i : i + 12, j : j + 12] * weight[:, i, j] for i in range(3) for j in range(3)) + ldp.peg.bias
        )
        torch.testing.assert_close(ldp(x), (pooled[:, 1:-1, 1:-1] + told).flatten(1, 2))

    def test_honeybees_blocks(self):
        """timm's RegStage as Honeybee asks for it: depthwise, SiLU, layer norms over channels, a gate of a quarter."""
        module, x = built(field_peers.CAbstractor), features()
        kinds = {type(m) for m in module.modules()}
        assert nn.BatchNorm2d not in kinds
        assert nn.ReLU not in kinds
        torch.testing.assert_close(module(x)[:1], module(x[:1]))  # nothing is normalised over the batch
        block, rows = module.before[0], x + module.positions

        def normal(layer, z):
            return F.layer_norm(z, (16,), layer.normalization.weight, layer.normalization.bias, 1e-6)

        one, three, gate, last = block.layer
        z = F.silu(normal(one, rows @ one.convolution.weight[:, :, 0, 0].T))
        z = F.silu(
            normal(
                three, field_peers._rows(F.conv2d(field_peers._map(z), three.convolution.weight, padding=1, groups=16))
            )
        )
        down, up = gate.attention[0], gate.attention[2]
        opened = F.silu(z.mean(1) @ down.weight[:, :, 0, 0].T + down.bias) @ up.weight[:, :, 0, 0].T + up.bias
        z = normal(last, (z * opened.sigmoid()[:, None]) @ last.convolution.weight[:, :, 0, 0].T)
        torch.testing.assert_close(block(field_peers._map(rows)), field_peers._map(F.silu(z + rows)))

    def test_an_instruction_that_is_not_given_changes_nothing(self):
        plain, instructed, x = built(field_peers.QFormer), built(field_peers.InstructQFormer), features()
        weights = {key.replace("embeddings.layernorm", "layernorm"): p for key, p in instructed.state_dict().items()}
        plain.load_state_dict({key: weights[key] for key in plain.state_dict()})
        torch.testing.assert_close(instructed(x), plain(x))
        assert not torch.allclose(plain(x), plain(x.flip(0)))

    def test_positions_by_hand(self):
        found, width = field_peers.sin_cos_positions(8, 3), 8
        for row in range(3):
            for column in range(3):
                angles = [place / 10_000 ** (i / 2) for place in (column, row) for i in range(width // 4)]
                values = torch.tensor(angles, dtype=torch.float64)
                expected = torch.cat([values[:2].sin(), values[:2].cos(), values[2:].sin(), values[2:].cos()])
                torch.testing.assert_close(found[3 * row + column], expected)

    def test_the_resampler_by_hand(self):
        shape = field_peers.Shape(24, 16, 256)  # two heads
        module, x = built(field_peers.Resampler, shape), features(2, shape)
        values = module.ln_kv(module.kv_proj(x))
        sides = (module.ln_q(module.query) + module.query_positions, values + module.key_positions, values)
        weights, biases = module.attn.in_proj_weight.chunk(3), module.attn.in_proj_bias.chunk(3)
        q, k, v = (
            (s @ w.T + b).unflatten(-1, (2, 128)).transpose(-2, -3)
            for s, w, b in zip(sides, weights, biases, strict=True)
        )
        attended = ((q @ k.transpose(-1, -2)) / 128**0.5).softmax(-1) @ v
        torch.testing.assert_close(module(x), module.attn.out_proj(attended.transpose(1, 2).flatten(2)))
        corner = module.key_positions.view(24, 24, -1)[0, 0]  # bicubic, a sixth of a patch before the first position
        assert not torch.equal(module.key_positions[0], module.key_positions[1])
        assert (corner - module.query_positions[0]).abs().max() < 0.5

    def test_llavas_mlp_is_the_variant_mlp(self):
        projector = SPProjector(small("mlp"), dtype=torch.float64)
        mlp = field_peers.mlp(field_peers.Shape(24, 16, 24)).double()
        projector.patch_mlp.load_state_dict(mlp.state_dict())
        x = torch.randn(2, 576, 16, dtype=torch.float64)
        torch.testing.assert_close(projector(x), mlp(x))


def test_streamed_is_exact():
    """Outputs and every gradient of float64 with weights that are made when they are met."""
    config, device = small("crop-dfi"), torch.device("cpu")
    weights = random_weights(config, 0, torch.float32, device)
    x, found = torch.randn(2, 576, 16), []
    for kind in (Exact, Streamed):
        implementation = kind(config, weights, device)
        (tokens,) = implementation.whole(*implementation.accept((x,)))
        tokens.square().sum().backward()
        keys = sorted(implementation.gradient_keys())
        found.append({"tokens": tokens, **{key: implementation.gradient(key) for key in keys}})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 1 + len(weights)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    assert not any(p.numel() > 10_000 for p in implementation.module.parameters())
