"""Every config in configs/ runs as far as it can without weights and data, and its header tells the truth.

Components are built for real, with the config's own arguments: the model on the meta device, datasets from a small
file, tokenizers and checkpointers from a folder made here. A new config is covered by being there.
"""

import functools
import hashlib
import json
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from datasets import ReadInstruction
from huggingface_hub.utils import filter_repo_objects
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchtune import config
from torchtune._cli.tune import TuneCLIParser
from torchtune.data import Message
from torchtune.models.llama3 import Llama3Tokenizer, llama3_tokenizer
from torchtune.training.checkpointing import FormattedCheckpointFiles
from transformers.convert_slow_tokenizer import TikTokenConverter

from humanline.data import ChatTokenizer, Group, GroupDataset, encoded_groups, pack
from humanline.training import DPO, HumanlineRecipe, Settings, component
from humanline.training._settings import DTYPES

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LLAMA3 = ROOT / "configs" / "llama3_8b_offline.yaml"
TEMPLATES = Path(__file__).parent / "data" / "templates"

LLAMA3_WHEEL = "llama-models==0.3.0"
LLAMA3_WHEEL_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"

# What the memory of a full training is said to be: weights, gradients and two moments, and the reference's copy.
MEMORY = re.compile(
    r"([\d.]+e\d+) parameters x \((\d+) bytes [^+]+ \+ (\d+) bytes of reference\) = (\d+) GB, (\d+) GB a GPU on eight"
)

# A line that each builder reads, the better response first.
ANSWERS = {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}
LINES = {
    "humanline.data.preference_groups": ANSWERS,
    "humanline.data.labelled_groups": {"prompt": ANSWERS["prompt"], "completion": "4", "label": True},
    "humanline.data.scored_groups": {
        "prompt": ANSWERS["prompt"],
        "all_generated_responses": ["4", "perhaps 4", "5"],
        "all_rm_scores": [1.0, 0.5, -1.0],
    },
    "humanline.data.encoded_groups": {"prompt": [1, 2], "responses": [[3, 4], [5, 4]], "scores": [1.0, -1.0]},
}


def header(path: Path) -> str:
    """The comment that a config opens with, as text."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def commands(path: Path, program: str) -> list[list[str]]:
    """The words of the header's command lines that start with ``program``."""
    lines = header(path).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def overrides(path: Path) -> list[str]:
    """The ``key=value`` that the header names, in command lines or beside them."""
    return re.findall(r"(?<!\S)[a-z_]\w*(?:\.\w+)*=\S+", header(path))


def stated_memory(path: Path) -> tuple[str, ...] | None:
    """What the header says: parameters, bytes of policy and reference for each, GB in all and on one of eight GPUs."""
    found = MEMORY.search(" ".join(header(path).split()))
    return found and found.groups()


def recipe_names(path: Path) -> list[str]:
    """The recipes that the first line, ``# recipe: NAME, NAME``, says the config is for."""
    _, _, names = path.read_text().splitlines()[0].partition("# recipe: ")
    return names.replace(",", " ").split()


