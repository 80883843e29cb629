"""Every family computes what transformers does, from the same files, in training and sampling, and gives files back.

docs/models.md has the table of what these tests try; tests/families.py has the families.
"""

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TrajectoryRun
from families import FAMILIES, OURS, QWEN2_WINDOW, WINDOW, Family, table
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import training
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules import MultiHeadAttention
from torchtune.modules.common_utils import NF4Tensor  # torchao moves them
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from humanline.checkpoint import build_decoder, read_adapter
from humanline.data import Group, RowBudget, lay_out, pack
from humanline.errors import ConfigError
from humanline.models import (
    LogProbDecoder,
    adapter_modules,
    build_model,
    differences,
    fixed_log_probs,
    freeze_base,
    gemma2,
    gemma3,
    has_quantized_base,
    initial_adapter,
    load_decoder,
    measure,
    merged_name,
    merged_weight,
    qwen3,
    read_published,
    second_opinion,
    set_windows,
    trainable_parameters,
)
from humanline.models._smollm2 import SHAPE as SMOLLM2
from humanline.models.gemma2 import _mend
from humanline.rollout import SamplingParams, TorchtuneEngine

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
EAGER = {"attn_implementation": "eager"}
LORA = {
    **{"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True},
    **{"lora_rank": 4, "lora_alpha": 8.0},
}
# What stands beside a checkpoint's weights, and has to go along with them.
BESIDE = {
    "generation_config.json": '{"do_sample": false, "max_new_tokens": 12}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
}
TOKENS = torch.arange(24)[None]


def where_it_works(column: str, *more: Family):
    """The families of which docs/models.md says that this column is tested, and more."""
    names = [name for name, family in FAMILIES.items() if column not in family.refused]
    chosen = {name: FAMILIES[name] for name in names} | {family.title: family for family in more}
    return pytest.mark.parametrize("family", chosen.values(), ids=chosen)


def saved(family: Family, folder: Path, wide: bool = False):
    """A random model of transformers, in its own layout with files beside it, and the model itself."""
    torch.manual_seed(0)
    model = family.hf_class(family.config_of_transformers(wide)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # else all alike
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    return model


def loaded(folder: Path):
    """The model of a folder, as others read it."""
    return AutoModelForCausalLM.from_pretrained(folder, **EAGER).eval()


def logits_of(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return getattr(found, "logits", found)


def checkpointer(family: Family, folder: Path, output: Path):
    module, _, name = family.checkpointer.rpartition(".")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    return getattr(import_module(module), name)(str(folder), files, family.model_type, str(output))


def weights_of(family: Family, folder: Path) -> dict[str, torch.Tensor]:
    return checkpointer(family, folder, folder.parent / "unused").load_checkpoint()[training.MODEL_KEY]


def hf_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read(family: Family, folder: Path, agrees: bool = True):
    """The recipe's decoder with the weights of a folder."""
    weights = weights_of(family, folder)
    with torch.device("meta"):
        model = family.build()
    published = read_published(folder, model.max_seq_len)
    built = measure(model)
    set_windows(model, published)
    if agrees:
        assert not list(differences(built, published, family.model_type))
        assert second_opinion(published) is None  # transformers reads the file as humanline does
    return load_decoder(model, weights, device=CPU, dtype=torch.float32)


def difference(family: Family, folder: Path, theirs, agrees: bool = True) -> float:
    """By how much the logits of some sequences differ at most."""
    torch.manual_seed(1)
    tokens = torch.randint(96, (3, 24))
    ours = read(family, folder, agrees)
    given_windows = any(
        hasattr(layer.attn, "sliding_window") and not hasattr(layer.attn, "attend") for layer in ours.layers
    )
    found = masked(LogProbDecoder(ours), tokens) if given_windows else ours(tokens)
    return float((found - logits_of(theirs, tokens)).abs().max())


def masked(model: LogProbDecoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of sequences, each layer with the mask of its window."""
    at = torch.arange(tokens.size(1))
    distance = at[:, None] - at
    hidden = model.tok_embeddings(tokens)
    for layer, window in zip(model.layers, model.windows, strict=True):
        hidden = layer(hidden, mask=((distance >= 0) & (distance < (window or len(at)))).expand(len(tokens), -1, -1))
    return model.unembed(hidden)


def with_model(run: TrajectoryRun, family: Family, folder: Path, wide: bool = False, prefix: str = "", **lora):
    """Puts a tiny model of a family in the place of a golden run's Llama; returns transformers' model."""
    theirs = saved(family, folder, wide)
    run.config["model"] = {"_component_": family.component(prefix), **family.arguments(wide), **lora}
    run.config["checkpointer"] |= {"_component_": family.checkpointer, "model_type": family.model_type}
    run.config["checkpointer"]["checkpoint_dir"] = str(folder)
    return theirs


def two_steps(run: TrajectoryRun, *overrides: str) -> list[float]:
    """Trains on one device; returns the losses."""
    run.recipe = run.recipe.with_name("humanline_dpo_single_device.py")
    assert run.train("max_steps_per_epoch=2", *overrides) is None
    return list(run.log().values())


def with_adapter(run: TrajectoryRun, family: Family, folder: Path, wide: bool = False, **settings):
    """As :func:`with_model`, with an adapter on every layer."""
    run.config["reference"]["_component_"] = "humanline.reference.AdapterReference"
    run.config["save_adapter_weights_only"] = False
    return with_model(run, family, folder, wide, "lora_", **LORA | settings)


GROUPS = [
    Group([3, 14, 15, 92, 65, 35, 89, 79], ([32, 38, 46, 26, 43], [38, 32, 79], [50, 28, 84, 19, 71, 69, 39, 93])),
    Group([2, 71, 82], ([81, 82, 84, 59, 4, 52, 35, 36, 2, 87], [47])),
]


def one_by_one(theirs) -> torch.Tensor:
    """Log-probs of the groups' responses by transformers, a sequence at a time."""
    found = []
    for group in GROUPS:
        for response in group.responses:
            tokens = torch.tensor([[*group.prompt, *response]])
            with torch.no_grad():
                logps = theirs(tokens).logits[0].log_softmax(-1)
            places = range(len(group.prompt) - 1, tokens.size(1) - 1)
            found += [logps[place, tokens[0, place + 1]] for place in places]
    return torch.stack(found)


@pytest.fixture
def packed():
    """The groups in one row."""
    budget = RowBudget(tokens_per_row=48)
    (rows,) = (lay_out(GROUPS, planned, budget) for planned in pack(GROUPS, budget))
    assert len(rows.tokens) == 1
    return rows


def test_the_guide_has_the_table_of_what_is_tested():
    assert table() in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("torchtune.models.t5.t5_v1_1_xxl_encoder", "builds a T5Encoder, expected a TransformerDecoder"),
        (
            "torchtune.models.llama2.llama2_reward_7b",
            "its output layer has 1 rows and its vocabulary 32,000, as in",
        ),
        ("torchtune.models.mistral.mistral_reward_7b", "its output layer has 1 rows and its vocabulary 32,000, as"),
        (
            "torchtune.models.gemma2.gemma2_2b",
            "expected torchtune's MultiHeadAttention, .*, got Gemma2Attention; .* builder of humanline.models.gemma2",
        ),
    ],
)
def test_a_model_that_is_no_language_model_of_ours_is_refused_by_name(builder, words):
    cfg = OmegaConf.create({"model": {"_component_": builder}, "checkpointer": {}})
    with pytest.raises(ConfigError, match=words), torch.device("meta"):
        LogProbDecoder(build_decoder(cfg))


@where_it_works("full", QWEN2_WINDOW)
def test_logits_are_those_of_transformers(family, tmp_path):
    theirs = saved(family, tmp_path)
    assert difference(family, tmp_path, theirs) < 1e-5


@where_it_works("full")
def test_a_recipe_trains_all_weights_and_transformers_computes_the_same_from_what_it_writes(
    family, trajectory, tmp_path
):
    run = trajectory("dpo_8_k4")
    theirs = with_model(run, family, tmp_path / "hf")
    assert len(two_steps(run, "optimizer.lr=1e-3")) == 2
    written = run.folder / "out" / "epoch_0"
    before, after = hf_weights(tmp_path / "hf"), hf_weights(written)
    assert after.keys() == before.keys()
    for name in before:  # what sees images stays as it is
        assert torch.equal(after[name], before[name]) == ("vision_tower" in name or "multi_modal" in name), name
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    trained = loaded(written)
    assert difference(family, written, trained) < 1e-5
    assert not torch.allclose(logits_of(trained), logits_of(theirs), atol=1e-3)


@where_it_works("LoRA")
def test_a_recipe_trains_an_adapter_and_peft_computes_the_same_from_what_it_writes(family, trajectory, tmp_path):
    run = trajectory("dpo_8_k4")
    theirs = with_adapter(run, family, tmp_path / "hf")
    first, last = two_steps(run, "optimizer.lr=0.02")
    assert first != last
    written = run.folder / "out" / "epoch_0"
    merged, base = loaded(written), logits_of(theirs)
    adapted = PeftModel.from_pretrained(loaded(tmp_path / "hf"), written / "adapter")
    torch.testing.assert_close(logits_of(adapted), logits_of(merged), atol=1e-5, rtol=0)
    assert not torch.allclose(logits_of(merged), base, atol=1e-3)
    # And back: what PEFT has is what torchtune has.
    cfg = OmegaConf.create(run.config)
    with torch.device("meta"):
        model = build_decoder(cfg)
    io = checkpointer(family, tmp_path / "hf", tmp_path / "unused")
    files = (written / "adapter" / f"adapter_model.{kind}" for kind in ("pt", "safetensors"))
    one, other = (read_adapter(str(file), model, io) for file in files)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


PHI3 = FAMILIES["phi3"]


def phi3_with_adapter(folder: Path, **lora):
    """The tiny Phi-3 with an adapter, without memory, and the checkpointer of its base."""
    with torch.device("meta"):
        model = build_decoder(
            OmegaConf.create(
                {
                    "model": {"_component_": PHI3.component("lora_"), **PHI3.arguments(), **LORA, **lora},
                    "checkpointer": {"checkpoint_dir": str(folder)},
                }
            )
        )
    return model, checkpointer(PHI3, folder, folder.parent / "unused")


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_of_peft_on_the_fused_layers_of_phi_3_is_one_for_each_part(use_dora, tmp_path):
    theirs = saved(PHI3, tmp_path / "hf")
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    adapted = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=use_dora)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    model, io = phi3_with_adapter(tmp_path / "hf", use_dora=use_dora)
    adapter = read_adapter(str(tmp_path / "adapter"), model, io)
    ours = load_decoder(model, weights_of(PHI3, tmp_path / "hf") | adapter, device=CPU, dtype=torch.float32)
    found = masked(LogProbDecoder(ours), TOKENS)
    torch.testing.assert_close(found, logits_of(adapted), atol=1e-5, rtol=0)


def test_an_adapter_of_peft_that_updates_more_of_a_fused_layer_than_the_model_can_is_refused(tmp_path):
    theirs = saved(PHI3, tmp_path / "hf")
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj"], init_lora_weights=False)
    get_peft_model(theirs, settings).save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"init_lora_weights": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    names = ["q_proj", "v_proj"]
    model, io = phi3_with_adapter(tmp_path / "hf", lora_attn_modules=names, apply_lora_to_mlp=False)
    with pytest.raises(ConfigError, match=r"layers\.0\.attn \(qkv_proj\) than the model's adapter of q_proj, v_proj"):
        read_adapter(str(tmp_path / "adapter"), model, io)


def test_an_adapter_of_two_of_phi_3_s_fused_projections_is_one_that_peft_loads(trajectory, tmp_path):
    run = trajectory("dpo_8_k4")
    with_adapter(run, PHI3, tmp_path / "hf", lora_attn_modules=["v_proj", "q_proj"], apply_lora_to_mlp=False)
    two_steps(run, "optimizer.lr=0.02")
    written = run.folder / "out" / "epoch_0"
    adapted = PeftModel.from_pretrained(loaded(tmp_path / "hf"), written / "adapter")
    torch.testing.assert_close(logits_of(adapted), logits_of(loaded(written)), atol=1e-5, rtol=0)
    with_adapter(run, PHI3, tmp_path / "hf", lora_attn_modules=["v_proj", "q_proj"], use_dora=True)
    two_steps(run, "optimizer.lr=0.02")  # which PEFT would have on all three
    assert (written / "adapter" / "adapter_model.pt").exists()
    assert not (written / "adapter" / "adapter_model.safetensors").exists()


@where_it_works("QLoRA")
def test_a_recipe_trains_an_adapter_on_a_base_in_nf4(family, trajectory, tmp_path, packed):
    run = trajectory("dpo_8_k4")
    with_adapter(run, family, tmp_path / "hf", wide=True, quantize_base=True)
    assert len(two_steps(run, "save_adapter_weights_only=True")) == 2
    cfg = OmegaConf.create(run.config)
    weights = weights_of(family, tmp_path / "hf")
    with torch.device("meta"):
        model = build_decoder(cfg)
    adapter = initial_adapter(model, weights, seed=0)
    torch.manual_seed(2)
    adapter = {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in adapter.items()}
    policy = build_model(
        lambda: build_decoder(cfg),
        weights | adapter,
        mesh=None,
        device=CPU,
        param_dtype=torch.float32,
        compute_dtype=torch.float32,
    )
    layers = adapter_modules(policy)
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        assert isinstance(layer.weight, NF4Tensor)
        weight = merged_name(name)
        weights[weight] = merged_weight(layer.weight.get_original_weight(), adapter, weight, layer)
    io = checkpointer(family, tmp_path / "hf", tmp_path / "rounded")
    io.load_checkpoint()
    io.save_checkpoint({training.MODEL_KEY: dict(weights)}, epoch=0)
    theirs = loaded(tmp_path / "rounded" / "epoch_0")
    torch.testing.assert_close(fixed_log_probs(policy, packed), one_by_one(theirs), atol=1e-5, rtol=1e-5)


@where_it_works("packed rows", QWEN2_WINDOW)
def test_packed_rows_have_the_log_probs_of_transformers_one_sequence_at_a_time(family, tmp_path, packed):
    theirs = saved(family, tmp_path)
    ours = fixed_log_probs(LogProbDecoder(read(family, tmp_path)), packed)
    torch.testing.assert_close(ours, one_by_one(theirs), atol=1e-5, rtol=1e-5)


@where_it_works("sampling", QWEN2_WINDOW)
def test_greedy_samples_are_those_of_transformers(family, tmp_path):
    theirs = saved(family, tmp_path)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20]]
    engine = TorchtuneEngine(read(family, tmp_path), stop_tokens=[], batch_size=2)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=16, temperature=0))
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert completion.tokens == greedy(theirs, prompt, 16)


