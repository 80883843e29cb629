"""Every config in configs/ is short, runs as far as it can without weights and data, and gives commands that work.

Components are built for real, with the config's own arguments: the model on the meta device, datasets from a small
file, tokenizers and checkpointers from a folder made here. A new config is covered by being there.
"""

import functools
import hashlib
import inspect
import json
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeGuard

import pytest
import torch
from conftest import ROOT
from datasets import ReadInstruction
from huggingface_hub.utils import filter_repo_objects
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from test_rewards import write_classifier
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchtune import config, training
from torchtune._cli.tune import TuneCLIParser
from torchtune.data import Message
from torchtune.models.llama3 import Llama3Tokenizer, llama3_tokenizer
from torchtune.modules.common_utils import NF4Tensor  # torchao moves it
from torchtune.training.checkpointing import FormattedCheckpointFiles
from transformers.convert_slow_tokenizer import TikTokenConverter

from humanline.config import DTYPES, load_config, with_overrides
from humanline.data import ChatTokenizer, Group, GroupDataset, pack
from humanline.errors import ConfigError
from humanline.models import freeze_base, trainable_parameters
from humanline.torchtune_seam.internals import find_component
from humanline.training import DPO, GRPO, KTO, Objective, Settings, component

pytestmark = pytest.mark.slow

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LLAMA3 = ROOT / "configs" / "llama3_8b_offline.yaml"
LLAMA3_KTO, LLAMA3_GRPO = (LLAMA3.with_stem(f"{LLAMA3.stem}_{objective}") for objective in ("kto", "grpo"))
LLAMA3_CONFIGS = [LLAMA3, LLAMA3_KTO, LLAMA3_GRPO]
TEMPLATES = Path(__file__).parent / "data" / "templates"

LLAMA3_WHEEL = "llama-models==0.3.0"
LLAMA3_WHEEL_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"

LONGEST_CONFIG = 70  # lines

# What tune download takes from the hub, by the folder that configs read.
HUB = {
    "models/Meta-Llama-3-8B-Instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "models/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "models/gemma-2-27b-it": "google/gemma-2-27b-it",
    "models/gemma-3-27b-it": "google/gemma-3-27b-it",
    "models/Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "models/Qwen3-4B-Instruct-2507": "Qwen/Qwen3-4B-Instruct-2507",
    "models/Qwen3-8B": "Qwen/Qwen3-8B",
    "models/Skywork-Reward-Llama-3.1-8B-v0.2": "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
}

# The overrides that configs offer, in a command line or beside it.
WRITTEN_MODEL = (
    "checkpointer.checkpoint_dir=outputs/smollm2_135m_humanline_dpo/epoch_0 "
    "checkpointer.checkpoint_files=[model-00001-of-00001.safetensors]"
)
OFFERED = {
    "gsm8k_label": ["samples=samples/smollm2_135m.jsonl", "reward=humanline.rewards.MathReward"],
    "smollm2_135m_sample": ["prompts=demo/held_out_prompts.jsonl", WRITTEN_MODEL],
    "smollm2_135m_eval": [
        f"output=eval/smollm2_135m_dpo.json {WRITTEN_MODEL}",
        "samples=samples/smollm2_135m.jsonl k=[1]",
    ],
    **{f"smollm2_135m_{objective}_online": ["source.every=20"] for objective in ("dpo", "kto", "grpo")},
    **{
        f"{model}_{mode}": ["batch_size=8"]
        for model in ("llama3_8b", "gemma2_27b", "qwen2_5_1_5b")
        for mode in ("lora", "qlora")
    },
}

# How to train an adapter with another objective, as docs/recipes.md has it.
OTHER_OBJECTIVES = {
    "kto": "loss=humanline.losses.HumanlineKTOLoss loss.desirable_weight=1.1",
    "grpo": "loss=humanline.losses.HumanlineGRPOLoss loss.beta=0.01",
}

# The vocabulary of write_chat_tokenizer: single bytes.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = {token: id for id, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def ids(text: str) -> list[int]:
    return [VOCABULARY[byte] for byte in text.replace(" ", "Ġ")]


# Lines that each builder reads, and what each objective is to learn from them.
PROMPT = "What is 2 + 2?"
ANSWERS = ["4", "perhaps 4", "5"]
SCORES = [1.0, 0.75, 0.0]
LINES: dict[str, list[dict[str, Any]]] = {
    "humanline.data.preference_groups": [{"prompt": PROMPT, "chosen": "4", "rejected": "5"}],
    "humanline.data.labelled_groups": [
        {"prompt": PROMPT, "completion": "4", "label": True},
        {"prompt": PROMPT, "completion": "5", "label": False},
    ],
    "humanline.data.scored_groups": [
        {"prompt": PROMPT, "all_generated_responses": ANSWERS, "all_rm_scores": SCORES},
    ],
    "humanline.data.encoded_groups": [
        {"prompt": ids(PROMPT), "responses": [ids(answer) for answer in ANSWERS], "scores": SCORES},
    ],
}
LEARNED: dict[type[Objective], dict[str, Any]] = {
    DPO: {"4": "chosen", "5": "rejected"},
    KTO: {"4": True, "perhaps 4": True, "5": False},
    GRPO: dict(zip(ANSWERS, SCORES, strict=True)),
}