def recipe_file(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.py"


@functools.cache
def recipe_class(name: str) -> type:
    """The class in ``recipes/NAME.py``."""
    module = runpy.run_path(str(recipe_file(name)))
    (found,) = (it for it in module.values() if isinstance(it, type) and it.__module__ == module["__name__"])
    return found


def recipe_classes(path: Path) -> list[type]:
    return [recipe_class(name) for name in recipe_names(path) if recipe_file(name).is_file()]


def components(path: Path) -> dict[str, str]:
    """Each key that names a component -> the component."""
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {
        key: node["_component_"] for key, node in content.items() if isinstance(node, dict) and "_component_" in node
    }


def line(dataset: DictConfig) -> dict:
    """A line for the builder of this dataset, with the fields named as the config says they are."""
    names = dataset.get("column_map") or {}
    return {names.get(field, field): value for field, value in LINES[dataset._component_].items()}


def from_file(dataset: DictConfig, folder: Path, *lines: dict) -> DictConfig:
    """The dataset's config with a small file in place of its source."""
    replaced = {"source": write_jsonl(folder / "data.jsonl", *lines), "split": "train"}
    return OmegaConf.merge(dataset, replaced, {"data_files": None} if "data_files" in dataset else {})


def build_model(cfg: DictConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return component(cfg, "model")


def checkpoint_files(cfg: DictConfig) -> list[str]:
    files = OmegaConf.to_object(cfg.checkpointer.checkpoint_files)
    return FormattedCheckpointFiles.from_dict(files).build_checkpoint_filenames() if isinstance(files, dict) else files


def write_chat_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes in HF layout, with ChatML as its chat template."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
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


TRAINING = [path for path in CONFIGS if any(issubclass(it, HumanlineRecipe) for it in recipe_classes(path))]
PAIRS = [path for path in TRAINING if any(it.objective_type is DPO for it in recipe_classes(path))]
COMPONENT_KEYS = [(path, key) for path in CONFIGS for key in components(path)]
DATASETS = [(path, key) for path, key in COMPONENT_KEYS if components(path)[key] in LINES]
PAIR_DATASETS = [(path, key) for path, key in DATASETS if path in PAIRS]
SHIPPED_DATASETS = [(path, key) for path, key in PAIR_DATASETS if is_local(OmegaConf.load(path)[key].source)]
WITH_CHECKPOINT = [path for path in CONFIGS if "checkpointer" in components(path)]
WITH_DOWNLOAD = [path for path in WITH_CHECKPOINT if commands(path, "tune download")]
WITH_MEMORY = [path for path in TRAINING if stated_memory(path)]


# ---- The config and its recipe


@every(CONFIGS)
def test_the_first_line_names_recipes_that_exist(path):
    names = recipe_names(path)
    assert names and all(recipe_file(name).is_file() for name in names)


@every(CONFIGS)
def test_tune_validate_accepts_the_config(path):
    config.validate(OmegaConf.load(path))


@every(CONFIGS)
def test_the_recipe_knows_every_key_and_accepts_its_value(path, tmp_path):
    cfg = OmegaConf.merge(here(path, tmp_path), OmegaConf.from_dotlist(overrides(path)))
    for recipe in recipe_classes(path):
        # Either raises at an unknown key; a training recipe itself needs a process group.
        check = Settings.from_config if issubclass(recipe, HumanlineRecipe) else recipe
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
        cfg[key] = from_file(cfg[key], tmp_path, line(cfg[key]))
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
        assert len(built) == 1
    assert not list(elsewhere.iterdir()), "a run writes into output_dir only, not where it was started"


# ---- The data


@every_key(DATASETS)
def test_the_split_is_one_that_datasets_understands(path, key):
    assert ReadInstruction.from_spec(OmegaConf.load(path)[key].get("split", "train"))


def pairs(cfg: DictConfig, path: Path, dataset: GroupDataset) -> list[Group]:
    """What the config's recipe, or the first of several that share an objective, learns from ``dataset``."""
    recipe = recipe_classes(path)[0]
    return list(recipe.objective_type(component(cfg, "loss")).examples(dataset))


@every_key(PAIR_DATASETS)
def test_the_better_response_becomes_the_chosen_one(path, key, tmp_path):
    cfg = here(path, tmp_path)
    tokenizer = component(cfg, "tokenizer")
    cfg[key] = from_file(cfg[key], tmp_path, line(cfg[key]))
    (pair,) = pairs(cfg, path, component(cfg, key, tokenizer))
    if "encoded_groups" in components(path)[key]:
        assert [list(ids) for ids in (pair.prompt, *pair.responses)] == [[1, 2], [3, 4], [5, 4]]
    else:
        assert "What is 2 + 2?" in tokenizer.decode(pair.prompt)
        assert [tokenizer.decode(response) for response in pair.responses] == ["4", "5"]


def longest_pair(path: Path, key: str, cfg: DictConfig, folder: Path) -> Group:
    """The longest pair that the limits of the dataset let through.

    The prompt stands once in a row and each response takes what it leaves: the shortest prompt makes the longest pair.
    """
    endless = {"prompt": [0], "responses": [[1] * 100_000, [2] * 100_000]}
    limits = {name: cfg[key][name] for name in ("max_tokens", "max_prompt_tokens") if name in cfg[key]}
    file = write_jsonl(folder / "longest.jsonl", endless)
    (pair,) = pairs(cfg, path, encoded_groups(None, file, **limits))
    return pair


@every_key(PAIR_DATASETS)
def test_the_longest_pair_fits_one_pass_and_the_model_s_positions(path, key, tmp_path):
    cfg = here(path, tmp_path)
    pair = longest_pair(path, key, cfg, tmp_path)
    assert len(pack([pair], Settings.from_config(cfg).row_budget(torch.device("cpu")))) == 1
    assert all(len(pair.prompt) + len(it) <= build_model(cfg).max_seq_len for it in pair.responses)


@every_key(SHIPPED_DATASETS)
def test_the_file_that_the_dataset_names_is_in_the_repository_and_fills_the_steps(path, key, tmp_path):
    cfg = here(path, tmp_path)
    file = ROOT / cfg[key].source
    assert file.is_file()
    # The limits are for tokens of the config's own tokenizer; single bytes are more.
    unlimited = {"source": str(file), "max_tokens": 1_000_000, "max_prompt_tokens": None}
    cfg[key] = OmegaConf.merge(cfg[key], unlimited)
    found = pairs(cfg, path, component(cfg, key, component(cfg, "tokenizer")))
    if key == "dataset":
        setting = Settings.from_config(cfg)
        step = setting.batch_size * setting.gradient_accumulation_steps
        assert len(found) >= step * (setting.max_steps_per_epoch or 1)


# ---- The header


@every(WITH_CHECKPOINT)
def test_the_header_downloads_to_the_folder_that_the_config_reads(path):
    cfg = OmegaConf.load(path)
    downloads = re.findall(r"--output-dir (\S+)", header(path))
    assert downloads == [cfg.checkpointer.checkpoint_dir]
    assert "tokenizer" not in components(path) or cfg.tokenizer.path in downloads


@every(WITH_DOWNLOAD)
def test_tune_download_takes_the_header_s_line_and_leaves_what_the_config_reads(path):
    cfg = OmegaConf.load(path)
    (words,) = commands(path, "tune download")
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
    lines = commands(path, "tune run")
    assert lines
    names = recipe_names(path)
    for words in lines:
        at = words.index("--config")
        assert words[at + 1] in (f"configs/{path.name}", f"humanline/{path.stem}")
        assert words[at - 1] in [*names, *(f"recipes/{name}" for name in names)]


@every(CONFIGS)
def test_the_keys_that_the_header_overrides_are_in_the_config(path):
    for override in overrides(path):
        node = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for part in override.partition("=")[0].split("."):
            assert part in node, override
            node = node[part]


@every(CONFIGS)
def test_what_the_comments_name_exists(path):
    comments = " ".join(re.findall(r"#(.*)", path.read_text()))
    for name in re.findall(r"\b(?:humanline|torchtune)(?:\.\w+)+", comments):
        assert pydoc.locate(name) is not None, name


@every(WITH_MEMORY)
def test_the_memory_that_the_header_states_is_that_of_the_model(path, tmp_path):
    cfg = here(path, tmp_path)
    setting = Settings.from_config(cfg)
    parameters = sum(parameter.numel() for parameter in build_model(cfg).parameters())
    policy, reference = 4 * DTYPES[setting.master_dtype].itemsize, DTYPES[setting.dtype].itemsize
    total = parameters * (policy + reference) / 1e9
    computed = (f"{parameters:.2e}".replace("e+0", "e"), policy, reference, f"{total:.0f}", f"{total / 8:.0f}")
    assert stated_memory(path) == tuple(map(str, computed))


# ---- llama3_8b_offline: the paper's setting

KNOWN_SETTINGS = {
    "dataset.source": "princeton-nlp/llama3-ultrafeedback-armorm",
    "dataset.split": "train[:10000]",
    "dataset.max_tokens": 1250,
    "dataset.max_prompt_tokens": 625,
    "epochs": 1,
    "loss._component_": "humanline.losses.HumanlineDPOLoss",
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


@pytest.mark.parametrize("key", KNOWN_SETTINGS)
def test_llama3_8b_offline_has_the_paper_s_setting(key):
    assert OmegaConf.select(OmegaConf.load(LLAMA3), key) == KNOWN_SETTINGS[key]


def test_llama3_8b_offline_takes_32_pairs_a_step_on_8_gpus():
    cfg = OmegaConf.load(LLAMA3)
    assert 8 * cfg.batch_size * cfg.gradient_accumulation_steps == 32


def test_llama3_8b_offline_warms_up_over_a_tenth_of_its_steps():
    cfg = OmegaConf.load(LLAMA3)
    optimizer = component(cfg, "optimizer", [torch.nn.Parameter(torch.zeros(1))])
    schedule = component(cfg, "lr_scheduler", optimizer, num_training_steps=300)
    rates = []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:30] == sorted(set(rates[:30])) and rates[29] < cfg.optimizer.lr
    assert set(rates[30:]) == {cfg.optimizer.lr}


def test_llama3_8b_offline_holds_the_longest_pair_twice_in_one_pass(tmp_path):
    cfg = here(LLAMA3, tmp_path)
    pair = longest_pair(LLAMA3, "dataset", cfg, tmp_path)
    assert [len(response) for response in pair.responses] == [1249, 1249]
    assert len(pack([pair, pair], Settings.from_config(cfg).row_budget(torch.device("cpu")))) == 1


def test_llama3_8b_offline_reads_the_hub_s_four_files():
    expected = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert checkpoint_files(OmegaConf.load(LLAMA3)) == expected


def test_llama3_8b_offline_says_how_to_download_the_model_and_what_memory_it_takes():
    assert commands(LLAMA3, "tune download")[0][2] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert stated_memory(LLAMA3)


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
