"""What a config will take, foretold without taking it."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from omegaconf import DictConfig, OmegaConf
from ranks import free_port
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtune.models.llama3 import llama3_70b, lora_llama3
from transformers import LlamaConfig, LlamaForCausalLM

from humanline._cli import main
from humanline.errors import ConfigError
from humanline.models.gemma2 import gemma2_27b
from humanline.models.gemma3 import gemma3_27b
from humanline.planning import Estimate, rehearse, report, with_overrides
from humanline.planning._layers import depths
from humanline.planning._meter import Meter

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "configs"


def config(name: str, **changes):
    cfg = OmegaConf.load(CONFIGS / f"{name}.yaml")
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


@functools.cache
def rehearsed_yaml(cfg: str, ranks: int) -> Estimate:
    return rehearse(OmegaConf.create(cfg), ranks)


def rehearsed(cfg: DictConfig, ranks: int) -> Estimate:
    """`rehearse`, once for each config: it takes seconds, and several tests ask for the same ones."""
    return rehearsed_yaml(OmegaConf.to_yaml(cfg), ranks)


@pytest.fixture
def nothing_twice(monkeypatch):
    """A report does not rehearse again what has been rehearsed here, by another report above all."""
    monkeypatch.setattr("humanline.planning._plan.rehearse", rehearsed)


TINY = {
    "_component_": "torchtune.models.llama3.llama3",
    **{"vocab_size": 1000, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
    **{"embed_dim": 64, "intermediate_dim": 256, "max_seq_len": 512},
}


# ---- The meter


@pytest.mark.parametrize("fake", [False, True])
def test_a_storage_counts_from_its_first_byte_to_its_last_reference(fake):
    meter = Meter(embed_dim=256)
    meter.moment = (1, "head")
    with FakeTensorMode() if fake else torch.no_grad(), meter:
        with meter.label("weights"):
            weights = torch.zeros(1024, 1024)
        a = torch.zeros(256, 256)
        view = a.t()
        b = a @ a
        del a, view
        logits = torch.zeros(1000, 50)
        assert dict(meter.now) == {"weights": 2**22, "activations": 2**18, "logits": 200_192}  # whole blocks of 512
        meter.relabel(b, "gradients")
        del logits
        weights.untyped_storage().resize_(0)
    assert +meter.now == {"gradients": 2**18}
    assert meter.peak == {"weights": 2**22, "activations": 2 * 2**18}  # `a` was gone when the logits came
    assert meter.flops == 2 * 256**3


# ---- The prediction


MEASURED = {
    "_component_": "torchtune.models.llama3.llama3",
    **{"vocab_size": 16384, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "rope_base": 10000},
    **{"embed_dim": 256, "intermediate_dim": 768, "max_seq_len": 512},
}


def random_weights(folder: Path) -> Path:
    """A checkpoint of that shape."""
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 16384}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, rope_theta=1e4, rms_norm_eps=1e-5))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_peak_on_a_cpu_is_as_foretold(tmp_path, ranks):
    length, rows = 256, 2
    prompt = length // 5
    responses = [[[7 + side] * ((length - prompt) // 2 + 1) for side in range(2)] for _ in range(8 * ranks)]
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps({"prompt": [5] * prompt, "responses": each}) + "\n" for each in responses))
    cfg = config(
        "smollm2_135m_dpo",
        output_dir=str(tmp_path / "out"),
        tokens_per_row=length,
        dtype="fp32",  # many a CPU has no bfloat16 products of its own, and takes minutes for them
        rows_per_pass=rows,
        batch_size=2 * rows,
        max_steps_per_epoch=2,
        run_val_every_n_steps=None,
        enable_activation_checkpointing=ranks == 2,
        model=MEASURED,
        checkpointer__checkpoint_dir=str(random_weights(tmp_path / "model")),
        reference___component_="humanline.reference.ModelReference",
        dataset={"_component_": "humanline.data.encoded_groups", "source": str(data)},
        dataset_val=None,
        tokenizer=None,
    )
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    recipe = f"humanline_dpo_{'single_device' if ranks == 1 else 'distributed'}.py"
    command = [sys.executable, ROOT / "tests" / "measured_run.py", ROOT / "recipes" / recipe]
    # Freed tensors go back to the system at once, so that what is measured is what is in use.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if ranks > 1:
        env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    running = [
        subprocess.Popen(
            [*map(str, command), "--config", str(tmp_path / "config.yaml")],
            env=env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert all("grown by" in output for output in outputs), outputs
    foretold = rehearsed(OmegaConf.load(tmp_path / "config.yaml"), ranks).total
    for output in outputs:
        measured = int(re.search(r"grown by (\d+)", output)[1])
        assert measured == pytest.approx(foretold, rel=0.15)


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_weights_gradients_and_states_are_four_copies_of_the_parameters(objective):
    peak = rehearsed(config(f"smollm2_135m_{objective}", rows_per_pass=1), 1).peak
    parameters = 134_515_008
    tables = peak["weights"] - 4 * parameters  # of rotary positions
    assert 0 < tables < 1e7
    assert peak["gradients"] == pytest.approx(4 * parameters, rel=1e-3)
    assert peak["optimizer"] == pytest.approx(8 * parameters, rel=1e-3)


def test_the_logits_of_the_head_are_counted_as_logits():
    peak = rehearsed(config("qwen2_5_1_5b_lora"), 1).peak
    assert 2**28 < peak["logits"] < 4 * 2**28  # a piece in float32, its gradient, and copies in bfloat16


def test_ranks_divide_what_is_sharded_and_gather_it_layer_by_layer():
    one, eight = (rehearsed(config("llama3_8b_offline"), ranks).peak for ranks in (1, 8))
    for label in ("weights", "gradients", "optimizer"):
        assert eight[label] == pytest.approx(one[label] / 8, rel=0.01)
    layer, output = 218e6 * 2, 128_256 * 4096 * 2
    assert layer < eight["gathered weights"] < 3 * output + 3 * layer


ALIKE = TINY | {"num_layers": 11}
ADAPTED = ALIKE | {
    "_component_": "torchtune.models.llama3.lora_llama3",
    **{"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8},
}


@pytest.mark.parametrize(
    ("name", "model", "ranks", "changes"),
    [
        ("smollm2_135m_dpo", ALIKE, 1, {"enable_activation_checkpointing": True, "rows_per_pass": 2}),
        ("smollm2_135m_dpo", ALIKE, 2, {"reference___component_": "humanline.reference.ModelReference"}),
        ("smollm2_135m_dpo_lora", ADAPTED, 1, {"save_adapter_weights_only": False}),
    ],
)
def test_few_layers_tell_exactly_what_many_take(name, model, ranks, changes, monkeypatch):
    cfg = config(name, **{"rows_per_pass": 1, **changes})  # attention on a CPU takes many operations a row
    cfg.model = model
    told = rehearse(cfg, ranks)
    monkeypatch.setattr("humanline.planning._rehearsal.depths", lambda layers: None)
    assert told == rehearse(cfg, ranks)  # of all layers


def test_a_model_of_80_layers_is_planned_by_7_and_one_whose_layers_alternate_by_14():
    with torch.device("meta"):
        assert depths(llama3_70b().layers) == (3, 4, 76)
        assert depths(gemma2_27b().layers) == (6, 8, 19)
        assert depths(gemma3_27b().layers) == (20, 26, 6)  # of which every sixth is another


def test_layers_that_do_not_repeat_all_run():
    shape = {key: value for key, value in ALIKE.items() if key != "_component_"}
    layers = lora_llama3(["q_proj"], **shape, lora_rank=4, lora_alpha=8)
    assert depths(layers.layers) == (3, 4, 7)
    layers.layers[5].attn.sliding_window = 8
    assert depths(layers.layers) is None
    for layer in layers.layers[1::2]:
        layer.attn.sliding_window = 8
    assert depths(layers.layers) is None  # seven and nine of eleven would save nothing


def test_the_size_of_what_is_written_is_foretold(tmp_path):
    cfg = config("smollm2_135m_dpo", rows_per_pass=1)
    parameters = 134_515_008
    told = rehearsed(cfg, 1)
    assert told.export == 4 * parameters and told.checkpoint == pytest.approx(12 * parameters, rel=1e-3)
    assert rehearsed(OmegaConf.merge(cfg, {"export_dtype": "bf16"}), 1).export == 2 * parameters
    adapter = config("smollm2_135m_dpo_lora", rows_per_pass=1)
    merged = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    told = rehearsed(adapter, 1)
    assert told.export == 2 * parameters + 2 * merged + 8 * 4_884_480
    assert told.checkpoint == pytest.approx(16 * 4_884_480, rel=1e-3)  # the reference's adapter too
    alone = rehearsed(OmegaConf.merge(adapter, {"save_adapter_weights_only": True}), 1)
    assert alone.export == 8 * 4_884_480


def test_groups_of_ranks_each_hold_the_whole_model():
    cfg = config("smollm2_135m_dpo", rows_per_pass=1)
    cfg.model = TINY
    two = rehearsed(cfg, 2).peak
    two_and_two = rehearsed(OmegaConf.merge(cfg, {"data_parallel_replicate_dim": 2}), 4).peak
    assert two_and_two["gradients"] == two["gradients"] and two_and_two["optimizer"] == two["optimizer"]
    assert two_and_two["weights"] == pytest.approx(two["weights"], abs=512)  # a block, of the mesh's second dimension


def test_checkpointing_a_second_model_and_longer_rows_change_what_they_should():
    cfg = config("smollm2_135m_dpo")
    base = rehearsed(cfg, 1).peak
    checkpointed = rehearsed(with_overrides(cfg, ["enable_activation_checkpointing=True"]), 1)
    assert checkpointed.peak["activations"] < base["activations"] / 4
    second = rehearsed(with_overrides(cfg, ["reference._component_=humanline.reference.ModelReference"]), 1).peak
    assert second["reference"] == pytest.approx(2 * 134_515_008, rel=0.05)
    longer = rehearsed(with_overrides(cfg, ["enable_activation_checkpointing=True", "rows_per_pass=16"]), 1)
    assert longer.peak["activations"] > 1.2 * checkpointed.peak["activations"]
    assert longer.flops == pytest.approx(2 * checkpointed.flops, rel=0.01)


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_a_plan_for_cuda_is_for_passes_of_the_full_width(objective):
    cfg = config(f"smollm2_135m_{objective}", device="cuda")
    cfg.model = TINY
    fewer, more = (rehearsed(OmegaConf.merge(cfg, {"tokens_per_row": length}), 1) for length in (512, 513))
    assert more.flops > fewer.flops  # the next width of rows of 513 tokens is 512


def test_an_adapter_on_a_base_in_4_bits_takes_what_the_guide_says():
    peak = rehearsed(config("llama3_8b_qlora"), 1).peak
    assert peak["weights"] / 1e9 == pytest.approx(5.70 + 4 * 4.19e-2, rel=0.01)
    assert (peak["gradients"] + peak["optimizer"]) / 1e9 == pytest.approx(12 * 4.19e-2, rel=0.01)
    assert peak["reference"] / 1e9 == pytest.approx(4 * 4.19e-2, rel=0.01)


def test_humanline_sampling_can_be_planned():
    cfg = config("smollm2_135m_grpo", rows_per_pass=1, loss__perception="sample", loss__gamma_P=4.0, loss__gamma_R=4.0)
    cfg.model = TINY
    assert rehearsed(cfg, 1).peak["activations"] > 0


def test_an_optimizer_that_cannot_be_rehearsed_is_named():
    cfg = config("smollm2_135m_dpo", optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-5})
    cfg.model = TINY | {"embed_dim": 256}  # torchao quantizes states of some size only
    del cfg.optimizer["fused"]
    with pytest.raises(ConfigError, match="optimizer: AdamW8bit does not run on fake tensors"):
        rehearsed(cfg, 1)


# ---- The verdict


def test_what_does_not_fit_comes_with_the_cheapest_change_that_would(nothing_twice):
    cfg = config("smollm2_135m_dpo")
    cfg.model = TINY
    peak = rehearsed(cfg, 1).total / 1e9
    checkpointed = rehearsed(OmegaConf.merge(cfg, {"enable_activation_checkpointing": True}), 1).total / 1e9
    assert checkpointed < 0.6 * peak
    fits = report(cfg, 1, device_memory=1.1 * peak, tflops=400)
    assert "It fits" in fits and re.search(rf"peak of a rank +{peak:.2f} GB", fits)
    checkpoint = report(cfg, 1, device_memory=1.1 * checkpointed, tflops=400)
    assert "It does not fit" in checkpoint and "It fits with enable_activation_checkpointing=True: " in checkpoint
    fewer = ["enable_activation_checkpointing=True", "rows_per_pass=4"]
    half = rehearsed(with_overrides(cfg, fewer), 1).total / 1e9
    assert half < 0.7 * checkpointed
    assert f"It fits with {' and '.join(fewer)}: " in report(cfg, 1, device_memory=1.09 * half, tflops=400)
    lean = "master_dtype=bf16 optimizer=humanline.training.StochasticAdamW ~optimizer.fused"
    overrides = f"enable_activation_checkpointing=True rows_per_pass=1 {lean}".split()
    least = rehearsed(with_overrides(cfg, overrides), 1).total / 1e9
    assert f"and rows_per_pass=1 and {lean}: " in report(cfg, 1, device_memory=1.09 * least, tflops=400)
    nothing = report(cfg, 1, device_memory=1e-4, tflops=400)
    assert "and --nproc 8 batch_size=2; use an adapter (LoRA, QLoRA)" in nothing


def test_a_change_that_is_not_needed_is_not_asked_for(nothing_twice):
    cfg = config(
        "smollm2_135m_dpo", data_parallel_replicate_dim=2, enable_activation_checkpointing=True, rows_per_pass=1
    )
    cfg.model = TINY | {"embed_dim": 512, "intermediate_dim": 4096}  # of which the weights are the most
    sharded = rehearsed(with_overrides(cfg, ["data_parallel_replicate_dim=1"]), 4).total / 1e9
    assert "It fits with data_parallel_replicate_dim=1: " in report(cfg, 4, device_memory=1.1 * sharded, tflops=400)
    cfg.reference._component_ = "humanline.reference.ModelReference"
    assert "It fits with data_parallel_replicate_dim=1: " in report(cfg, 4, device_memory=1.25 * sharded, tflops=400)


def test_a_base_in_4_bits_is_planned_on_several_ranks_too():
    cfg = config("llama3_8b_qlora")
    cfg.model.update({"_component_": "torchtune.models.llama3.lora_llama3", "quantize_base": True})
    cfg.model.update({"vocab_size": 1000, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 256})
    cfg.model.update({"intermediate_dim": 512, "max_seq_len": 4096})
    one, two = (rehearsed(cfg, ranks).peak["weights"] for ranks in (1, 2))
    assert 0.4 * one < two < 0.7 * one
    with pytest.raises(ConfigError, match="data_parallel_replicate_dim: an NF4 base"):
        rehearsed(with_overrides(cfg, ["data_parallel_replicate_dim=2"]), 2)


def test_operations_are_those_of_products_attention_and_the_reference():
    length, cfg = 256, config("smollm2_135m_dpo", device="cuda", tokens_per_row=256, rows_per_pass=1)
    cfg.model = TINY
    layers, width, inner, vocabulary = (
        TINY[key] for key in ("num_layers", "embed_dim", "intermediate_dim", "vocab_size")
    )
    heads = TINY["num_kv_heads"] / TINY["num_heads"]
    products = 2 * (layers * (2 * width**2 * (1 + heads) + 3 * width * inner)) * length
    attention = layers * 4 * length**2 * width
    head = 2 * width * TINY["vocab_size"] * (length - length // 5)
    window = products + attention + head  # a forward
    training = 3 * products + 3.5 * attention + 3 * head
    assert rehearsed(cfg, 1).flops == pytest.approx(window + training, rel=0.03)


def plan(*arguments: str) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("humanline")
    return subprocess.run([program, "plan", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=180)


def test_the_command_takes_a_config_s_path_and_overrides():
    done = plan("--config", "configs/smollm2_135m_grpo.yaml", *OVERRIDES)
    assert done.returncode == 0, done.stderr
    assert_is_planned(done.stdout, done.stderr)


def test_the_command_takes_a_config_s_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["humanline", "plan", "--config", "humanline/smollm2_135m_grpo", *OVERRIDES])
    main()
    assert_is_planned(*capsys.readouterr())


OVERRIDES = ("--nproc", "2", "--tflops", "1", "rows_per_pass=1", "batch_size=3")


def assert_is_planned(output, messages):
    assert "2 ranks" in output
    assert "a pass: 256 tokens" in output
    assert "at most 3 passes (a row for each group)" in output
    assert "on disk: an export 0.54 GB, a checkpoint 1.61 GB" in output
    assert "humanline plan: estimating the config as it is ..." in messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "--config: file nowhere.yaml not found"),
        (["--config", "configs/smollm2_135m_dpo.yaml", "--nproc", "0"], "--nproc: expected a number above 0, got 0"),
        (
            ["--config", "configs/smollm2_135m_dpo.yaml", "--tflops", "0"],
            "--tflops: expected a number above 0, got 0.0",
        ),
        (
            ["--config", "configs/smollm2_135m_dpo.yaml", "rows_per_pass=0"],
            "rows_per_pass: expected an integer of at least 1, got 0",
        ),
        (["--config", "configs/smollm2_135m_dpo.yaml", "batch_sise=2"], "batch_sise: not a key"),
        (
            ["--config", "configs/smollm2_135m_dpo.yaml", "~optimizer.warm"],
            "override: found no key optimizer.warm",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["humanline", "plan", *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value.code).startswith(f"humanline plan: {message}") and "\n" not in end.value.code


def test_the_command_ends_with_1_and_no_traceback():
    done = plan("--config", "nowhere.yaml")
    assert done.returncode == 1 and done.stderr.startswith("humanline plan: --config: file nowhere.yaml not found")
    assert len(done.stderr.splitlines()) == 1


def test_the_command_leaves_the_hook_of_tune_alone():
    code = "import humanline._cli, sys; sys.exit('humanline.torchtune_seam.tune_plugin' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=180).returncode == 0