# How many responses to a prompt there are at most in what the hub has.
MOST_RESPONSES = {"princeton-nlp/llama3-ultrafeedback-armorm": 5, "princeton-nlp/gemma2-ultrafeedback-armorm": 5}


def text_of(path: Path) -> str:
    """A config's text, with its commands on one line each."""
    return path.read_text().replace(" \\\n#     ", " ")


def downloads(path: Path) -> list[str]:
    """The commands that bring what a config reads to where it reads it."""
    cfg = OmegaConf.load(path)
    folder, reward_model = cfg.checkpointer.checkpoint_dir, OmegaConf.select(cfg, "reward.path")
    fetch = f"python -m humanline.tools.fetch_smollm2 --output-dir {folder}"
    if folder in HUB:
        fetch = f'tune download {HUB[folder]} --output-dir {folder} --ignore-patterns "original/*"'
    return [fetch, *([f"tune download {HUB[reward_model]} --output-dir {reward_model}"] if reward_model else [])]


def effective(path: Path) -> dict[str, Any]:
    """A training config with all defaults filled in: settings, and the arguments of components."""
    cfg = OmegaConf.load(path)
    content = OmegaConf.to_container(cfg, resolve=False)
    arguments = {}
    for key, name in components(path).items():
        parameters = inspect.signature(find_component(name)).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
        arguments[key] = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
        arguments[key] |= content[key]
    return asdict(Settings.from_config(cfg)) | arguments