def greedy(theirs, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    found = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=0
    )
    return found[0, len(prompt) :].tolist()


@where_it_works("HF export")
def test_the_weights_go_back_as_they_came(family, tmp_path):
    theirs = saved(family, tmp_path / "hf")
    io = checkpointer(family, tmp_path / "hf", tmp_path / "out")
    io.save_checkpoint(io.load_checkpoint(), epoch=0)
    written = tmp_path / "out" / "epoch_0"
    before, after = hf_weights(tmp_path / "hf"), hf_weights(written)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert all((written / name).read_text() == text for name, text in BESIDE.items())
    again = loaded(written)
    assert torch.equal(logits_of(again), logits_of(theirs))
    assert greedy(again, [5, 6, 7], 12) == greedy(theirs, [5, 6, 7], 12)
    assert json.loads((written / "config.json").read_text())["model_type"] == theirs.config.model_type


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen3", {"_component_": "torchtune.training.FullModelHFCheckpointer"}, "no names for the weights of a qwen3"),
        (
            "qwen3",
            {"model_type": "QWEN2"},
            "no names for the weights of a qwen3; set checkpointer._component_: human",
        ),
        ("qwen2_5", {"_component_": OURS, "model_type": "QWEN3"}, "QWEN3 is of another family than .* a qwen2; set"),
    ],
)
def test_a_checkpointer_of_another_family_is_refused_with_the_right_one(name, changes, words, trajectory, tmp_path):
    run = trajectory("dpo_7_k1")
    with_model(run, FAMILIES[name], tmp_path / "hf")
    run.config["checkpointer"] |= changes
    assert re.search(words, run.train())


