"""``lazyllm check``, without an engine."""

import json

import pytest
from harness.tiny import LLAMA, tiny_model

import vllm

from lazyllm_vllm import __version__
from lazyllm_vllm.cli import diagnosis
from lazyllm_vllm.cli.main import main
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.operations import flops
from lazyllm_vllm.plan.schedule import Schedule

CONFIG = {
    "prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.2}],
    "schedules": {"mild": [{"layer": 4, "keep": 0.6}]},
    "min_prompt_tokens": 100,
}
FLAGS = ["--dtype", "float32", "--skip-tokenizer-init", "--block-size", "16"]
# Bytes of a page, 16 tokens' keys and values of 2 heads of 32 in fp32, and of a hidden state.
PAGE, VECTOR = 16 * 2 * 2 * 32 * 4, 64 * 4
SCHEDULE = Schedule.build(parse_config(CONFIG), 6)
NEEDS = BlockNeeds(SCHEDULE, 16, PAGE, VECTOR)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with config.json and nothing else."""
    return str(tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As on a machine that is no server, where the tests' engines are told how much memory to take;
    and what the command sets for its own process stays no longer than a test."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


@pytest.fixture
def check(model, capsys):
    """Runs it: exit code and what it prints; as JSON."""

    def run(*flags: str, config: dict | str = CONFIG, model: str = model):
        text = config if isinstance(config, str) else json.dumps(config)
        code = main(["check", model, "--json", "--lazyllm-config", text, *FLAGS, *flags])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_what_would_start(check, model):
    code, found = check("--lengths", "99", "1000")
    assert code == 0 and found["error"] is None
    assert found["versions"] == {"vllm": vllm.__version__, "lazyllm-vllm": __version__}
    assert found["gpu"] is None
    assert found["model"] == {
        "name": model,
        "class": "LlamaForCausalLM",
        "tested": True,
        "layers": 6,
        "dtype": "float32",
        "max_model_len": 4096,
    }
    assert parse_config(found["config"]) == parse_config(CONFIG)
    assert found["switched_off"] == ["torch.compile of the model"]
    assert found["schedule"] == {
        "stages": [
            {"layers": [1, 2], "keep": 1.0},
            {"layers": [3, 4], "keep": 0.5},
            {"layers": [5, 6], "keep": 0.2},
        ],
        "choices": {"mild": [1.0, 1.0, 0.6]},
        "decode": "resident",
        "revives": True,
        "revive_budget": 64,
        "min_prompt_tokens": 100,
    }
    short, long = found["lengths"]
    assert short["tokens"] == 99 and not short["pruned"] and short["ratio"] == 1
    plan = SCHEDULE.plan(1000)
    assert long["kept"] == list(plan.kept) == [1000, 500, 200]
    assert long["blocks"] == NEEDS.total(1000, 1000)
    shape = LLAMA | {"num_hidden_layers": 6}
    assert long["operations"] == flops(shape, ((2, 0.5), (4, 0.2)), 1000)
    assert long["stock_operations"] == flops(shape, (), 1000)
    assert long["ratio"] == long["stock_operations"] / long["operations"] > 1.5


def test_room_of_each_gib(check):
    _, found = check()
    room = found["kv_cache"]
    blocks = 2**30 // (NEEDS.pages * PAGE)
    assert (room["of"], room["block_size"], room["blocks"]) == ("each GiB", 16, blocks)
    assert room["tokens"] == pytest.approx(blocks / NEEDS.total(4096, 4096) * 4096, abs=1)
    assert room["stock_tokens"] == pytest.approx(2**30 / (6 * PAGE) * 16, rel=0.01)
    assert room["ratio"] == room["tokens"] / room["stock_tokens"]
    _, found = check("--kv-cache-memory-bytes", str(2**28))
    assert found["kv_cache"]["blocks"] == 2**28 // (NEEDS.pages * PAGE)


def test_room_of_a_gpu(check, model, tmp_path, monkeypatch):
    """What its memory leaves beside the weights."""
    monkeypatch.setattr(diagnosis, "_gpu", lambda: {"name": "G", "bytes": 100 * 2**20})
    folder = tiny_model(tmp_path)
    with (folder / "model.safetensors").open("wb") as weights:
        weights.truncate(10 * 2**20)
    code, found = check("--gpu-memory-utilization", "0.9", model=str(folder))
    assert code == 0 and found["kv_cache"]["of"] == "this GPU"
    assert found["kv_cache"]["blocks"] == 80 * 2**20 // (NEEDS.pages * PAGE)
    with (folder / "model.safetensors").open("wb") as weights:
        weights.truncate(89 * 2**20)
    code, found = check("--gpu-memory-utilization", "0.9", model=str(folder))
    assert code == 1 and "needs" in found["error"] and "--max-model-len" in found["error"]


@pytest.mark.parametrize(
    ("flags", "config", "says"),
    [
        (["--enable-lora"], CONFIG, "LoRA does not work with LazyLLM; --enable-lora: leave it out"),
        (["--pipeline-parallel-size", "2"], CONFIG, "--pipeline-parallel-size: set it to 1"),
        ([], '{"keep": 1}', "keep: unknown field"),
        ([], {"prune": [{"layer": 7, "keep": 0.5}]}, "layer 7 is outside the model"),
        (["--no-such-flag"], CONFIG, "unrecognized arguments: --no-such-flag"),
        (["--max-model-len", "many"], CONFIG, "--max-model-len"),
        (["--max-model-len", "100000"], CONFIG, "100000"),
        (["--num-gpu-blocks-override", "20"], CONFIG, "there are at most 20"),
        (["--lengths", "5000"], CONFIG, "--lengths: 5000 is not in 1 to 4096"),
    ],
)
def test_what_would_not_start(check, flags, config, says):
    code, found = check(*flags, config=config)
    assert code == 1 and says in found["error"]
    assert found.keys() == {"error", "versions", "gpu"}


def test_a_model_that_does_not_work(check, tmp_path):
    model = tiny_model(tmp_path, architectures=["MambaForCausalLM"])
    code, found = check(model=str(model))
    assert code == 1 and "which was not tested with LazyLLM" in found["error"]
    code, found = check(model=str(tmp_path / "nothing"))
    assert code == 1 and str(tmp_path / "nothing") in found["error"]


def test_a_plugin_that_vllm_does_not_load(check, monkeypatch):
    monkeypatch.setattr(diagnosis, "is_installed", lambda: False)
    code, found = check()
    assert code == 1 and "VLLM_PLUGINS" in found["error"]


def test_another_release_of_vllm(check, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    code, found = check()
    assert code == 1 and "works with vLLM 0.32" in found["error"]


def test_tables(model, capsys):
    """By default for the preset balanced."""
    assert main(["check", model, *FLAGS, "--lengths", "2000"]) == 0
    shown = capsys.readouterr().out
    assert "LlamaForCausalLM, 6 layers, float32, at most 4,096 tokens: would start" in shown
    assert "x fewer" in shown and "KV cache, each GiB" in shown
    assert main(["check", model, *FLAGS, "--enable-lora"]) == 1
    assert "would not start: lazyllm: LoRA does not work" in capsys.readouterr().out


def test_a_command_line_that_cannot_be_read(model):
    for wrong in (["check"], ["chekc"], ["check", model, "--lengths", "few"]):
        with pytest.raises(SystemExit) as exit:
            main(wrong)
        assert exit.value.code == 2