def value_of(content: dict[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(lambda node, part: node[part], key.split("."), content)


def rounded(parameters: int) -> str:
    return f"{parameters:.2e}".replace("e+0", "e").replace("e+", "e")


def size(tensor: torch.Tensor) -> int:
    """Bytes, scales and codes of NF4 included."""
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if is_nf4(tensor) else [tensor]
    return sum(part.numel() * part.itemsize for part in parts)


def is_nf4(tensor: torch.Tensor) -> TypeGuard[NF4Tensor]:
    return isinstance(tensor, NF4Tensor)


def recipe_names(path: Path) -> list[str]:
    """The recipes that the first line, ``# recipe: NAME, NAME``, says the config is for."""
    _, _, names = path.read_text().splitlines()[0].partition("# recipe: ")
    return names.replace(",", " ").split()


def recipe_file(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.py"


@functools.cache
def recipe_class(name: str) -> Any:
    """The class in ``recipes/NAME.py``."""
    module = runpy.run_path(str(recipe_file(name)))
    (found,) = (it for it in module.values() if isinstance(it, type) and it.__module__ == module["__name__"])
    return found


def recipe_classes(path: Path) -> list[Any]:
    return [recipe_class(name) for name in recipe_names(path) if recipe_file(name).is_file()]


def components(path: Path) -> dict[str, str]:
    """Each key that names a component -> the component."""
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {
        key: node["_component_"] for key, node in content.items() if isinstance(node, dict) and "_component_" in node
    }


def lines(dataset: DictConfig) -> list[dict]:
    """Lines for the builder of this dataset, with the fields named as the config says they are."""
    names = dataset.get("column_map") or {}
    return [{names.get(field, field): value for field, value in line.items()} for line in LINES[dataset._component_]]


def on_lines(dataset: DictConfig, folder: Path) -> DictConfig:
    """The dataset's config with a small file in place of its source."""
    replaced = {"source": write_jsonl(folder / "data.jsonl", *lines(dataset)), "split": "train"}
    return OmegaConf.merge(dataset, replaced, {"data_files": None} if "data_files" in dataset else {})


def build_model(cfg: DictConfig) -> torch.nn.Module:
    return built(OmegaConf.to_yaml(cfg.model))


@functools.cache
def built(model: str) -> torch.nn.Module:
    """The model of a config, without memory; a large one takes seconds to build."""
    with torch.device("meta"):
        return component(OmegaConf.create({"model": OmegaConf.create(model)}), "model")


def checkpoint_files(cfg: DictConfig) -> list[str]:
    files = OmegaConf.to_object(cfg.checkpointer.checkpoint_files)
    return FormattedCheckpointFiles.from_dict(files).build_checkpoint_filenames() if isinstance(files, dict) else files


def write_chat_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes in HF layout, with ChatML as its chat template."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (TEMPLATES / "smollm2.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))


def write_jsonl(file: Path, *lines: dict) -> str:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def here(path: Path, folder: Path) -> DictConfig:
    """The config as it is used here: on the CPU, with a small folder for a checkpoint and another for output."""
    cfg = OmegaConf.load(path)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_chat_tokenizer(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    if "checkpointer" in components(path):
        for name in checkpoint_files(cfg):
            (checkpoint / name).touch()
        cfg.checkpointer.checkpoint_dir = str(checkpoint)
    if "tokenizer" in components(path):
        cfg.tokenizer.path = str(checkpoint)
    cfg.output_dir = str(folder / "out")
    cfg.device = "cpu"
    return cfg


# ---- The cases


def every(configs: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", configs, ids=lambda path: path.stem)


def every_key(cases: list[tuple[Path, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("path", "key"), cases, ids=[f"{path.stem}-{key}" for path, key in cases])


def is_local(source: str) -> bool:
    return Path(source).suffix in (".json", ".jsonl", ".parquet")


TRAINING = [path for path in CONFIGS if any(hasattr(it, "train") for it in recipe_classes(path))]
HUMANLINE = [path for path in TRAINING if OmegaConf.load(path).loss.get("perception") != "none"]
COMPONENT_KEYS = [(path, key) for path in CONFIGS for key in components(path)]
DATASETS = [(path, key) for path, key in COMPONENT_KEYS if components(path)[key] in LINES]
TRAINING_DATASETS = [(path, key) for path, key in DATASETS if path in TRAINING]
SHIPPED_DATASETS = [(path, key) for path, key in TRAINING_DATASETS if is_local(OmegaConf.load(path)[key].source)]
WITH_CHECKPOINT = [path for path in CONFIGS if "checkpointer" in components(path)]
WITH_DOWNLOAD = [path for path in WITH_CHECKPOINT if OmegaConf.load(path).checkpointer.checkpoint_dir in HUB]
WITH_ADAPTER = [path for path in TRAINING if components(path)["reference"] == "humanline.reference.AdapterReference"]


# ---- The config and its recipe


@every(CONFIGS)
def test_the_first_line_names_recipes_that_exist(path):
    names = recipe_names(path)
    assert names and all(recipe_file(name).is_file() for name in names)


@every(CONFIGS)
def test_a_config_is_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= LONGEST_CONFIG


@every(CONFIGS)
def test_tune_validate_accepts_the_config(path):
    config.validate(OmegaConf.load(path))


@every(CONFIGS)
def test_the_recipe_knows_every_key_and_accepts_its_value(path, tmp_path):
    cfg = with_overrides(here(path, tmp_path), " ".join(OFFERED.get(path.stem, [])).split())
    for recipe in recipe_classes(path):
        # Either raises at an unknown key; a training recipe itself needs a process group.
        check = Settings.from_config if hasattr(recipe, "train") else recipe
        check(cfg)


# ---- The components


@every_key(COMPONENT_KEYS)
def test_the_component_is_built_with_the_config_s_arguments(path, key, tmp_path, monkeypatch):
    cfg = here(path, tmp_path)
    arguments, keywords = [], {}
    if key in ("optimizer", "lr_scheduler"):
        arguments = [build_model(cfg).parameters()]
    if key == "lr_scheduler":
        arguments, keywords = [component(cfg, "optimizer", *arguments)], {"num_training_steps": 100}
    if key.startswith("dataset"):
        arguments = [component(cfg, "tokenizer")]
        cfg[key] = on_lines(cfg[key], tmp_path)
    if key == "source":
        cfg[key] |= {"prompts": write_jsonl(tmp_path / "prompts.jsonl", {"prompt": PROMPT, "answer": "4"})}
        cfg[key] |= {"column_map": None, "split": "train"}
    if key == "reward" and "path" in cfg[key]:
        cfg[key].path = write_classifier(tmp_path / "classifier", max_position_embeddings=8192)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    built = build_model(cfg) if key == "model" else component(cfg, key, *arguments, **keywords)
    assert built is not None
    if key == "metric_logger":
        built.log_config(cfg)
        built.log_dict({"loss": 0.5}, step=1)
        built.close()
        assert [file for file in Path(cfg.output_dir).rglob("*") if file.is_file()]
    if key.startswith("dataset"):
        assert len(built) == len(lines(cfg[key]))
    assert not list(elsewhere.iterdir()), "a run writes into output_dir only, not where it was started"


# ---- The data


@every_key(DATASETS)
def test_the_split_is_one_that_datasets_understands(path, key):
    assert ReadInstruction.from_spec(OmegaConf.load(path)[key].get("split", "train"))


def objective_type(recipe: str) -> type[Objective]:
    return {"dpo": DPO, "kto": KTO, "grpo": GRPO}[recipe.split("_")[1]]


def objective(path: Path, cfg: DictConfig) -> Objective:
    """That of the config's recipe, or of several recipes, which share it."""
    return objective_type(recipe_names(path)[0])(component(cfg, "loss"))


@every_key(TRAINING_DATASETS)
def test_the_objective_learns_which_response_is_better(path, key, tmp_path):
    cfg = here(path, tmp_path)
    cfg[key] = on_lines(cfg[key], tmp_path)
    tokenizer, learner = component(cfg, "tokenizer"), objective(path, cfg)
    learned = {}
    for group in learner.examples(component(cfg, key, tokenizer)):
        assert PROMPT in tokenizer.decode(group.prompt)
        worth = {DPO: ("chosen", "rejected"), KTO: group.labels, GRPO: group.scores}[type(learner)]
        learned |= zip(map(tokenizer.decode, group.responses), worth, strict=True)
    assert learned.items() <= LEARNED[type(learner)].items()
    assert learned.keys() >= {"4", "5"}


def shipped(cfg: DictConfig, key: str) -> GroupDataset:
    """The file that a dataset names, uncut: its limits are meant for another tokenizer, and single bytes are more."""
    whole = {"source": str(ROOT / cfg[key].source), "max_tokens": 1_000_000, "max_prompt_tokens": None}
    return component(cfg | {key: OmegaConf.merge(cfg[key], whole)}, key, component(cfg, "tokenizer"))


def most_responses(cfg: DictConfig, key: str) -> int:
    """How many responses to a prompt there are at most in a dataset's scored source."""
    source = cfg[key].source
    return max(len(group.responses) for group in shipped(cfg, key)) if is_local(source) else MOST_RESPONSES[source]


def longest_groups(path: Path, key: str, cfg: DictConfig, folder: Path) -> list[Group]:
    """The longest groups that a dataset's limits let through, and the longest that the objective makes of them.

    The prompt stands once in a row and each response takes what it leaves: the shortest prompt makes the longest group.
    The longest prompt is there as well, since KTO's baseline puts other responses to it.
    """
    limited = component(cfg | {key: on_lines(cfg[key], folder)}, key, component(cfg, "tokenizer"))
    form, budget = limited[0], limited.budget
    count, scores = len(form.responses), None
    if form.scores is not None:
        count = most_responses(cfg, key)
        scores = (1.0, *[0.0] * (count - 1))  # none is the mean, which would leave KTO one response less
    endless = tuple([token] * budget.max_tokens for token in range(count))
    groups = [
        budget.fit(replace(form, prompt=[0] * length, responses=endless, scores=scores))
        for length in (1, budget.max_tokens - 1)
    ]
    learner = objective(path, cfg)
    examples = learner.examples(GroupDataset(groups, budget=budget))
    return [*examples, *filter(None, [learner.longest_kl_group(examples)])]


@every_key(TRAINING_DATASETS)
def test_the_longest_group_fits_one_pass_and_the_model_s_positions(path, key, tmp_path):
    cfg = here(path, tmp_path)
    budget = Settings.from_config(cfg).row_budget(torch.device("cpu"))
    positions = build_model(cfg).max_seq_len
    for group in longest_groups(path, key, cfg, tmp_path):
        assert len(pack([group], budget)) == 1
        assert all(len(group.prompt) + len(response) <= positions for response in group.responses)


@every_key(SHIPPED_DATASETS)
def test_the_file_that_the_dataset_names_is_in_the_repository_fills_the_steps_and_is_no_concern(path, key, tmp_path):
    cfg = here(path, tmp_path)
    learner = objective(path, cfg)
    found = learner.examples(shipped(cfg, key))
    if key == "dataset":
        setting = Settings.from_config(cfg)
        step = setting.batch_size * setting.gradient_accumulation_steps
        assert len(found) >= step * (setting.max_steps_per_epoch or 1)
        assert learner.imbalance_warning(found) is None


# ---- The header


@every(WITH_CHECKPOINT)
def test_the_header_downloads_to_the_folder_that_the_config_reads(path):
    cfg, text = OmegaConf.load(path), text_of(path)
    assert all(f"\n#   {command}\n" in text for command in downloads(path))
    assert text.count("--output-dir ") == len(downloads(path))
    assert "tokenizer" not in components(path) or cfg.tokenizer.path == cfg.checkpointer.checkpoint_dir


@every(WITH_DOWNLOAD)
def test_tune_download_takes_the_header_s_line_and_leaves_what_the_config_reads(path):
    cfg = OmegaConf.load(path)
    words = shlex.split(downloads(path)[0])
    parsed = TuneCLIParser()._parser.parse_args(words[1:])
    needed = [
        *checkpoint_files(cfg),
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(filter_repo_objects(needed, ignore_patterns=parsed.ignore_patterns)) == needed
    # A second copy of the weights, as large again, is left behind.
    assert not list(filter_repo_objects(["original/consolidated.00.pth"], ignore_patterns=parsed.ignore_patterns))


@every(CONFIGS)
def test_the_header_s_tune_run_lines_name_this_config_and_its_recipe(path):
    text = text_of(path)
    given = [text.count(f" recipes/{name} --config configs/{path.name}") for name in recipe_names(path)]
    assert sum(given) == text.count("--config ") > 0


@every(CONFIGS)
def test_the_overrides_that_a_config_offers_are_in_its_text_and_of_its_keys(path):
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    for words in OFFERED.get(path.stem, []):
        assert f" {words}\n" in text_of(path)
        for override in words.split():
            value_of(content, override.partition("=")[0])


@every(CONFIGS)
def test_what_a_config_names_exists(path):
    for word in path.read_text().split():
        name = word.rpartition("=")[2].strip("`'\".,;:(){}")
        if name.startswith(("humanline.", "torchtune.")):
            assert pydoc.locate(name) is not None, name


# ---- The guide to one GPU, which has what the weights take

SINGLE_GPU = (ROOT / "docs" / "single_gpu.md").read_text()


def test_the_guide_has_the_memory_that_a_full_training_takes(tmp_path):
    cfg = here(LLAMA3, tmp_path)
    parameters = sum(parameter.numel() for parameter in build_model(cfg).parameters())
    policy = 4 * DTYPES[Settings.from_config(cfg).master_dtype].itemsize
    assert cfg.reference._component_ == "humanline.reference.WindowedReference"
    gigabytes = f"{parameters * policy / 1e9:.1f}"
    assert f"| `{LLAMA3.stem}` | {rounded(parameters)} | {policy} a parameter | {gigabytes} |" in SINGLE_GPU


# ---- LoRA and QLoRA


@every([path for path in WITH_ADAPTER if path in WITH_DOWNLOAD])
def test_the_guide_has_the_memory_that_the_base_and_its_adapter_take(path, tmp_path):
    cfg = here(path, tmp_path)
    setting = Settings.from_config(cfg)
    with training.set_default_dtype(DTYPES[setting.dtype]), torch.device("meta"):
        model = component(cfg, "model")  # of its own, since it is changed
    freeze_base(model, DTYPES[setting.master_dtype])
    base = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    parameters, bytes_each = rounded(sum(weight.numel() for weight in base)), "2 a parameter"
    if quantized := list(filter(is_nf4, base)):
        in_nf4 = sum(weight.numel() for weight in quantized)
        parameters += f" ({rounded(in_nf4)} in NF4)"
        bytes_each = f"{sum(map(size, quantized)) / in_nf4:.4f} a parameter in NF4, 2 elsewhere"
    assert all(weight.itemsize == 2 for weight in base if not is_nf4(weight))
    adapter = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    trained = 5 * DTYPES[setting.master_dtype].itemsize  # weight, gradient, two moments, and the reference's weight
    gigabytes = f"{(sum(map(size, base)) + adapter * trained) / 1e9:.2f}"
    cells = f"{parameters} + {rounded(adapter)} | {bytes_each}, {trained} in the adapter | {gigabytes}"
    assert f"| `{path.stem}` | {cells} |" in SINGLE_GPU


@every(WITH_ADAPTER)
def test_an_adapter_trains_on_one_gpu_or_on_several_with_as_many_groups_a_step(path):
    assert [recipe.sharded for recipe in recipe_classes(path)] == [False, True]
    if path in WITH_DOWNLOAD:
        share = OmegaConf.load(path).batch_size // 4
        command = "tune run --nproc_per_node 4 recipes/humanline_dpo_distributed --config"
        assert f"{command} configs/{path.name} batch_size={share}\n" in text_of(path)
    assert path.read_text().count("--nproc_per_node") == (path in WITH_DOWNLOAD)


@every(WITH_ADAPTER)
@pytest.mark.parametrize("name", OTHER_OBJECTIVES)
def test_an_adapter_trains_with_another_objective_as_the_page_says(path, name):
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert f"humanline_{name}_single_device" in page and OTHER_OBJECTIVES[name] in page
    cfg = with_overrides(load_config(path), OTHER_OBJECTIVES[name].split())
    loss = objective_type(f"humanline_{name}_single_device").loss_type
    built = component(cfg, "loss")
    _, _, last = OTHER_OBJECTIVES[name].rpartition("loss.")
    key, _, value = last.partition("=")
    assert type(built) is loss and getattr(built, key) == float(value)


LLAMA3_LORA, LLAMA3_QLORA = (LLAMA3.with_stem(f"llama3_8b_{mode}") for mode in ("lora", "qlora"))
QWEN_LORA, QWEN_QLORA = (LLAMA3.with_stem(f"qwen2_5_1_5b_{mode}") for mode in ("lora", "qlora"))
OF_A_RANK = {"tokens_per_row", "rows_per_pass", "enable_activation_checkpointing", "compile"}
OF_A_CHECKPOINT = {"keep_last_n_checkpoints", "enable_async_checkpointing"}
OF_A_MODEL = {"output_dir", "model", "checkpointer", "tokenizer", "rows_per_pass"}
OF_AN_ADAPTER = {"adapter", "save_adapter_weights_only", "batch_size", "loss", "reference", "optimizer"}


@pytest.mark.parametrize(
    ("one", "other", "own"),
    [
        pytest.param(LLAMA3_LORA, LLAMA3_QLORA, {"output_dir", "model"}, id="llama3-lora-qlora"),
        pytest.param(QWEN_LORA, QWEN_QLORA, {"output_dir", "model"}, id="qwen2_5-lora-qlora"),
        pytest.param(LLAMA3_LORA, QWEN_LORA, OF_A_MODEL, id="lora-llama3-qwen2_5"),
        *(
            pytest.param(LLAMA3.with_stem(f"llama3_8b_{kind}"), LLAMA3.with_stem(f"{name}_{kind}"), OF_A_MODEL, id=name)
            for name, kind in [("qwen3_4b", "lora"), ("qwen3_4b", "qlora"), ("qwen3_8b", "lora"), ("qwen3_8b", "qlora")]
        ),
        pytest.param(LLAMA3, LLAMA3.with_stem("llama3_1_8b_offline"), OF_A_MODEL, id="llama3-llama3_1"),
        pytest.param(
            *(LLAMA3.with_stem(f"gemma{release}_27b_offline") for release in (2, 3)), OF_A_MODEL, id="gemma2-gemma3"
        ),
        pytest.param(
            LLAMA3,
            LLAMA3_LORA,
            {"output_dir", "model"} | OF_A_RANK | OF_A_CHECKPOINT | OF_AN_ADAPTER,
            id="llama3-full-lora",
        ),
    ],
)
def test_two_configs_differ_in_nothing_but_their_model_and_what_trains_of_it(one, other, own):
    one, other = map(effective, (one, other))
    assert {key for key in one | other if one.get(key) != other.get(key)} <= own


# ---- Ablations by overrides alone

# Overrides -> the loss's perception, and whether the config's own bounds and its own syncing stay in force.
ABLATIONS = {
    "loss.perception=none reference.sync_every=null": ("none", False, False),  # the ordinary objective
    "loss.perception=none": ("none", False, True),  # sync only
    "reference.sync_every=null": ("clip", True, False),  # clip only
    "": ("clip", True, True),  # humanline
    "loss.perception=sample loss.gamma_P=4 loss.gamma_R=4": ("sample", True, True),  # humanline with sampling
}

# Overrides that contradict each other or name no key -> the key that the error is about.
CONTRADICTIONS = {
    "loss.gamma_P=4": "loss.gamma_P",
    "loss.perception=none loss.gamma_R=4": "loss.gamma_R",
    "loss.perception=sample": "loss.gamma_P",
    "loss.perception=sample loss.gamma_P=4": "loss.gamma_R",
    "loss.perception=sample loss.gamma_P=4 loss.gamma_R=4 loss.log_eps_R=null": "loss.gamma_R",
    "loss.perception=sample loss.log_eps_P=null loss.log_eps_R=null": "loss.perception",
    "loss.perception=clamp": "loss.perception",
    "loss.log_eps_P=2": "loss.log_eps_P",
    "loss.gamma=4": "loss.gamma",
    "reference.sync_every=0": "reference.sync_every",
    "reference.sync=4": "reference.sync",
    "sync_every=4": "sync_every",
}


def loss_and_reference(path: Path, words: str) -> tuple[Any, Any]:
    """What the recipe builds of the config with overrides, which come to it as torchtune's command line gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recipe", "--config", str(path), *words.split()])
        with pytest.raises(SystemExit) as exit:
            config.parse(lambda cfg: cfg)()
    cfg = exit.value.code
    Settings.from_config(cfg)
    return objective(path, cfg).loss, component(cfg, "reference")


def method_table() -> list[tuple[str, str, str]]:
    """Perception, sync interval and overrides of each run in the table of ablations of docs/method.md."""
    section = (ROOT / "docs" / "method.md").read_text().partition("\n## Ablations\n")[2].partition("\n## ")[0]
    _, _, *rows = (line.strip("|").split("|") for line in section.splitlines() if line.startswith("|"))
    return [
        (perception.strip(" `"), sync_every.strip(), words)
        for _, perception, sync_every, overrides in rows
        for words in re.findall(r"`([^`]+)`", overrides) or [""]
    ]


@every(HUMANLINE)
@pytest.mark.parametrize("words", ABLATIONS, ids=lambda words: words.replace(" ", "-") or "humanline")
def test_an_ablation_is_the_config_with_overrides(path, words):
    perception, bounded, synced = ABLATIONS[words]
    own = OmegaConf.load(path)
    bounds, sync_every = (own.loss.log_eps_P, own.loss.log_eps_R), own.reference.sync_every
    assert None not in (*bounds, sync_every)
    loss, reference = loss_and_reference(path, words)
    assert loss.perception == perception
    assert loss.bounds == (bounds if bounded else (None, None))
    assert reference.sync_every == (sync_every if synced else None)


@every(LLAMA3_CONFIGS)
@pytest.mark.parametrize("words", CONTRADICTIONS, ids=lambda words: words.replace(" ", "-"))
def test_a_contradiction_is_an_error_that_names_the_key(path, words):
    with pytest.raises(ConfigError, match=f"^{re.escape(CONTRADICTIONS[words])}: "):
        loss_and_reference(path, words)


@every(HUMANLINE)
def test_the_overrides_in_the_method_s_table_do_what_it_says(path):
    table = method_table()
    assert {words for _, _, words in table} >= ABLATIONS.keys()
    for perception, sync_every, words in table:
        loss, reference = loss_and_reference(path, words)
        assert loss.perception == perception
        assert (reference.sync_every is None) == (sync_every == "null")


# ---- llama3_8b_offline and its like for KTO and GRPO: the paper's setting

KNOWN_SETTINGS = {
    "dataset.source": "princeton-nlp/llama3-ultrafeedback-armorm",
    "dataset.max_tokens": 1250,
    "dataset.max_prompt_tokens": 625,
    "epochs": 1,
    "loss.log_eps_P": -1.5,
    "loss.log_eps_R": 1.5,
    "reference.sync_every": 1,
    "optimizer._component_": "torch.optim.AdamW",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-5,
    "optimizer.weight_decay": 0.01,
    "clip_grad_norm": 1.0,
    "dtype": "bf16",
    "master_dtype": "fp32",
}
# 10k pairs; 20k examples, which are 4k groups of 5.
OWN_SETTINGS = {
    LLAMA3: {"loss._component_": "humanline.losses.HumanlineDPOLoss", "dataset.split": "train[:10000]"},
    LLAMA3_KTO: {
        "loss._component_": "humanline.losses.HumanlineKTOLoss",
        "loss.desirable_weight": 1.1,
        "dataset.split": "train[:4000]",
    },
    LLAMA3_GRPO: {"loss._component_": "humanline.losses.HumanlineGRPOLoss", "dataset.split": "train[:4000]"},
}


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_has_the_paper_s_setting(path):
    content, known = effective(path), KNOWN_SETTINGS | OWN_SETTINGS[path]
    assert {key: value_of(content, key) for key in known} == known


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_differs_between_objectives_in_data_batch_and_loss_only(path):
    cfg, dpo = map(effective, (path, LLAMA3))
    own = {"output_dir", "dataset", "dataset_val", "batch_size", "loss"} | OF_A_RANK
    assert {key for key in cfg | dpo if cfg.get(key) != dpo.get(key)} <= own


# 32 pairs as in the paper; 80 responses for its 64, since whole groups of 5 on 8 GPUs make 40 or 80.
GROUPS_A_STEP = {LLAMA3: 32, LLAMA3_KTO: 16, LLAMA3_GRPO: 16}


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_takes_the_groups_of_a_step_on_8_gpus(path):
    setting = Settings.from_config(OmegaConf.load(path))
    assert 8 * setting.batch_size * setting.gradient_accumulation_steps == GROUPS_A_STEP[path]


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_warms_up_over_a_tenth_of_its_steps(path):
    cfg = OmegaConf.load(path)
    optimizer = component(cfg, "optimizer", [torch.nn.Parameter(torch.zeros(1))])
    schedule = component(cfg, "lr_scheduler", optimizer, num_training_steps=300)
    rates = []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:30] == sorted(set(rates[:30])) and rates[29] < cfg.optimizer.lr
    assert set(rates[30:]) == {cfg.optimizer.lr}


# Responses of the longest group, and how often a pass holds it.
LONGEST = {LLAMA3: (2, 2), LLAMA3_KTO: (5, 1), LLAMA3_GRPO: (5, 1)}


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_needs_every_row_of_a_pass_for_the_longest_group_or_the_longest_pair_twice(path, tmp_path):
    responses, times = LONGEST[path]
    cfg = here(path, tmp_path)
    longest, *_ = longest_groups(path, "dataset", cfg, tmp_path)
    assert [len(response) for response in longest.responses] == [1249] * responses
    budget = Settings.from_config(cfg).row_budget(torch.device("cpu"))
    (rows,) = pack([longest] * times, budget)
    assert len(rows) == budget.rows_per_pass


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_reads_the_hub_s_four_files(path):
    expected = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert checkpoint_files(OmegaConf.load(path)) == expected


@every(LLAMA3_CONFIGS)
def test_llama3_8b_offline_says_how_to_download_the_model_and_the_docs_what_memory_it_takes(path):
    assert "tune download meta-llama/Meta-Llama-3-8B-Instruct " in path.read_text()
    assert f"\n| `{path.stem}` | 8 | " in (ROOT / "docs" / "memory.md").read_text()


# ---- llama3_8b_offline: the tokenizer, with Llama 3's real vocabulary


def llama3_special_tokens() -> list[str]:
    """The 256 special tokens of Llama 3 in the order of their ids, which follow the vocabulary's."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    first = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>"]
    return [*first, reserved[4], "<|eot_id|>", *reserved[5:]]


@pytest.fixture(scope="session")
def llama3_vocabulary(tmp_path_factory) -> Path:
    """Llama 3's tokenizer.model, from the package index; without an index the tests of it are skipped."""
    folder = tmp_path_factory.mktemp("llama-models")
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest"]
    done = subprocess.run([*download, str(folder), LLAMA3_WHEEL], capture_output=True, text=True)
    if done.returncode:
        with tempfile.TemporaryDirectory() as scratch:
            if subprocess.run([*download, scratch, "six"], capture_output=True).returncode:
                pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == LLAMA3_WHEEL_SHA256
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("llama_models/llama3/tokenizer.model", folder))


@pytest.fixture(scope="session")
def theirs(llama3_vocabulary) -> Llama3Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # its cache goes by the file's path, and outlives this test session
        return llama3_tokenizer(str(llama3_vocabulary))


@pytest.fixture(scope="session")
def ours(llama3_vocabulary, tmp_path_factory) -> ChatTokenizer:
    """The config's tokenizer on the same vocabulary in HF layout."""
    folder = tmp_path_factory.mktemp("llama3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        converter = TikTokenConverter(str(llama3_vocabulary), extra_special_tokens=llama3_special_tokens())
        converter.converted().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    template = (TEMPLATES / "llama3.jinja").read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "chat_template": template}))
    cfg = OmegaConf.load(LLAMA3)
    cfg.tokenizer.path = str(folder)
    return component(cfg, "tokenizer")


def assert_same_ids(ours: ChatTokenizer, theirs: Llama3Tokenizer, prompt: list[dict], response: str) -> None:
    """torchtune's tokenizer gives the same ids on both sides of where generation starts."""

    def their_ids(answer: str, **kwargs: bool) -> list[int]:
        messages = [Message(role=m["role"], content=m["content"]) for m in prompt]
        return theirs.tokenize_messages([*messages, Message(role="assistant", content=answer)], **kwargs)[0]

    # torchtune generates after an empty answer without an end: the chat up to the assistant's header.
    prompt_ids = their_ids("", add_end_tokens=False)
    # Behind a whole chat it puts end-of-text, which Llama 3's chat template does not, and which the model never writes.
    *chat_ids, end_of_text = their_ids(response)
    assert end_of_text == theirs.eos_id and chat_ids[: len(prompt_ids)] == prompt_ids
    assert ours.encode_prompt(prompt) == prompt_ids
    assert ours.encode_response(prompt, response) == chat_ids[len(prompt_ids) :]


USER = {"role": "user", "content": "Write a haiku about 12345 naïve 東京 cats 🙂.\n\n\tThen, in Python:\n  def f(x):\n"}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "You're a poet. "}, USER],
    "turns": [USER, {"role": "assistant", "content": "\n\nSoft paws…\n"}, {"role": "user", "content": " Again! "}],
    "system and turns": [
        {"role": "system", "content": "\nAnswer briefly."},
        USER,
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Please?"},
    ],
}