def test_the_checkpointer_reads_and_writes_the_families_of_torchtune_as_torchtune_s_does(tmp_path):
    family = FAMILIES["llama3_2"]
    saved(family, tmp_path / "hf")
    for name, each in (("theirs", family), ("ours", replace(family, checkpointer=OURS))):
        io = checkpointer(each, tmp_path / "hf", tmp_path / name)
        io.save_checkpoint(io.load_checkpoint(), epoch=0)
    theirs, ours = (tmp_path / name / "epoch_0" for name in ("theirs", "ours"))
    files = sorted(file.name for file in theirs.iterdir())
    assert sorted(file.name for file in ours.iterdir()) == files
    assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in files)


def test_a_qwen3_with_norms_behind_rope_is_another_function_and_refused(tmp_path):
    family = FAMILIES["qwen3"]
    theirs = saved(family, tmp_path)
    with torch.device("meta"):
        model = family.build()
    for layer in model.layers:
        layer.attn.__class__ = MultiHeadAttention  # torchtune's own, which norms what RoPE has turned
    found = list(differences(measure(model), read_published(tmp_path, 64), family.model_type))
    assert list(map(str, found)) == [
        "the norms of queries and keys is before RoPE in config.json and after RoPE in the model"
    ]
    ours = load_decoder(model, weights_of(family, tmp_path), device=CPU, dtype=torch.float32)
    assert float((logits_of(ours) - logits_of(theirs)).abs().max()) > 1e-2


