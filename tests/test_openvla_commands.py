"""OpenVLA from the command line: latency by stage, bad checkpoints, memory of loading, and the whole road with a small one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data.__main__ import COMMANDS as DATA
from eval.__main__ import COMMANDS as EVAL
from spvla import Observation, accelerate
from spvla.cli import run
from spvla.history import Source
from spvla.vlas.openvla import untrained
from spvla.vlas.openvla.config import OpenVLAConfig
from spvla.vlas.openvla.model import OpenVLAModel
from spvla.vlas.openvla.weights import save_pretrained
from spvla.vlas.registry import load_vla

pytestmark = pytest.mark.slow  # needs a simulator, a server, a training or the clock

ROOT = Path(__file__).parents[1]
SMALL = yaml.safe_load((ROOT / "configs" / "eval" / "openvla_dry_run.yaml").read_text())["vla_options"]
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random checkpoint in the published form, with statistics for all four suites."""
    bounds = {"q01": [-0.9] * 6 + [0.0], "q99": [0.9] * 6 + [1.0], "mask": [True] * 6 + [False]}
    model = untrained(**SMALL, norm_stats={f"{suite}_no_noops": {"action": bounds} for suite in SUITES})
    with torch.no_grad():  # initial weights are so small that every image gives the same action
        for p in model.model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    folder = tmp_path_factory.mktemp("openvla") / "checkpoint"
    save_pretrained(model.model, folder)
    return folder


def call(commands, *arguments):
    return run(commands, "x", [str(a) for a in arguments])


# ------------------------------------------------------------------------------------------------------- latency


def test_latency_tells_stages_tokens_and_ratios(checkpoint, tmp_path):
    options = ("--vla", "openvla", "--checkpoint", checkpoint, "--suite", "libero_10", "--repeats", 3)
    few = ("--pruning", "{few: {speed: constant, keep: 0.5, budget: 9, contour_fraction: 0.25}}", "--keep_ratios", 0.5)
    beside = ("--export", ROOT / "spvla/pretrained/generator_libero_expert", "--steps", 50)
    assert call(EVAL, "latency", *options, *few, *beside, "--output", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row.get("generator") for row in summary["rows"]} == {None, "mlp", "transformer", "ridge"}
    assert summary["device"] == "cpu" and summary["dtype"] == "float32" and "sdpa" in summary["attention"]
    rows = {row["pruning"]: row for row in summary["rows"] if "pruning" in row}
    tokens = {"none": 64, "keep 0.5": 32, "few": 9, "none, eager": 64, "none, verified": 64}
    assert {name: row["visual_tokens_mean"] for name, row in rows.items()} == tokens
    assert {rows[name]["same_tokens"] for name in ("none", "none, eager", "none, verified")} == {1.0}
    language = rows["none"]["limit_ms"] - rows["none, verified"]["limit_ms"]  # six more readings of the language model
    assert 0 < language < rows["none"]["limit_ms"] and rows["none"]["limit_ratio"] > 0
    assert rows["none"]["prefill_ratio"] == 1 and rows["none"]["overhead_share"] == 0 < rows["few"]["overhead_share"]
    assert rows["few"]["gflop"] < rows["keep 0.5"]["gflop"] < rows["none"]["gflop"]
    stages = {(s["pruning"], s["stage"]) for s in summary["stages"]}
    everywhere = {"preprocess", "vision", "projector", "prefill", "decode", "total"}
    for name in rows:
        assert {(name, stage) for stage in everywhere} <= stages
    assert ("few", "contours") in stages and ("none", "contours") not in stages


def test_untrained_needs_no_checkpoint():
    vla = load_vla("spvla.vlas.openvla:untrained", None, {**SMALL, "dtype": "bfloat16"}, "libero_goal")
    assert vla.action_space.control_rate == 20 and vla.model.dtype == torch.bfloat16
    vla.reset("open the drawer")
    assert vla.predict(Observation(np.zeros((64, 64, 3), np.uint8))).visual_tokens == (64, 64)


# ----------------------------------------------------------------------------------------------------- bad input