@pytest.mark.parametrize("chat", CHATS)
def test_llama_3_ids_are_those_of_torchtune_s_own_tokenizer(ours, theirs, chat):
    assert_same_ids(ours, theirs, CHATS[chat], "\nSoft paws on tatami,\n  I'd say it's 2024's  best!!\n\n")
    assert_same_ids(ours, theirs, CHATS[chat], "")


@settings(max_examples=200)
@given(st.none() | st.text(), st.text(), st.text())
def test_llama_3_ids_are_those_of_torchtune_s_own_tokenizer_for_any_text(ours, theirs, system, user, response):
    # Special tokens spelled out in a message become those tokens here, as in transformers, and plain text in torchtune.
    assume(not any("<|" in text for text in (system or "", user, response)))
    chat = [] if system is None else [{"role": "system", "content": system}]
    assert_same_ids(ours, theirs, [*chat, {"role": "user", "content": user}], response)


def test_llama_3_ids_fit_the_model_s_embedding_exactly(ours, theirs):
    embedding = build_model(OmegaConf.load(LLAMA3)).tok_embeddings
    assert ours.vocab_size == embedding.num_embeddings == theirs.base_vocab_size + len(llama3_special_tokens())


def test_llama_3_stops_at_the_end_of_its_turn(ours, theirs):
    assert ours.stop_tokens[0] == theirs.eot_id
    assert (ours.bos_id, ours.special_tokens["<|end_of_text|>"]) == (theirs.bos_id, theirs.eos_id)
