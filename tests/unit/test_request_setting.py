"""What a request may set for itself, and what of its prompt it then keeps."""

import pytest

from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import ConfigError, parse_config
from lazyllm_vllm.plan.request_setting import DEFAULT, RequestSetting, SettingError
from lazyllm_vllm.plan.schedule import Schedule

CONFIG = {
    "prune": [{"layer": 4, "keep": 0.5}, {"layer": 8, "keep": 0.2}],
    "schedules": {
        "mild": [{"layer": 6, "keep": 0.6}],
        "fast": [{"layer": 4, "keep": 0.3}, {"layer": 8, "keep": 0.1}],
    },
    "min_prompt_tokens": 100,
}


@pytest.fixture
def schedule():
    return Schedule.build(parse_config(CONFIG), 12)


@pytest.mark.parametrize(
    "extra, setting",
    (
        (None, DEFAULT),
        ({"other": 1}, DEFAULT),
        ({"lazyllm": "off"}, RequestSetting("off")),
        ({"lazyllm": "mild", "lazyllm_keep": 2}, RequestSetting("mild", 2.0)),
        ({"lazyllm_revive": "off"}, RequestSetting(revive=False)),
        ({"lazyllm_revive": True, "lazyllm_keep": 1}, DEFAULT),
        ({"lazyllm_revive": 0}, RequestSetting(revive=False)),
        ({"lazyllm_reuse": "off"}, RequestSetting(reuse="off")),
        ({"lazyllm_reuse": "exact"}, RequestSetting(reuse="exact")),
    ),
)
def test_settings(extra, setting, schedule):
    assert schedule.setting(extra) == setting


@pytest.mark.parametrize(
    "extra, field, says",
    (
        ({"lazyllm": "balanced"}, "lazyllm", "none of off, mild, fast"),
        ({"lazyllm": ["off"]}, "lazyllm", "none of"),
        ({"lazyllm_keep": 0.9}, "lazyllm_keep", "1 or more"),
        ({"lazyllm_keep": "2"}, "lazyllm_keep", "1 or more"),
        ({"lazyllm_keep": float("nan")}, "lazyllm_keep", "1 or more"),
        ({"lazyllm_keep": float("inf")}, "lazyllm_keep", "1 or more"),
        ({"lazyllm_keep": True}, "lazyllm_keep", "1 or more"),
        ({"lazyllm_revive": "maybe"}, "lazyllm_revive", "on or off"),
        ({"lazyllm_revive": ["on"]}, "lazyllm_revive", "on or off"),
        ({"lazyllm_revive": 2}, "lazyllm_revive", "on or off"),
        ({"lazyllm_reuse": "deep"}, "lazyllm_reuse", "server's own reuse is exact"),
        ({"lazyllm_reuse": ["off"]}, "lazyllm_reuse", "none of off, exact"),
        ({"lazyllm_kep": 2}, "lazyllm_kep", "lazyllm_keep"),
    ),
)
def test_what_is_wrong_names_the_field(extra, field, says, schedule):
    with pytest.raises(SettingError, match=says) as error:
        schedule.setting(extra)
    assert error.value.field == field and field in str(error.value)


def test_reuse_is_the_servers_unless_a_request_wants_less():
    for own, allowed in (("off", 1), ("exact", 2), ("deep", 3)):
        schedule = Schedule.build(parse_config(CONFIG | {"reuse": own}), 12)
        assert schedule.reuse(DEFAULT) == own
        for at, wanted in enumerate(("off", "exact", "deep")):
            if at < allowed:
                assert schedule.reuse(schedule.setting({"lazyllm_reuse": wanted})) == wanted
            else:
                with pytest.raises(SettingError):
                    schedule.setting({"lazyllm_reuse": wanted})


def test_the_stages_are_those_of_all_schedules(schedule):
    assert schedule.starts == (0, 4, 6, 8, 12)
    assert schedule.keeps == (1, 0.5, 0.5, 0.2)
    assert dict(schedule.others) == {"mild": (1, 1, 0.6, 0.6), "fast": (1, 0.3, 0.3, 0.1)}
    assert schedule.names == ("mild", "fast")
    assert Schedule.build(parse_config("balanced"), 12).names == ("balanced",)