def test_a_llama_2_with_tables_of_positions_in_its_files_is_handed_out_without_them(trajectory, tmp_path):
    run = trajectory("dpo_7_k1")
    with_model(run, FAMILIES["llama2"], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    plain = load_file(file)
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save_file(plain | tables, file, metadata={"format": "pt"})
    two_steps(run)
    written = run.folder / "out" / "epoch_0"
    index = json.loads((written / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == hf_weights(written).keys() == plain.keys()


def test_a_qwen3_in_shards_goes_back_into_them_without_the_copy_of_its_embeddings(trajectory, tmp_path):
    family, folder = FAMILIES["qwen3_tied"], tmp_path / "hf"
    run = trajectory("dpo_7_k1")
    theirs = with_model(run, family, folder)
    weights = hf_weights(folder)
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # as in Qwen3-0.6B and -1.7B
    files = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    parts = [{name: weights[name] for name in list(weights)[part::2]} for part in (0, 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    run.config["checkpointer"]["checkpoint_files"] = files
    run.config["optimizer"]["lr"] = 0.0
    two_steps(run)
    written = run.folder / "out" / "epoch_0"
    for file, part in zip(files, parts, strict=True):
        assert load_file(written / file).keys() == part.keys() - {"lm_head.weight"}
    index = json.loads((written / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == weights.keys() - {"lm_head.weight"}
    assert torch.equal(logits_of(loaded(written)), logits_of(theirs))


def test_a_smollm2_in_nf4_is_refused():
    model = {"_component_": "humanline.models.lora_smollm2_135m", "lora_attn_modules": ["q_proj"]}
    cfg = OmegaConf.create({"model": model | {"quantize_base": True}, "checkpointer": {}})
    with pytest.raises(
        ConfigError, match="model.quantize_base: humanline.models.lora_smollm2_135m has no such argument"
    ):
        build_decoder(cfg)
    shape = {key: value for key, value in SMOLLM2.items() if key != "num_layers"}
    with pytest.raises(AssertionError, match="must be divisible by scaler block size"):  # as torchao says it
        lora_llama3_2(["q_proj"], **shape, num_layers=1, lora_rank=4, lora_alpha=8, quantize_base=True)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_with_images"])
def test_two_ranks_have_the_losses_of_one_device(name, trajectory, tmp_path):
    run = trajectory("dpo_8_k4")
    if name == "qwen3":  # in NF4, layers without an adapter too
        some = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False}
        with_adapter(run, FAMILIES[name], tmp_path / "hf", wide=True, quantize_base=True, **some)
    else:
        with_model(run, FAMILIES[name], tmp_path / "hf")
    run.config |= {"batch_size": run.config["batch_size"] // 2, "max_steps_per_epoch": 2}
    run.config["optimizer"]["lr"] = 0.02
    run.train_on(2)
    sharded = list(run.log().values())
    run.config["batch_size"] *= 2
    (run.folder / "logs" / "log.txt").unlink()
    assert two_steps(run) == pytest.approx(sharded, abs=1e-5)
    assert sharded[0] != sharded[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ATTENTION_CAP", 30.0), ("LOGIT_CAP", 50.0), ("cap_logits", lambda decoder: None)],
)
def test_a_gemma_2_that_is_not_mended_is_another_function(name, value, tmp_path, monkeypatch):
    theirs = saved(FAMILIES["gemma2"], tmp_path)
    monkeypatch.setattr(_mend, name, value)
    assert difference(FAMILIES["gemma2"], tmp_path, theirs, agrees=False) > 1e-3


@pytest.mark.parametrize("window", [None, 100, 1000])
def test_gemma_2_attends_to_a_long_prompt_with_few_scores_at_a_time(window):
    length, heads, dim = 700, 2, 16
    builder = gemma2.gemma2(
        vocab_size=8, num_layers=2, num_heads=heads, num_kv_heads=heads, head_dim=dim, embed_dim=8, intermediate_dim=8,
        max_seq_len=length, sliding_window_size=window, query_pre_attn_scalar=4,
    )  # fmt: skip
    attention = builder.layers[0].attn  # with a window, if there is one
    q, k, v = torch.randn(3, 1, heads, length, dim, generator=torch.Generator().manual_seed(0)) * 8
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    scores = 50 * ((q.double() @ k.double().mT) / 4**0.5 / 50).tanh()
    right = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.largest = max([self.largest, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
            return result

    with Sizes() as sizes:
        found = attention.attend(q, k, v, is_causal=True)
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-4)
    assert sizes.largest <= heads * 256 * length < heads * length * length


def test_a_gemma_2_with_its_norms_exchanged_is_another_function(tmp_path, monkeypatch):
    theirs = saved(FAMILIES["gemma2"], tmp_path)
    table = _mend.GEMMA2_FROM_HF
    before, behind = (f"model.layers.{{}}.{side}_feedforward_layernorm.weight" for side in ("pre", "post"))
    monkeypatch.setitem(table, before, "layers.{}.mlp_scale.scale")
    monkeypatch.setitem(table, behind, "layers.{}.mlp_norm.scale")
    assert difference(FAMILIES["gemma2"], tmp_path, theirs) > 1e-3
    monkeypatch.undo()
    assert difference(FAMILIES["gemma2"], tmp_path, theirs) < 1e-5


@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_a_gemma_2_trains_on_two_ranks_with_packed_rows_as_with_a_sequence_a_row(trajectory, name, tmp_path):
    packed = trajectory(name)
    with_model(packed, FAMILIES["gemma2"], tmp_path / "gemma")
    packed.config["batch_size"] //= 2
    # Within rounding of a bound, a token is clipped in one layout and not in the other; golden runs cover the bounds.
    packed.config["loss"] |= {"perception": "none", "log_eps_P": None, "log_eps_R": None}
    if name == "grpo_8_k4":
        packed.config["loss"] |= {"epsilon_low": 0.99, "epsilon_high": 100.0}
    apart = packed.again("apart")
    packed.train_on(2)
    lines = [json.loads(line) for line in packed.data.read_text().splitlines()]
    longest_response = max(len(response) for line in lines for response in line["responses"])
    longest = max(len(line["prompt"]) for line in lines) + longest_response - 1  # with KTO's KL sequences
    assert longest > WINDOW
    apart.config |= {"tokens_per_row": longest, "rows_per_pass": 2}
    apart.train_on(2)
    assert len(packed.log()) == len(packed.golden["batches"])
    assert apart.log() == pytest.approx(packed.log(), abs=1e-5)
    assert apart.log("grad_norm") == pytest.approx(packed.log("grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "parameters"), [("2b", 2_614_341_888), ("9b", 9_241_705_984), ("27b", 27_227_128_320)]
)
def test_the_sizes_of_gemma_2_are_those_on_the_hub(size, parameters):
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4}
    with torch.device("meta"):
        whole = LogProbDecoder(getattr(gemma2, f"gemma2_{size}")())
        adapted = LogProbDecoder(getattr(gemma2, f"lora_gemma2_{size}")(**lora))
        quantized = LogProbDecoder(getattr(gemma2, f"qlora_gemma2_{size}")(**lora))
    for model in (adapted, quantized):
        freeze_base(model, torch.float32)
    assert sum(parameter.numel() for parameter in whole.parameters()) == parameters
    assert whole.windows == [4096, None] * (len(whole.layers) // 2) and whole.soft_cap == 30
    assert trainable_parameters(adapted).keys() == trainable_parameters(quantized).keys()
    assert has_quantized_base(quantized) and not has_quantized_base(adapted)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        *(("0_6b", 596_049_920), ("1_7b", 1_720_574_976), ("4b", 4_022_468_096), ("4b_2507", 4_022_468_096)),
        *(("8b", 8_190_735_360), ("14b", 14_768_307_200), ("32b", 32_762_123_264)),
    ],
)
def test_the_sizes_of_qwen3_are_those_on_the_hub(size, parameters):
    with torch.device("meta"):
        whole = getattr(qwen3, f"qwen3_{size}")()
    assert sum(parameter.numel() for parameter in whole.parameters()) == parameters


@pytest.mark.parametrize(
    ("size", "parameters", "hidden"),
    [
        *(("270m", 268_098_176, None), ("1b", 999_885_952, None)),
        *(("4b", 4_300_079_472, 2560), ("12b", 12_187_325_040, 3840), ("27b", 27_432_406_640, 5376)),
    ],
)
def test_the_sizes_of_gemma_3_are_those_on_the_hub(size, parameters, hidden):
    with torch.device("meta"):
        text = getattr(gemma3, f"gemma3_{size}")()
    vision_tower, projector = 416_866_032, 0 if hidden is None else 1152 * hidden + 1152
    others = 0 if hidden is None else vision_tower + projector
    assert sum(parameter.numel() for parameter in text.parameters()) + others == parameters
    windows = LogProbDecoder(text).windows
    assert windows[:7] == [windows[0]] * 5 + [None, windows[0]] and windows[0] == (1024 if hidden else 512)


def test_the_embeddings_of_gemma_3_are_scaled_in_their_dtype():
    ours = gemma3.gemma3(**FAMILIES["gemma3"].arguments() | {"embed_dim": 1152}).tok_embeddings.to(torch.bfloat16)
    theirs = Gemma3TextScaledWordEmbedding(256, 1152, None, 1152**0.5).to(torch.bfloat16)
    theirs.weight = ours.weight
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert not torch.equal(ours(TOKENS).float(), F.embedding(TOKENS, ours.weight.float()) * 1152**0.5)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_gemma_3_that_sees_images_keeps_its_names_under_either_of_two_spellings(prefix, trajectory, tmp_path):
    family, folder = FAMILIES["gemma3_with_images"], tmp_path / "hf"
    run = trajectory("dpo_7_k1")
    theirs = with_model(run, family, folder)
    named = {name.replace("language_model.model.", prefix): each for name, each in hf_weights(folder).items()}
    copied = named[f"{prefix}embed_tokens.weight"].clone()
    head = {"language_model.lm_head.weight" if prefix.endswith("model.model.") else "lm_head.weight": copied}
    save_file(named | head, folder / "model.safetensors", metadata={"format": "pt"})
    run.config["optimizer"]["lr"] = 0.0
    two_steps(run)
    written = run.folder / "out" / "epoch_0"
    found = hf_weights(written)
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], named[name]) for name in named)
    assert torch.equal(logits_of(loaded(written)), logits_of(theirs))
