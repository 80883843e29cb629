"""LoRA, QLoRA and DoRA through the recipes: one device and sharded, the adapter reference, and adapters as files."""

import gc
import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, hf_config
from conftest import run as command
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torchtune import config
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.modules.common_utils import NF4Tensor  # torchao moves them
from torchtune.modules.peft.lora import to_nf4

from humanline.data import Group, RowBudget, lay_out, pack
from humanline.errors import ConfigError
from humanline.models import LogProbDecoder, check_adapter, fixed_log_probs, initial_adapter, trainable_parameters
from humanline.models._build import build_model
from humanline.reference import AdapterReference, RunContext

pytestmark = pytest.mark.slow

LORA = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8.0,
}
CPU = torch.device("cpu")
ADAPTER = {"_component_": "humanline.reference.AdapterReference"}


def one_device(run):
    run.recipe = run.recipe.with_name(run.recipe.name.replace("distributed", "single_device"))
    return run


def with_lora(run, builder="torchtune.models.llama3.lora_llama3", **settings):
    """The golden run with an adapter in place of full training, at a rate that moves it far enough to tell."""
    run.config["model"] |= {"_component_": builder, **LORA, **settings}
    run.config["optimizer"]["lr"] = 0.02
    run.config["reference"] |= ADAPTER
    return run


def trained(run, *overrides):
    assert run.train(*overrides) is None
    return run.log()


def adapter_of(run, epoch=0):
    return torch.load(run.folder / "out" / f"epoch_{epoch}" / "adapter" / "adapter_model.pt", weights_only=True)


# ---- One device


@pytest.mark.parametrize("name", ["dpo_7_k1", "kto_8_k4", "grpo_8_k4"])
def test_full_training_on_one_device_has_the_losses_of_the_authors_code(trajectory, name):
    run = one_device(trajectory(name))
    assert list(trained(run).values()) == pytest.approx(run.golden["losses"], abs=1e-5)


def test_one_device_computes_in_bf16_what_fsdp_does(trajectory):
    run = trajectory("dpo_8_k4")
    sharded = trained(run, "dtype=bf16")
    (run.folder / "logs" / "log.txt").unlink()
    plain = trained(one_device(run), "dtype=bf16", "enable_activation_checkpointing=True")
    assert plain == pytest.approx(sharded, abs=1e-5)
    assert plain[8] != pytest.approx(run.golden["losses"][7], abs=1e-6)  # it did compute in another dtype


def test_one_device_resumes_as_if_it_had_not_stopped(trajectory):
    run = with_lora(one_device(trajectory("dpo_8_k4")), lora_dropout=0.2)
    run.config["save_every_n_steps"] = 10
    whole, final = trained(run), adapter_of(run)
    (run.folder / "logs" / "log.txt").unlink()
    assert trained(run, "resume_from_checkpoint=latest") == {step: whole[step] for step in (11, 12)}
    assert all(torch.equal(tensor, final[name]) for name, tensor in adapter_of(run).items())


def test_a_single_device_recipe_on_two_ranks_is_refused(trajectory):
    run = one_device(trajectory("dpo_7_k1"))
    assert "does not support distributed training" in run.tune(nproc=2, check=False).stderr  # tune knows by the name
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = command([*torchrun, str(run.recipe), "--config", str(run.folder / "config.yaml")], cwd=ROOT, check=False)
    assert done.returncode != 0
    assert "nproc_per_node: this recipe needs exactly one process; use the _distributed recipe" in done.stderr


def test_optimizer_in_backward_is_refused_with_the_reason(trajectory):
    line = one_device(trajectory("dpo_7_k1")).train("optimizer_in_bwd=True")
    assert "optimizer_in_bwd: expected False, got True; it would merge the optimizer's step into backward" in line


# In bfloat16 compiled code rounds elsewhere, which grows from step to step at this trajectory's rate.
@pytest.mark.parametrize(("dtype", "steps", "tolerance"), [("fp32", 4, 1e-5), ("bf16", 2, 2e-3)])
def test_compiled_layers_change_no_loss_on_one_device(trajectory, dtype, steps, tolerance):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    plain = trained(run, f"max_steps_per_epoch={steps}", f"dtype={dtype}")
    (run.folder / "logs" / "log.txt").unlink()
    compiled = trained(run, f"max_steps_per_epoch={steps}", f"dtype={dtype}", "compile=True")
    assert compiled == pytest.approx(plain, abs=tolerance)


