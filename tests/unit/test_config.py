"""The configuration: three ways in, one object out, one line when it is wrong."""

import json
import math
import subprocess
import sys
from typing import get_args

import pytest

from lazyllm_vllm.plan.config import ConfigError, LazyLLMConfig, Preset, parse_config
from lazyllm_vllm.plan.grouping import layers_per_group
from lazyllm_vllm.plan.presets import PRESETS, preset_cuts
from lazyllm_vllm.plan.schedule import Schedule, ceil_share

FIELDS = {"prune": [{"layer": 3, "keep": 0.5}], "last_tokens": 16, "decode": "strict"}


def test_the_same_object_from_json_files_and_python(tmp_path):
    as_json, as_yaml = tmp_path / "a.json", tmp_path / "a.yaml"
    as_json.write_text(json.dumps(FIELDS))
    as_yaml.write_text("prune:\n- {layer: 3, keep: 0.5}\nlast_tokens: 16\ndecode: strict\n")
    expected = LazyLLMConfig(**FIELDS)
    for source in (FIELDS, json.dumps(FIELDS), str(as_json), str(as_yaml), expected):
        assert parse_config(source) == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("num_layers", (1, 2, 3, 12, 16, 28, 31, 32, 33, 80))
def test_presets_fit_any_depth(preset, num_layers):
    config = parse_config(preset)
    cuts = preset_cuts(preset, num_layers)
    explicit = LazyLLMConfig(prune=[{"layer": n, "keep": keep} for n, keep in cuts])
    assert explicit.prune == config.boundaries(num_layers), "and passes its own checks"
    stages = Schedule.build(config, num_layers).stage_sizes
    assert sum(stages) == num_layers and min(stages) >= 1
    if num_layers >= 12:
        assert [keep for _, keep in cuts] == [keep for _, keep in PRESETS[preset]]
        for (layer, _), (depth, _) in zip(cuts, PRESETS[preset]):
            assert abs(layer / num_layers - depth) <= 0.05
        size = layers_per_group(stages)
        assert sum(math.ceil(stage / size) for stage in stages) <= 8, "KV cache groups"


def test_presets_are_the_schedules_that_were_measured():
    assert set(PRESETS) == set(get_args(Preset))
    for preset, cuts in PRESETS.items():
        exact = [(round(depth * 30), keep) for depth, keep in cuts]
        assert list(preset_cuts(preset, 30)) == exact


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keeps": 1}, "keeps: unknown field"),
        ({"prune": [{"layer": 3, "kept": 1}]}, "prune.0.kept: unknown field"),
        ({"prune": [{"layer": 3, "keep": 0}]}, "prune.0.keep"),
        ({"prune": [{"layer": 3, "keep": 1.5}]}, "prune.0.keep"),
        ({"prune": [{"layer": 0, "keep": 0.5}]}, "prune.0.layer"),
        ({"prune": [{"layer": 3, "keep": 0.2}, {"layer": 5, "keep": 0.5}]}, "keep may not rise"),
        ({"prune": [{"layer": 5, "keep": 0.5}, {"layer": 5, "keep": 0.2}]}, "layers must rise"),
        ({"prune": [], "preset": "balanced"}, "prune and preset"),
        ({"preset": "best"}, "preset"),
        ({"score_pool": 4}, "score_pool: must be odd"),
        ({"last_tokens": 0}, "last_tokens"),
        ({"last_tokens": 8, "score_window": 9}, "score_window: 9 is more than last_tokens"),
        ({"revive_budget": -1}, "revive_budget"),
        ({"decode": "lazy"}, "decode"),
        ("no-such-file", "neither JSON, a file, nor a preset"),
        ('{"prune": ', "not valid JSON"),
        ("[1]", "neither JSON"),
        (7, "expected a mapping"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(wrong, says):
    with pytest.raises(ConfigError) as error:
        parse_config(wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_window_fits_the_last_tokens_unless_it_was_set():
    assert parse_config({"last_tokens": 8}).score_window == 8
    assert parse_config({"last_tokens": 8, "score_window": 2}).score_window == 2
    assert parse_config({"last_tokens": 40}).score_window == parse_config({}).score_window == 16


def test_a_broken_file_is_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("prune: [")
    with pytest.raises(ConfigError, match="broken.yaml"):
        parse_config(str(broken))


def test_a_layer_outside_the_model_is_refused():
    config = parse_config({"prune": [{"layer": 30, "keep": 0.5}]})
    with pytest.raises(ConfigError, match="layer 30 .* 30 layers; use 1 to 29"):
        Schedule.build(config, 30)


def test_shares_are_exact_decimals():
    assert ceil_share(0.3, 10) == 3  # in binary floating point 0.3 * 10 rounds up to 4
    assert ceil_share(0.1, 1001) == 101


def test_kept_counts():
    config = parse_config(
        {
            "prune": [{"layer": 1, "keep": 0.5}, {"layer": 2, "keep": 0.1}],
            "min_prompt_tokens": 100,
            "first_tokens": 4,
            "last_tokens": 30,
        }
    )
    schedule = Schedule.build(config, 3)
    assert schedule.plan(99).kept == (99, 99, 99) and not schedule.plan(99).is_pruned
    assert schedule.plan(101).kept == (101, 51, 34)  # never fewer than the always-kept 34
    plan = schedule.plan(1000)
    assert plan.kept == (1000, 500, 100) and plan.is_pruned
    assert plan.capacity == (1000, 550, 190)  # and a tenth of the dropped
    assert plan.slots_saved == (0, 450, 810)
    assert plan.aux_slots == 1000 and schedule.plan(99).aux_slots == 0


def test_what_is_decided_before_a_step_needs_neither_torch_nor_vllm():
    """The folder ``plan``, in a fresh interpreter."""
    code = "import lazyllm_vllm.plan.blocks, sys; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
