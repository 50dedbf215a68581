"""SPProjectorConfig: every field validated, resolved and serialised."""

import json

import numpy as np
import pytest

from sp_fast import SPProjectorConfig
from sp_fast.errors import ConfigError
from sp_fast.variants import OFFICIAL, REFUSED, VARIANTS


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_round_trip_through_json(name):
    config = SPProjectorConfig.variant(name)
    again = SPProjectorConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


TOKENS = {
    "conv336": 6, "conv336_cropping_sfe_dfi": 6, "conv336_pooling_sfe": 6, "conv336_adptive_pooling_fuse_49": 6,
    "conv336_3_tokens": 3, "conv336_12_tokens": 12, "conv336_24": 1, "conv224": 8, "conv336_conv_49": 49,
    "conv336_crop_multifuse_q": 6, "conv336_adptive_pooling_multifuse_q": 6, "tfm336": 6, "tfm336_adptive_pooling": 6,
}  # fmt: skip
FUSED = {"conv336_cropping_sfe_dfi": 1024, "conv336_adptive_pooling_fuse_49": 1024, "conv336_crop_multifuse_q": 2048,
         "conv336_adptive_pooling_multifuse_q": 1024, "tfm336": 1024, "tfm336_adptive_pooling": 1024}  # fmt: skip
BIASED = {"conv336_cropping_sfe_dfi", "conv336_adptive_pooling_multifuse_q"}
NAN = {"conv336_cropping_sfe_dfi": 3, "conv336_adptive_pooling_fuse_49": 3, "conv336_crop_multifuse_q": 3,
       "conv336_adptive_pooling_multifuse_q": 1}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_variants(name):
    config = SPProjectorConfig.variant(name)
    assert config.spatial_tokens == TOKENS[name]
    assert config.fused_width == FUSED.get(name, 512)
    assert config.spatial_bias is (name in BIASED)
    assert len(config.nan_to_num) == NAN.get(name, 0)
    assert config.patch_tokens == (256 if name == "conv224" else 576)


def test_default_is_the_published_cropping_model():
    assert SPProjectorConfig() == SPProjectorConfig.variant("crop-dfi")
    assert SPProjectorConfig().kernel_sizes == (4, 8, 12, 16, 20, 24)
    assert SPProjectorConfig().detail_sides == (5,)


def test_without_an_extractor_there_are_patch_tokens_alone():
    config = SPProjectorConfig(extractor="none")
    assert config == SPProjectorConfig.variant("mlp", kernel_sizes=[], detail_kernel=None)
    assert (config.levels, config.kernel_sizes, config.detail_kernel, config.attends) == ((), (), None, False)
    assert (config.spatial_tokens, config.patch_tokens, config.fused_width) == (0, 576, 0)


def test_lists_become_tuples_and_one_detail_a_number():
    config = SPProjectorConfig(kernel_sizes=[4, 8], detail_kernel=[6])
    assert config.kernel_sizes == (4, 8)
    assert config.detail_kernel == 6
    assert SPProjectorConfig(detail_kernel=[]).detail_kernel is None


@pytest.mark.parametrize("name", REFUSED)
def test_leftovers_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match="not supported: .*(BatchNorm|shape error)"):
        SPProjectorConfig.variant(name)
    with pytest.raises(ConfigError, match="not supported"):
        SPProjectorConfig(extractor=name)


