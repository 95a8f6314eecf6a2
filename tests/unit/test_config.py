"""The configuration: three ways in, one object out, one line when it is wrong."""

import json
import math
import subprocess
import sys
from typing import get_args

import pytest

from lazyllm_vllm.plan.blocks import BlockNeeds
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
@pytest.mark.parametrize("parked_pages", (0, 1, 2, 3, 4))
def test_presets_fit_any_depth(preset, num_layers, parked_pages):
    config = parse_config(preset)
    cuts = preset_cuts(preset, num_layers, parked_pages=parked_pages)
    explicit = LazyLLMConfig(prune=[{"layer": n, "keep": keep} for n, keep in cuts])
    boundaries = config.boundaries(num_layers, parked_pages=parked_pages)
    assert explicit.prune == boundaries, "and passes its own checks"
    stages = Schedule.build(config, num_layers, parked_pages=parked_pages).stage_sizes
    assert sum(stages) == num_layers and min(stages) >= 1
    if num_layers >= 12:
        assert [keep for _, keep in cuts] == [keep for _, keep in PRESETS[preset]]
        for (layer, _), (depth, _) in zip(cuts, PRESETS[preset]):
            assert abs(layer / num_layers - depth) <= 0.05
        stages[0] += parked_pages
        size = layers_per_group(stages)
        groups = sum(math.ceil(stage / size) for stage in stages)
        assert groups <= 8 + parked_pages, "KV cache groups: a page is at most one more"


def test_presets_are_the_schedules_that_were_measured():
    assert set(PRESETS) == set(get_args(Preset))
    for preset, cuts in PRESETS.items():
        exact = [(round(depth * 30), keep) for depth, keep in cuts]
        assert list(preset_cuts(preset, 30)) == exact


def test_a_preset_makes_room_for_hidden_states_too():
    """By hand, for Llama-3.1-8B: 2,048 numbers of keys and values a token and layer, so that two
    pages hold a hidden state of 4,096."""
    schedule = Schedule.build(parse_config("aggressive"), 32, parked_pages=2)
    assert schedule.starts == (0, 6, 10, 22, 32), "each within a layer of its depth"
    needs = BlockNeeds(schedule, block_size=16, page_size=16 * 2048 * 2, vector_size=4096 * 2)
    # Groups of four: two, one, three and three.
    assert needs.parked_pages == 2 and needs.stage_pages == [8, 4, 12, 10] and needs.pages == 4
    # Of 32,768 tokens stages keep 22,938, 6,554 and 3,277, and have room for a tenth of the others.
    plan = schedule.plan(32768)
    assert plan.capacity == (32768, 22938 + 983, 6554 + 2622, 3277 + 2950)
    blocks = 2 * 2048 + 1496 + 3 * 574 + 3 * 390
    # And 8 hidden states a page: 97 of them with the state of 341 positions each, 23,921 dropped.
    blocks += 751
    assert needs.total(32768, 32768) == blocks
    assert 2048 * 32 / (blocks * 4) > 1.7, "room, of stock vLLM's"


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
        ({"score_pool": 4}, "score_pool: one number must be odd"),
        ({"score_pool": -1}, "score_pool: one number must be odd"),
        ({"score_pool": [4]}, "score_pool"),
        ({"score_pool": [4, -1]}, "score_pool"),
        ({"last_tokens": 0}, "last_tokens"),
        ({"last_tokens": 8, "score_window": 9}, "score_window: 9 is more than last_tokens"),
        ({"min_keep_tokens": -1}, "min_keep_tokens"),
        ({"keep_mass": 0}, "keep_mass"),
        ({"keep_mass": 1.0}, "keep_mass"),
        (
            {"keep_mass": 0.9, "prune": [{"layer": 3, "keep": 0.5}, {"layer": 5, "keep": 1}]},
            "keep may not rise",
        ),
        ({"keep_mass": 0.9, "prune": [{"layer": 3, "keep": 1}]}, "with keep_mass the last keep"),
        ({"revive_budget": -1}, "revive_budget"),
        ({"decode": "lazy"}, "decode"),
        ({"score_carry": 1}, "score_carry"),
        ({"score": "mean", "score_carry": 0.5}, "score_carry: works with score peak alone"),
        ({"revive_min_score": -0.1}, "revive_min_score"),
        ({"revive_min_score": 2}, "revive_min_score"),
        ("no-such-file", "neither JSON, a file, nor a preset"),
        ('{"prune": ', "not valid JSON"),
        ("[1]", "neither JSON"),
        ("[" * 5000, "neither JSON"),  # longer than a file's name may be
        ('{"prune": ' + "[" * 100_000, "not valid JSON"),
        ('{"last_tokens": ' + "9" * 5000 + "}", "not valid JSON"),
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


def test_with_the_mean_nothing_goes_by_one_heads_attention_unless_it_was_set():
    mean = parse_config({"score": "mean"})
    assert (mean.score_carry, mean.revive_min_score) == (0, 0)
    assert parse_config({"score": "mean", "revive_min_score": 0.001}).revive_min_score == 0.001
    assert parse_config({}).score_carry > 0 and parse_config({}).revive_min_score > 0


@pytest.mark.parametrize(
    "content", ("prune: [", "[" * 5_000, "last_tokens: " + "9" * 5000, "score: 2020-13-45")
)
def test_a_broken_file_is_named(tmp_path, content):
    broken = tmp_path / "broken.yaml"
    broken.write_text(content)
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
    # What has keys in stage 1 may be dropped behind it; nothing that is not pruned is dropped.
    assert plan.aux_slots == 550 and schedule.plan(99).aux_slots == 0
    assert plan.state_room == 1000 and schedule.plan(99).state_room == 0
    once = Schedule.build(config.model_copy(update={"prune": config.prune[:1]}), 3)
    assert once.plan(1000).aux_slots == 0, "what the one boundary drops is parked"


def test_the_least_that_is_kept():
    fields = {"prune": [{"layer": 1, "keep": 0.5}, {"layer": 2, "keep": 0.1}]}
    schedule = Schedule.build(parse_config(fields | {"min_keep_tokens": 1200}), 3)
    assert schedule.plan(1100).kept == (1100, 1100, 1100) and not schedule.plan(1100).is_pruned
    assert schedule.plan(2000).kept == (2000, 1200, 1200) and schedule.plan(2000).is_pruned
    assert schedule.plan(20000).kept == (20000, 10000, 2000)
    assert Schedule.build(parse_config(fields), 3).plan(2000).kept == (2000, 1000, 200)


def test_what_is_decided_before_a_step_needs_neither_torch_nor_vllm():
    """The folder ``plan``, in a fresh interpreter."""
    code = "import lazyllm_vllm.plan.blocks, sys; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_third_layer_behind_the_last_boundary_scores_for_the_next_step():
    config = LazyLLMConfig(prune=[{"layer": 2, "keep": 0.5}, {"layer": 5, "keep": 0.2}])
    schedule = Schedule.build(config, 12)
    assert schedule.scoring_behind(None) == (5, 8, 11)
    # Layers are counted from 1 where their attention is told.
    assert schedule.scoring_behind((2, 5, 6, 8, 9, 11, 12)) == (5, 10)
    assert schedule.scoring_behind((2, 5)) == ()