def tensors(change):
    def apply(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return apply


def config(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def as_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "arguments", "culprit"),
    [
        (tensors(lambda t: t.pop("projector.fc1.bias")), (), "missing from the weights: projector.fc1.bias"),
        (tensors(lambda t: t.update({"more.bias": torch.zeros(3)})), (), "more.bias (model.safetensors)"),
        (tensors(lambda t: t.update({"projector.fc1.bias": torch.zeros(3)})), (), "projector.fc1.bias has shape (3,)"),
        (config(timm_model_ids=["resnet50", "vit_base_patch16_siglip_224"]), (), "encoder 'resnet50' is unknown"),
        (config(model_type="llava"), (), "model_type is 'llava'"),
        (as_pickle, (), "pickles (pytorch_model.bin)"),
        (lambda f: (f / "tokenizer.json").unlink(), (), "tokenizer.json: missing"),
        (None, ("--suite", "libero_90"), "available: libero_spatial_no_noops, libero_object_no_noops"),
        (None, ("--vla_options.unnorm_key", "bridge"), "no statistics for 'bridge'; available: libero_spatial_no_noops"),
        (None, ("--vla_options.dtype", "int4"), "dtype 'int4' is unknown; available: float32, bfloat16, float16"),
        (None, ("--vla_options.device", "abacus"), "device 'abacus'"),
        (None, ("--vla_options.device", "cuda:99"), "device 'cuda:99': torch finds"),
        (None, ("--vla_options.conventions", "simpler"), "conventions 'simpler' are unknown; available: libero"),
        (None, ("--vla_options.conventions", "{crop: 1}"), "conventions: 'crop' is unknown"),
        (None, ("--vla_options.unorm_key", "x"), "takes no option 'unorm_key'; it takes: suite, unnorm_key"),
        (None, ("--suite", "libero_10", "--vla_options.adapter", "/nowhere/lora"), "/nowhere/lora"),
        (None, ("--suite", "libero_10", "--instruction", ""), "instruction: expected a sentence"),
        (None, ("--suite", "libero_10", "--instruction", "mug " * 2100), "leaves room for"),
        (None, ("--suite", "libero_10", "--keep_ratios", 1.5), "keep_ratios"),
        (None, ("--suite", "libero_10", "--pruning", "{fast: {speed: fast_fewer}}"), "pruning 'fast'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(damage, arguments, culprit, checkpoint, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if damage is not None:
        damage(folder)
    what = ("--vla", "openvla", "--checkpoint", folder, "--output", tmp_path / "out")
    assert call(EVAL, "latency", *what, *(arguments or ("--suite", "libero_10"))) == 2
    error = capsys.readouterr().err
    last = error.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("error: ") and culprit in last


def test_no_checkpoint_is_told(capsys, tmp_path):
    assert call(EVAL, "latency", "--vla", "openvla", "--output", tmp_path) == 2
    assert capsys.readouterr().err == "error: policy 'openvla' needs a checkpoint: a folder or hf://owner/name\n"
    assert call(EVAL, "latency", "--output", tmp_path) == 2
    assert "--export" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ memory of loading

LOAD = """
import sys, torch
from pathlib import Path
from spvla.vlas.openvla import from_pretrained
import transformers.models.llama.modeling_llama, safetensors.torch
def memory(key):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(key)) * 1024
before = memory("VmRSS")
from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(memory("VmHWM") - before)
"""


def write_like_7b(folder, layers):
    """A random bfloat16 checkpoint of 7B-shaped parts in shards, written without holding it; returns its bytes."""
    published = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    options = {
        "timm_model_ids": ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"),
        "image_sizes": (224, 224),
        "timm_model_kwargs": ({"depth": 2}, {"depth": 2}),
        "text_config": {**published, "num_hidden_layers": layers},
        "norm_stats": {"one": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
    }
    save_pretrained(untrained(**SMALL).model, folder)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    parsed = OpenVLAConfig(**options)
    for name, content in zip(("config.json", "preprocessor_config.json"), parsed.to_dicts(), strict=True):
        (folder / name).write_text(json.dumps(content))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in OpenVLAModel(parsed).named_parameters()}
    weight_map, shard, size = {}, {}, 0

    def flush():
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in shapes.items():
        shard[name] = torch.randn(shape, dtype=torch.bfloat16)
        size += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) > 4e8:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_takes_hardly_more_memory_than_the_weights(tmp_path):
    """With one and with three of the 32 layers of the 7B model; the peak is extrapolated linearly to all of them."""
    sizes, peaks = [], []
    for layers in (1, 3):
        folder = tmp_path / str(layers)
        sizes.append(write_like_7b(folder, layers))
        done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True, cwd=ROOT)
        peaks.append(int(done.stdout))
        for file in folder.iterdir():
            file.unlink()
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    whole = 15.1e9  # bytes of the published checkpoints
    extrapolated = (peaks[1] + slope * (whole - sizes[1])) / whole
    for size, peak in zip(sizes, peaks, strict=True):
        print(f"{size / 1e9:.2f} GB of weights: {peak / 1e9:.2f} GB more at the peak of loading, {peak / size:.3f} x")
    print(f"extrapolated to the {whole / 1e9:g} GB of the 7B model: {extrapolated:.3f} x")
    assert slope < 1.2 and extrapolated < 1.2


# ------------------------------------------------------------------------------------------------- the four commands


def test_the_whole_road(checkpoint, tmp_path):
    """Collect, distil, closed loop by shipped configurations, and accelerate in code."""
    pytest.importorskip("libero", reason="the libero extra is not installed")
    train = pytest.importorskip("train.__main__").COMMANDS
    av = pytest.importorskip("av", reason="the eval extra is not installed")
    from data.store import RolloutStore

    vla = ("--vla", "openvla", "--checkpoint", checkpoint, "--tasks", 0, "--workers", 1, "--max_steps")
    rollouts, export = tmp_path / "rollouts", tmp_path / "export"
    where = ("--suite", "libero_object", "--init_states", "0-3,20-22", "--output", rollouts)
    assert call(DATA, "collect", *vla, 12, *where) == 0
    store = RolloutStore(rollouts)
    assert store.frames == 7 * 12 and not np.isnan(store.arrays["targets"]).any()
    fast = ("--steps", 10, "--gate_steps", 10, "--mlp", "{width: 16, depth: 1}", "--gate", "{width: 8, depth: 1}")
    assert call(train, "distill", "--data", rollouts, "--output", export, *fast, "--default_risk", 0.5) == 0
    accelerated = ("--export", export, "--suite", "libero_object", "--init_states", 4, "--output", tmp_path / "on_policy")
    assert call(DATA, "collect", *vla, 6, *accelerated, "--pruning", "slow_fewer") == 0

    for suite in (SUITES[0], "libero_10"):  # the other two differ in their numbers alone
        shipped = ROOT / "configs" / "eval" / f"openvla_{suite}.yaml"
        output = tmp_path / suite
        cells = yaml.safe_load(shipped.read_text())["cells"]
        half = ("--pruning.half", "{speed: constant, measure: ratio, keep: 0.5, contours: false}")
        extra = ("--cells", *cells, "vla+half", *half, "--init_states", 0, "--export", export)
        timing = ("--timing_episodes", int(suite == "libero_10"))
        assert call(EVAL, "closed_loop", "--config", shipped, *vla, 6, *extra, *timing, "--output", output) == 0
        rows = {row["cell"]: row for row in json.loads((output / "summary.json").read_text())["rows"]}
        assert list(rows) == ["vla", *cells[:-1], f"{cells[-1]}@0.5", "vla+half"]
        assert rows["vla"]["visual_tokens_mean"] == 64 and rows["vla+half"]["visual_tokens_mean"] == 32
        assert rows["vla"]["steps_per_episode"] == 6
    assert rows["vla+half"]["vla_prefill_ms_p50"] > 0
    with av.open(str(output / "films" / "vla+half.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 6
    assert call(EVAL, "report", "--results", tmp_path, "--output", tmp_path / "report.html") == 0
    assert "VLA, pruning half" in (tmp_path / "report.html").read_text()

    model = load_vla("openvla", str(checkpoint), suite="libero_object")
    policy = accelerate(model, export, pruning={"speed": "constant", "keep": 0.3, "contours": False})
    policy.reset("pick up the milk and place it in the basket")
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for _ in range(6):
        policy.select_action(Observation(image, state=np.zeros(8)))
        step = policy.last_step
        assert step.source == Source.GENERATOR or step.visual_tokens[0] < step.visual_tokens[1] == 64
