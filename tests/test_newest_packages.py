"""A fresh `pip install` of today, without constraints: the newest of every package, in an environment of its own.

Only torch is the one of the pinned set, since to install it takes minutes. What is newest changes by itself, so each
test that fails here prints the packages that it met and `constraints.txt` has not.
"""

import json

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_adapters import one_device, quantize, with_lora
from test_oldest_packages import train
from virtual_environment import VirtualEnvironment, build_wheel, copy_repository

pytestmark = pytest.mark.slow

LN_2 = pytest.approx(0.6931472, abs=1e-6)  # the loss of DPO while policy and reference are the same

# Loads the base with the adapter by PEFT, and the folder of merged weights, if one is given, by transformers.
LOAD_ADAPTER = """
import sys, peft, torch, transformers
base, adapter, *merged = sys.argv[1:]
load, tokens = transformers.AutoModelForCausalLM.from_pretrained, torch.arange(1, 25)[None]
model = load(base, dtype=torch.float32)
before, after = model(tokens).logits, peft.PeftModel.from_pretrained(model, adapter)(tokens).logits
assert after.isfinite().all() and (after - before).abs().max() > 1e-3
for folder in merged:
    torch.testing.assert_close(load(folder, dtype=torch.float32)(tokens).logits, after, atol=1e-4, rtol=0)
"""
LOAD_MODEL = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = transformers.AutoTokenizer.from_pretrained(sys.argv[1])("The capital of France is", return_tensors="pt")
print(model.generate(**prompt, max_new_tokens=4, do_sample=False).shape)
"""
OURS_IN_THIS_PROGRAM = """
import sys
print([name for name in sys.modules if name.startswith("humanline")])
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("humanline")])
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_repository(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def newest(clone, tmp_path_factory) -> VirtualEnvironment:
    wheel = build_wheel(clone, tmp_path_factory.mktemp("wheel"))
    environment = VirtualEnvironment(tmp_path_factory.mktemp("newest"), torch_alone=True)
    environment.pip("install", "--no-compile", f"{wheel}[demo,reward]", "peft")
    return environment


@pytest.fixture(scope="module")
def not_pinned(newest) -> str:
    """A line for each package of the environment that is not the pinned one."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parsed = [Requirement(line) for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in parsed}
    packages = json.loads(succeed(newest, "-m", "pip", "list", "--format=json", cwd=ROOT))
    found = [
        (package["name"], package["version"], pins.get(canonicalize_name(package["name"]))) for package in packages
    ]
    unlike = [f"{name} {version}, pinned {pin}" for name, version, pin in found if pin is None or version not in pin]
    return "not the pinned ones:\n" + "\n".join(unlike)


@pytest.fixture(autouse=True)
def print_what_was_met(not_pinned):
    print(not_pinned)


def succeed(environment: VirtualEnvironment, *arguments, cwd) -> str:
    result = environment.run(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def tune(environment: VirtualEnvironment, *arguments, cwd) -> str:
    """Runs `tune` in a process of its own, and not in a fork of one that has imported its packages."""
    return succeed(environment, environment.tune_script, *arguments, cwd=cwd)


def test_tune_lists_and_copies_what_is_ours_and_what_is_torchtunes(newest, clone, tmp_path):
    assert {"humanline_dpo_distributed", "lora_finetune_single_device"} <= set(tune(newest, "ls", cwd=tmp_path).split())
    tune(newest, "cp", "humanline/llama3_8b_offline", "mine.yaml", cwd=tmp_path)
    assert (tmp_path / "mine.yaml").read_text() == (clone / "configs" / "llama3_8b_offline.yaml").read_text()


@pytest.mark.parametrize("torchrun", [[], ["--nproc_per_node", "2"]], ids=["alone", "two processes"])
def test_the_documented_command_comes_to_the_missing_checkpoint(newest, clone, torchrun):
    command = ["run", *torchrun, "recipes/humanline_dpo_distributed", "--config", "configs/llama3_8b_offline.yaml"]
    result = newest.run(newest.tune_script, *command, cwd=clone)
    missing = "tokenizer.path: models/Meta-Llama-3-8B-Instruct/tokenizer.json is missing"
    assert result.returncode == 1 and missing in result.stderr.splitlines()[-1], result.stderr


def test_torchtunes_own_recipe_comes_to_its_missing_checkpoint(newest, tmp_path):
    command = ["run", "lora_finetune_single_device", "--config", "llama3_2/1B_lora_single_device", "device=cpu"]
    command += [f"output_dir={tmp_path}", "checkpointer.checkpoint_dir=nowhere"]
    result = newest.run(newest.tune_script, *command, cwd=tmp_path)
    assert result.stderr.splitlines()[-1].startswith("FileNotFoundError: "), result.stderr
    assert "nowhere/config.json" in result.stderr.splitlines()[-1]


def test_a_program_that_is_not_ours_imports_and_hooks_nothing_of_ours(newest, tmp_path):
    assert succeed(newest, "-c", OURS_IN_THIS_PROGRAM, cwd=tmp_path) == "[]\n[]\n"


def test_the_demo_trains(newest, tmp_path):
    model, output = tmp_path / "SmolLM2-135M-Instruct", tmp_path / "output"
    succeed(newest, "-m", "humanline.tools.fetch_smollm2", "--output-dir", model, cwd=tmp_path)
    command = ["run", "recipes/humanline_dpo_distributed", "--config", "configs/smollm2_135m_dpo.yaml"]
    command += [f"checkpointer.checkpoint_dir={model}", f"tokenizer.path={model}", f"output_dir={output}"]
    command += ["batch_size=1", "max_steps_per_epoch=1", "dataset_val=null", "metric_logger.filename=log.txt"]
    tune(newest, *command, cwd=ROOT)
    assert "loss:0.693147" in (output / "logs" / "log.txt").read_text()
    assert "[1, 9]" in succeed(newest, "-c", LOAD_MODEL, output / "epoch_0", cwd=tmp_path)


def test_an_adapter_is_exported_and_peft_computes_with_it_what_the_merged_weights_do(newest, trajectory):
    run = with_lora(one_device(trajectory("dpo_8_k4")))
    run.config |= {"max_steps_per_epoch": 4, "save_adapter_weights_only": False}
    train(newest, run)
    epoch = run.folder / "out" / "epoch_0"
    succeed(newest, "-c", LOAD_ADAPTER, run.folder / "model", epoch / "adapter", epoch, cwd=run.folder)


def test_an_adapter_on_a_base_in_4_bits_trains_and_peft_loads_it(newest, trajectory):
    run = quantize(with_lora(one_device(trajectory("dpo_8_k4"))))
    run.config |= {"dtype": "bf16", "max_steps_per_epoch": 2}
    train(newest, run)
    assert run.log()[1] == LN_2 and run.log()[2] != LN_2
    model = run.folder / "model"
    (model / "base.safetensors").rename(model / "model.safetensors")
    succeed(newest, "-c", LOAD_ADAPTER, model, run.folder / "out" / "epoch_0" / "adapter", cwd=run.folder)