def test_compiled_layers_with_a_base_in_nf4_change_no_loss(trajectory):
    run = quantize(with_lora(one_device(trajectory("dpo_7_k1"))))
    run.config["enable_activation_checkpointing"] = True
    plain = trained(run, "max_steps_per_epoch=3")
    (run.folder / "logs" / "log.txt").unlink()
    compiled = trained(run, "max_steps_per_epoch=3", "compile=True")
    assert compiled == pytest.approx(plain, abs=1e-5)


def test_an_8_bit_optimizer_trains_an_adapter(trajectory):
    run = quantize(with_lora(one_device(trajectory("dpo_7_k1")), lora_rank=16))
    run.config["optimizer"] = {"_component_": "torchao.optim.AdamW8bit", "lr": 0.02}
    losses = trained(run, "save_every_n_steps=5")
    assert len(set(losses.values())) == 12
    size = sum(file.stat().st_size for file in (run.folder / "out" / "checkpoints" / "step_10").iterdir())
    assert size < 131_072 * (4 + 4 + 2 * 3)  # weights, reference, and two moments, most of them of a byte
    (run.folder / "logs" / "log.txt").unlink()
    assert trained(run, "resume_from_checkpoint=latest") == {step: losses[step] for step in (11, 12)}


# ---- The adapter reference


@pytest.mark.parametrize("quantized", [False, True], ids=["LoRA", "QLoRA"])
@pytest.mark.parametrize("name", ["dpo_7_k1", "dpo_8_k4", "kto_7_k1", "kto_8_k4", "grpo_7_k1", "grpo_8_k4"])
def test_the_adapter_reference_has_the_losses_of_a_second_model(trajectory, name, quantized):
    run = with_lora(one_device(trajectory(name)))
    if quantized:
        quantize(run)
    logs = []
    for reference in ("ModelReference", "AdapterReference"):
        run.config["reference"]["_component_"] = f"humanline.reference.{reference}"
        (run.folder / "logs" / "log.txt").unlink(missing_ok=True)
        logs.append(trained(run))
    second_model, adapter = logs
    assert len(adapter) == 12 and adapter == pytest.approx(second_model, abs=1e-5)
    assert len(set(adapter.values())) == 12


@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_7_k1"])
def test_a_sharded_adapter_has_the_losses_of_one_device(trajectory, name):
    run = with_lora(trajectory(name))
    run.config["batch_size"] //= 2
    run.train_on(2)
    sharded, files = run.log(), adapter_of(run)
    (run.folder / "logs" / "log.txt").unlink()
    run.config["batch_size"] *= 2
    assert trained(one_device(run)) == pytest.approx(sharded, abs=1e-5)
    torch.testing.assert_close(adapter_of(run), files, atol=1e-4, rtol=1e-3)


def decoder(**settings):
    shape = {"vocab_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 256, "max_seq_len": 64}
    return lora_llama3(**shape, intermediate_dim=512, **(LORA | settings))


def policy(seed=0, **settings):
    """A model with an adapter that is not the initial one."""
    torch.manual_seed(seed)
    base = {name: torch.randn(p.shape) * 0.1 for name, p in decoder().state_dict().items() if "lora" not in name}
    adapter = initial_adapter(decoder(**settings), base, seed)
    adapter = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in adapter.items()}
    return build_model(
        lambda: decoder(**settings),
        base | adapter,
        mesh=None,
        device=CPU,
        param_dtype=torch.float32,
        compute_dtype=torch.float32,
    )


def rows():
    groups = [Group([1, 2, 3], ([4, 5, 6], [7])), Group([8], ([9, 10], [11, 12, 13]))]
    budget = RowBudget(tokens_per_row=32)
    return lay_out(groups, pack(groups, budget)[0], budget)


def context_of(model):
    """A run of a policy, as far as the reference of an adapter looks at it."""
    return RunContext(policy=model, model=None, passes=None, total_steps=1, resumes=False)


def nudge(model):
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1)