WRONG = {
    "pyramid": ({"pyramid": "cropp"}, "pyramid='cropp'.*'crop', 'pool', 'sliding'"),
    "extractor": ({"extractor": "mlp"}, "extractor='mlp'"),
    "fusion": ({"detail_fusion": "mean"}, "detail_fusion='mean'"),
    "nan": ({"nan_to_num": ("logit",)}, "nan_to_num='logit'"),
    "grid 0": ({"grid": 0}, "grid=0 must be a positive integer"),
    "width": ({"vision_width": 10.5}, "vision_width=10.5"),
    "bool": ({"text_width": True}, "text_width=True"),
    "kernel sizes": ({"kernel_sizes": (8, 4)}, "must ascend"),
    "kernel twice": ({"kernel_sizes": (4, 4)}, "must ascend"),
    "kernel 0": ({"kernel_sizes": (0, 4)}, "integers of 1 or more"),
    "kernel no list": ({"kernel_sizes": 4}, "must be a list"),
    "kernel too large": ({"kernel_sizes": (4, 28)}, "does not fit the 24x24 grid.*set grid="),
    "pool too large": ({"pyramid": "pool", "kernel_sizes": (4, 20), "map_size": 16}, "larger than the 16x16 map"),
    "map too large": ({"map_size": 25}, "map of side 25 does not fit"),
    "nothing": ({"kernel_sizes": (), "detail_kernel": None}, "gives no spatial tokens: .*extractor='none'"),
    "none with levels": ({"extractor": "none", "kernel_sizes": (4, 8)}, "kernel_sizes=\\(4, 8\\) is for: leave kernel_sizes out"),
    "none with details": ({"extractor": "none", "detail_kernel": 12}, "detail_kernel=12 is for: leave detail_kernel out"),
    "none with windows": ({"extractor": "none", "pyramid": "sliding"}, "pyramid='sliding' is for: leave pyramid out"),
    "detail too large": ({"detail_kernel": 25}, "detail_kernel=25 does not fit"),
    "detail beyond crop": ({"kernel_sizes": (4, 8), "detail_kernel": 12}, "detail_kernel=12 does not fit the map of side 8"),
    "two token maps": ({"kernel_sizes": (), "detail_kernel": (4, 5)}, "one detail map, not from 2"),
    "values": ({"detail_kernel": (12, 9), "detail_values": (0, 2)}, "detail_values=\\(0, 2\\) must name"),
    "sliding sizes": ({"pyramid": "sliding", "kernel_sizes": (4,)}, "takes sliding_windows"),
    "sliding pair": ({"pyramid": "sliding", "sliding_windows": (6,)}, "is not \\(rows, columns\\)"),
    "sliding odd": ({"pyramid": "sliding", "sliding_windows": (5, 2)}, "cannot tile a map of side 24"),
    "transformer width": ({"extractor": "transformer", "detail_kernel": None}, "spatial_width must be 1024"),
    "transformer detail": ({"extractor": "transformer", "spatial_width": 1024}, "set detail_kernel=None"),
    "heads": ({"extractor": "transformer", "spatial_width": 1024, "detail_kernel": None, "transformer_heads": 7},
              "transformer_heads=7 does not divide"),
    "bias": ({"spatial_bias": "false"}, "spatial_bias='false' must be True"),
    "detail bool": ({"detail_kernel": True}, "detail_kernel=True must be a positive integer"),
    "detail float": ({"detail_kernel": 16.0}, "detail_kernel=16.0 must be a positive integer"),
    "values without attention": ({"kernel_sizes": (), "detail_values": (0,)}, "detail_values=\\(0,\\) must name"),
    "nan number": ({"nan_to_num": 5}, "nan_to_num=5 must be a list"),
    "nan word": ({"nan_to_num": "logits"}, "nan_to_num='logits' must be a list"),
    "sliding transformer": ({"pyramid": "sliding", "extractor": "transformer", "spatial_width": 1024,
                             "detail_kernel": None}, "must be 'crop' or 'pool'"),
    "dropout word": ({"transformer_dropout": "0.1"}, "transformer_dropout='0.1'"),
    "dropout": ({"transformer_dropout": 1.0}, "transformer_dropout=1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case):
    values, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        SPProjectorConfig(**values)


def test_any_integer_type_will_do():
    config = SPProjectorConfig(grid=np.int64(24), kernel_sizes=[np.int32(4), 8], detail_kernel=np.int64(6))
    assert config == SPProjectorConfig(grid=24, kernel_sizes=(4, 8), detail_kernel=6)
    json.dumps(config.to_dict())


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'grid'"):
        SPProjectorConfig.from_dict({"gird": 24})
    with pytest.raises(ConfigError, match="did you mean 'grid'"):
        SPProjectorConfig.variant("crop", gridd=3)
    with pytest.raises(ConfigError, match="did you mean 'crop-dfi'"):
        SPProjectorConfig.variant("crop_dfi")