def test_a_schedule_may_be_a_preset():
    """``balanced`` cuts at a third and two thirds of twelve layers."""
    schedule = Schedule.build(parse_config(CONFIG | {"schedules": {"fast": "balanced"}}), 12)
    assert schedule.starts == (0, 4, 8, 12)
    assert dict(schedule.others) == {"fast": (1, 0.5, 0.2)}


def test_what_a_request_keeps(schedule):
    def plan(*setting, **fields):
        return schedule.plan(1000, RequestSetting(*setting, **fields))

    assert plan() == schedule.plan(1000) and plan().kept == (1000, 500, 500, 200)
    assert plan("off").kept == (1000,) * 4 and not plan("off").is_pruned
    assert plan("mild").kept == (1000, 1000, 600, 600)
    assert plan("fast", 2.0).kept == (1000, 600, 600, 200)
    assert plan("mild", 5.0).kept == (1000,) * 4 and not plan("mild", 5.0).is_pruned
    assert plan("mild").capacity == (1000, 1000, 640, 640)
    assert plan("mild", revive=False).capacity == plan("mild").kept
    assert schedule.plan(99, RequestSetting("fast")).kept == (99,) * 4, "too short"


@pytest.mark.parametrize("name, most", (("conservative", 599), ("off", 1999)))
def test_how_many_tokens_may_go_on(name, most):
    """Of 2,000 tokens the default preset keeps 1,000 in two of twelve layers and 400 in four: 3,600
    pairs, as many as 600 tokens make in those six layers. Where nothing is dropped any go on."""
    schedule = Schedule.build(parse_config("conservative"), 12)
    plan = schedule.plan(2000, RequestSetting(name))
    fits = [more for more in range(1, 2000) if schedule.goes_on_sooner(2000 - more, plan)]
    assert fits == list(range(1, most + 1))


def test_who_only_prunes_if_asked():
    """Hits leave the window wherever a request may have it score."""
    config = parse_config(CONFIG | {"prune": []})
    schedule = Schedule.build(config, 12)
    assert not schedule.plan(1000).is_pruned and schedule.prunes
    assert schedule.may_prune(1000) and not schedule.may_prune(99)


@pytest.mark.parametrize("setting", ("off", "mild", "fast"))
def test_blocks_of_a_plan(setting, schedule):
    """Never more of the prompt's own group than any request may need."""
    needs = BlockNeeds(schedule, block_size=16, page_size=16 * 1024, vector_size=1024)
    plan = schedule.plan(1000, RequestSetting(setting, 1.3))
    assert needs.prompt_blocks(plan) <= needs.most_prompt_blocks(1000)
    assert needs.total_of(schedule.plan(1000), 1000) == needs.total(1000, 1000)


@pytest.mark.parametrize(
    "schedules, says",
    (
        ({"off": "balanced"}, "'off' is taken"),
        ({"": "balanced"}, "empty"),
        ([["a", "balanced"], ["a", "balanced"]], "'a' is taken"),
        ({"a": [{"layer": 3, "keep": 0.2}, {"layer": 2, "keep": 0.1}]}, "schedules.a: layers"),
        ({"a": [{"layer": 3, "keep": 0.2}, {"layer": 5, "keep": 0.3}]}, "schedules.a: keep may"),
        ({"a": "quick"}, "schedules"),
        ({"a": [{"layr": 3, "keep": 0.2}]}, "layr: unknown field; known: layer, keep"),
    ),
)
def test_a_bad_schedule_is_refused(schedules, says):
    with pytest.raises(ConfigError) as error:
        parse_config({"schedules": schedules})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_schedules_survive_the_way_through_json():
    config = parse_config(CONFIG)
    assert parse_config(config.model_dump(mode="json", exclude_unset=True)) == config
    assert hash(config) == hash(parse_config(CONFIG))
    with pytest.raises(ConfigError, match="layer 40 is outside"):
        Schedule.build(parse_config({"schedules": {"a": [{"layer": 40, "keep": 0.5}]}}), 12)