def test_the_reference_is_the_adapter_of_the_last_sync_and_leaves_the_policy_alone():
    model = policy(lora_dropout=0.5)
    reference = AdapterReference(sync_every=2).build(context_of(model))
    start, before = fixed_log_probs(model, rows()), {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(reference.log_probs(rows()), start)  # dropout is off
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    nudge(model)
    reference.before_optimizer_step(1)
    assert torch.equal(reference.log_probs(rows()), start) and reference.last_sync == 0
    moved = fixed_log_probs(model, rows())
    reference.before_optimizer_step(2)
    nudge(model)
    assert torch.equal(reference.log_probs(rows()), moved) and reference.last_sync == 2
    assert not torch.equal(moved, start)


def test_the_reference_keeps_the_adapter_and_nothing_more():
    model, batch = policy(), rows()
    batch.query_blocks()  # rows keep them from the first pass on
    adapter = sum(parameter.nbytes for parameter in trainable_parameters(model).values())
    before = bytes_of_live_tensors()
    reference = AdapterReference().build(context_of(model))
    reference.log_probs(batch)
    reference.before_optimizer_step(1)
    assert adapter <= bytes_of_live_tensors() - before <= 1.05 * adapter


def bytes_of_live_tensors():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_an_adapter_reference_of_a_model_without_adapter_is_refused(trajectory):
    run = trajectory("dpo_7_k1")
    run.config["reference"] |= ADAPTER
    assert "reference._component_: AdapterReference needs a model with an adapter" in run.train()


# ---- What trains, and where it starts


def test_only_the_adapter_trains_and_a_new_one_changes_nothing():
    torch.manual_seed(0)
    plain = LogProbDecoder(llama3(64, 2, 2, 1, 256, 64, intermediate_dim=512))
    base = plain.state_dict()
    model = build_model(
        decoder,
        base | initial_adapter(decoder(), base, 0),
        mesh=None,
        device=CPU,
        param_dtype=torch.float32,
        compute_dtype=torch.bfloat16,
    )
    assert all(".lora_" in name for name in trainable_parameters(model))
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert {parameter.dtype for parameter in frozen} == {torch.bfloat16}
    bf16 = {"mesh": None, "device": CPU, "param_dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}
    expected = fixed_log_probs(
        build_model(lambda: llama3(64, 2, 2, 1, 256, 64, intermediate_dim=512), base, **bf16), rows()
    )
    assert torch.equal(fixed_log_probs(model, rows()), expected)


def test_a_qlora_base_is_kept_in_nf4_and_frozen():
    model = policy(quantize_base=True)
    linear = model.layers[0].attn.q_proj
    assert isinstance(linear.weight, NF4Tensor) and not linear.weight.requires_grad
    assert linear.lora_a.weight.requires_grad and linear.lora_a.weight.dtype == torch.float32


def test_dora_starts_as_the_base_model_too():
    torch.manual_seed(0)
    base = LogProbDecoder(llama3(64, 2, 2, 1, 256, 64, intermediate_dim=512))
    weights = base.state_dict() | initial_adapter(decoder(use_dora=True), base.state_dict(), 0)
    model = build_model(
        lambda: decoder(use_dora=True),
        weights,
        mesh=None,
        device=CPU,
        param_dtype=torch.float32,
        compute_dtype=torch.float32,
    )
    torch.testing.assert_close(fixed_log_probs(model, rows()), fixed_log_probs(base, rows()), atol=1e-5, rtol=0)


def quantize(run):
    """A base whose weights are large enough for NF4's blocks, in place of the golden one."""
    run.config["model"] |= {"quantize_base": True, "embed_dim": 256, "intermediate_dim": 512}
    shape = {key: value for key, value in run.config["model"].items() if key != "_component_"}
    torch.manual_seed(0)
    sizes = {key: shape[key] for key in shape if key not in (*LORA, "quantize_base")}
    weights = llama3(**sizes).state_dict()
    run.config["checkpointer"] |= {"checkpoint_files": ["base.safetensors"]}
    folder = run.folder / "model"
    save_file(
        tune_to_hf(weights, sizes["num_heads"], sizes["num_kv_heads"], sizes["embed_dim"]),
        folder / "base.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(hf_config(run.golden["model"] | sizes)))
    return run


def test_a_qlora_base_is_kept_in_4_bits_and_trains(trajectory):
    run = quantize(with_lora(one_device(trajectory("dpo_7_k1"))))
    losses = trained(run, "dtype=bf16", "enable_activation_checkpointing=True", "save_adapter_weights_only=False")
    assert losses[1] == pytest.approx(0.6931472, abs=1e-6) and len(set(losses.values())) == 12
    before = load_file(run.folder / "model" / "base.safetensors")
    after = load_file(run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    name, adapter = "model.layers.0.mlp.up_proj.weight", adapter_of(run)
    base = to_nf4(before[name].bfloat16()).get_original_weight().float()
    delta = 2.0 * adapter["layers.0.mlp.w3.lora_b.weight"] @ adapter["layers.0.mlp.w3.lora_a.weight"]
    torch.testing.assert_close(after[name], base + delta, atol=1e-5, rtol=0)


def test_a_qlora_base_is_sharded_too(trajectory):
    run = quantize(with_lora(trajectory("dpo_7_k1")))
    one = trained(run, "max_steps_per_epoch=4")  # the distributed recipe in one process
    (run.folder / "logs" / "log.txt").unlink()
    run.config["batch_size"] //= 2
    run.train_on(2, "max_steps_per_epoch=4", "save_adapter_weights_only=False")
    assert run.log() == pytest.approx(one, abs=1e-5)
    assert (run.folder / "out" / "epoch_0" / "model-00001-of-00001.safetensors").is_file()
    with pytest.raises(ConfigError, match="do not divide into 3 parts of whole blocks of 16,384"):
        check_adapter(policy(quantize_base=True), world_size=3, replicas=1)


# ---- Adapters as files


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_peft_computes_what_the_recipe_s_model_does(trajectory, family, use_dora):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    run = one_device(trajectory("dpo_7_k1"))
    if family == "qwen2":
        qwen2_base(run)
    builder = {"llama": "torchtune.models.llama3.lora_llama3", "qwen2": "torchtune.models.qwen2.lora_qwen2"}[family]
    with_lora(run, builder, use_dora=use_dora)
    if use_dora and family == "qwen2":  # with a bias torchtune's DoRA is another function
        assert "model.use_dora: layers.0.attn.q_proj has a bias, which torchtune's DoRA scales" in run.train()
        run.config["model"]["lora_attn_modules"] = ["output_proj"]
    trained(run, "save_adapter_weights_only=False")
    folder = run.folder / "out" / "epoch_0"

    base = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    tokens = torch.arange(1, 25)[None]
    before = base(tokens).logits
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter")(tokens).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(theirs, merged, atol=1e-4, rtol=0)

    ours = config.instantiate(OmegaConf.create(run.config["model"]))
    checkpointer = run.config["checkpointer"] | {"output_dir": str(run.folder / "elsewhere")}
    weights = config.instantiate(OmegaConf.create(checkpointer)).load_checkpoint()["model"]
    ours.load_state_dict(weights | adapter_of(run))
    torch.testing.assert_close(ours(tokens), theirs, atol=1e-4, rtol=0)
    assert (theirs - before).abs().max() > 1e-2


def qwen2_base(run):
    """A tiny Qwen2 in place of the golden Llama: biases on queries, keys and values, and rows that are not permuted."""
    import transformers

    shape = run.golden["model"]
    settings = {key: value for key, value in hf_config(shape).items() if key not in ("architectures", "model_type")}
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    shutil.rmtree(run.folder / "model")
    model.save_pretrained(run.folder / "model")
    run.config["model"].pop("_component_")
    run.config["checkpointer"]["model_type"] = "QWEN2"
    config = json.loads((run.folder / "model" / "config.json").read_text())
    (run.folder / "model" / "config.json").write_text(json.dumps(config | {"rope_theta": shape["rope_base"]}))


@pytest.mark.parametrize("form", ["torchtune", "peft"])
def test_a_run_continues_an_adapter_and_its_reference_starts_there(trajectory, form):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    trained(run)
    folder = run.folder / "out" / "epoch_0" / "adapter"
    file = folder / "adapter_model.pt"
    kept = run.folder / "start"
    kept.mkdir()
    if form == "torchtune":
        shutil.copy(file, kept)
    else:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(folder / name, kept)
    start = adapter_of(run)
    run.config["optimizer"]["lr"] = 0.0
    (run.folder / "logs" / "log.txt").unlink()
    losses = trained(run, f"adapter={kept}", "max_steps_per_epoch=2")
    assert losses[1] == pytest.approx(0.6931472, abs=1e-6)  # the reference is that adapter, not the base model
    torch.testing.assert_close(adapter_of(run), start, atol=0, rtol=0)


def test_adapters_that_do_not_fit_are_refused_by_name(trajectory):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    trained(run, "max_steps_per_epoch=1")
    folder = run.folder / "out" / "epoch_0" / "adapter"
    run.config["model"]["lora_rank"] = 8
    assert "has lora_rank 4, the model has 8; set model.lora_rank: 4" in run.train(f"adapter={folder}")
    (folder / "adapter_config.json").unlink()
    line = run.train(f"adapter={folder / 'adapter_model.pt'}")
    assert "does not fit model: layers.0.attn.q_proj.lora_a.weight is (4, 64) in the file" in line
    assert "expected adapter_model.pt or adapter_model.safetensors in nowhere, found" in run.train("adapter=nowhere")
    run.config["model"] = trajectory("dpo_8_k4").config["model"]
    run.config["reference"]["_component_"] = "humanline.reference.ModelReference"
    assert "adapter: the model has no adapter; use a lora_" in run.train(f"adapter={folder}")


@pytest.mark.parametrize(
    "change", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}, {"init_lora_weights": "pissa"}], ids=str
)
def test_peft_adapters_that_are_another_function_are_refused(trajectory, change):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    trained(run, "max_steps_per_epoch=1")
    folder = run.folder / "out" / "epoch_0" / "adapter"
    (folder / "adapter_model.pt").unlink()
    assert run.train(f"adapter={folder}", "max_steps_per_epoch=1") is None
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert f"adapter: {config} has {next(iter(change))}" in run.train(f"adapter={folder}")


def test_of_a_folder_that_torchtune_wrote_its_own_file_is_read(trajectory):
    run = one_device(trajectory("dpo_7_k1"))
    qwen2_base(run)
    with_lora(run, "torchtune.models.qwen2.lora_qwen2")
    trained(run, "max_steps_per_epoch=2")
    adapter = adapter_of(run)
    theirs = run.config["checkpointer"] | {"output_dir": str(run.folder / "theirs")}
    checkpointer = config.instantiate(OmegaConf.create(theirs))
    checkpointer.load_checkpoint()
    settings = {"r": 4, "lora_alpha": 8.0, "target_modules": LORA["lora_attn_modules"], "peft_type": "LORA"}
    state = {"model": {}, "adapter": adapter, "adapter_config": settings}
    checkpointer.save_checkpoint(state, epoch=0, adapter_only=True)
    folder = run.folder / "theirs" / "epoch_0"
    assert (folder / "adapter_model.safetensors").is_file()
    run.config["optimizer"]["lr"] = 0.0
    trained(run, f"adapter={folder}", "max_steps_per_epoch=1")
    torch.testing.assert_close(adapter_of(run), adapter, atol=0, rtol=0)
    run.config["model"]["lora_alpha"] = 16.0
    assert "adapter_config.json has lora_alpha 8.0, the model has 16.0; set model.lora_alpha: 8.0" in run.train(
        f"adapter={folder}"
    )


def test_other_checkpointers_write_the_adapter_in_torchtune_s_format_alone(trajectory):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    weights = run.folder / "model" / "torchtune.pt"
    checkpointer = run.config["checkpointer"] | {"output_dir": str(run.folder / "elsewhere")}
    torch.save(config.instantiate(OmegaConf.create(checkpointer)).load_checkpoint()["model"], weights)
    run.config["checkpointer"] |= {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_files": [weights.name],
    }
    trained(run, "max_steps_per_epoch=1", "save_adapter_weights_only=False")
    folder = run.folder / "out" / "epoch_0"
    assert {path.name for path in (folder / "adapter").iterdir()} == {"README.md", "adapter_model.pt"}


def test_a_resumed_run_is_of_the_same_model(trajectory):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    trained(run, "save_every_n_steps=10")
    assert "step_10 was written with model {" in run.train("resume_from_checkpoint=latest", "model.lora_alpha=800")


def test_lora_on_the_output_layer_is_refused(trajectory):
    run = with_lora(one_device(trajectory("dpo_7_k1")), apply_lora_to_output=True)
    assert "LoRA needs apply_lora_to_output: False" in run.train()


def test_a_checkpoint_of_an_adapter_holds_no_base(trajectory):
    run = with_lora(one_device(trajectory("dpo_7_k1")))
    trained(run, "save_every_n_steps=10")
    names = json.dumps(sorted(map(str, checkpoint_names(run.folder / "out" / "checkpoints" / "step_10"))))
    assert "lora_a" in names and "q_proj.weight" not in names and "tok_embeddings" not in names


def checkpoint_names(folder):
    return FileSystemReader(folder).read_metadata().state_dict_metadata
