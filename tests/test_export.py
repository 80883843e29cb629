"""What a run hands out: weights that have what was learnt, under a name that is never missing."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TrajectoryRun
from safetensors.torch import load_file, save_file
from test_chat_tokenizer import user
from test_dates import TEMPLATE, write_dated_tokenizer

from humanline.checkpoint._export import _name_dtype
from humanline.checkpoint._kept_update import KeptUpdate
from humanline.checkpoint._replace import replace_folder, restore_replaced
from humanline.data import ChatTokenizer

LORA = {
    "_component_": "torchtune.models.llama3.lora_llama3",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
}


def in_bf16(run: TrajectoryRun, **config: object) -> TrajectoryRun:
    """The run with its checkpoint in bfloat16, as most are."""
    weights, path = run.folder / "model" / "model.safetensors", run.folder / "model" / "config.json"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "bfloat16"} | config))
    return run


def with_adapter(run: TrajectoryRun) -> TrajectoryRun:
    run.config["model"] |= LORA
    run.config["reference"]["_component_"] = "humanline.reference.AdapterReference"
    run.config["save_adapter_weights_only"] = False
    return run


def written(run: TrajectoryRun, name: str = "epoch_0") -> dict[str, torch.Tensor]:
    return load_file(run.folder / "out" / name / "model-00001-of-00001.safetensors")


def share_said(text: str) -> float:
    [share] = re.findall(r"epoch_0: .* ([\d.]+)% of the update's norm survived rounding", text)
    return float(share) / 100


def projection(before: dict, exact: dict, rounded: dict) -> float:
    """What is left of an update along it, independently of ours, in float64."""
    flat = [torch.cat([each[name].double().flatten() for name in sorted(before)]) for each in (before, exact, rounded)]
    update, left = flat[1] - flat[0], flat[2] - flat[0]
    return float(left @ update / (update @ update))


SMALL = ("optimizer.lr=1e-5", "max_steps_per_epoch=3")


# ---- The update in the weights


def test_full_training_of_a_bf16_checkpoint_is_handed_out_in_float32(trajectory, caplog):
    run = in_bf16(trajectory("dpo_8_k4"))
    start = load_file(run.folder / "model" / "model.safetensors")
    assert run.train(*SMALL) is None
    exact = written(run)
    assert share_said(caplog.text) == 1.0
    config = json.loads((run.folder / "out" / "epoch_0" / "config.json").read_text())
    assert config == json.loads((run.folder / "model" / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}

    # The same weights in a checkpoint of float32 train to the same ones.
    wide = run.again("wide")
    wide.config["checkpointer"]["checkpoint_dir"] = str(wide.folder / "model")
    (wide.folder / "model").mkdir()
    (wide.folder / "model" / "config.json").write_text((run.folder / "model" / "config.json").read_text())
    save_file({name: tensor.float() for name, tensor in start.items()}, wide.folder / "model" / "model.safetensors")
    assert wide.train(*SMALL) is None
    assert all(torch.equal(tensor, exact[name]) for name, tensor in written(wide).items())

    # Two ranks measure what rounding leaves of the update, and say what to do.
    narrow = run.again("narrow")
    narrow.train_on(2, *SMALL, f"batch_size={run.config['batch_size'] // 2}", "export_dtype=bf16")
    rounded = written(narrow)
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    output = (narrow.folder / "output.txt").read_text()
    assert "; set export_dtype: fp32\n" in output
    assert share_said(output) == pytest.approx(projection(start, exact, rounded), abs=0.002)
    assert share_said(output) < 0.9
    config = json.loads((narrow.folder / "out" / "epoch_0" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("spelled", ["torch_dtype", "dtype", None])
def test_a_merged_adapter_keeps_its_update_where_plain_transformers_loads_it(trajectory, caplog, spelled):
    peft = pytest.importorskip("peft")
    run = with_adapter(in_bf16(trajectory("dpo_8_k4")))
    path = run.folder / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["torch_dtype"]
    path.write_text(json.dumps(config | ({spelled: "bfloat16"} if spelled else {})))
    assert run.train(*SMALL) is None
    assert share_said(caplog.text) == 1.0
    [line] = [record.getMessage() for record in caplog.records if "epoch_0" in record.getMessage()]
    assert re.search(
        r"loaded in bfloat16 it keeps [\d.]+%, so load it in float32 \(vLLM: --dtype float32\), or use the adapter",
        line,
    )
    folder = run.folder / "out" / "epoch_0"

    start, exact = load_file(run.folder / "model" / "model.safetensors"), written(run)
    changed = {name for name in start if "q_proj" in name or "v_proj" in name}
    assert all(exact[name].dtype == (torch.float32 if name in changed else torch.bfloat16) for name in start)
    assert all(torch.equal(exact[name], start[name]) for name in start.keys() - changed)
    assert json.loads((folder / "config.json").read_text()) == config | {spelled or "torch_dtype": "float32"}

    tokens = torch.arange(20)[None]
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(run.folder / "model", dtype=torch.float32)(tokens).logits
    adapted = peft.PeftModel.from_pretrained(load(run.folder / "model", dtype=torch.float32), folder / "adapter")
    wanted = adapted(tokens).logits
    merged = load(folder)(tokens).logits  # in the dtype that config.json names
    assert (merged - wanted).norm() < 0.02 * (wanted - base).norm()
    rounded = load(folder, dtype=torch.bfloat16).float()(tokens).logits
    assert (rounded - wanted).norm() > 0.2 * (wanted - base).norm()


def test_bf16_weights_are_handed_out_as_they_trained(trajectory, caplog):
    run = in_bf16(trajectory("dpo_8_k4"))
    run.config["optimizer"] = {"_component_": "humanline.training.StochasticAdamW", "lr": 0.002}
    assert run.train("dtype=bf16", "master_dtype=bf16", "max_steps_per_epoch=2", "save_every_n_steps=2") is None
    assert {tensor.dtype for tensor in written(run).values()} == {torch.bfloat16}
    assert share_said(caplog.text) == 1.0
    config = (run.folder / "out" / "epoch_0" / "config.json").read_bytes()
    assert config == (run.folder / "model" / "config.json").read_bytes()


def test_weights_that_lose_digits_in_being_read_are_warned_of(trajectory, caplog):
    run = in_bf16(trajectory("dpo_8_k4"))
    assert run.train("max_steps_per_epoch=1") is None
    second = with_adapter(run.again("second"))
    second.config["checkpointer"] |= {
        "checkpoint_dir": str(run.folder / "out" / "epoch_0"),
        "checkpoint_files": ["model-00001-of-00001.safetensors"],
    }
    assert second.train("max_steps_per_epoch=1") is None
    assert "are rounded from float32" not in caplog.text
    again = second.again("again")
    assert again.train("max_steps_per_epoch=1", "dtype=bf16") is None
    assert re.search(r"dtype: \d+ weights of .*epoch_0 are rounded from float32 to bfloat16", caplog.text)
    assert "set dtype: fp32 to keep it" in caplog.text


def test_an_export_dtype_that_does_nothing_or_is_unknown_is_refused(trajectory):
    run = with_adapter(trajectory("dpo_8_k4"))
    line = run.train("export_dtype=bf16", "save_adapter_weights_only=True")
    assert "export_dtype: bf16 has no effect, since an adapter is written in float32; set" in line
    assert "export_dtype: expected fp32, bf16 or null, got 'fp16'" in run.train("export_dtype=fp16")


def test_the_share_is_that_along_the_update_and_noise_does_not_add_to_it():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(100_000, generator=generator).bfloat16()
    after = before.float() + 1e-4 * torch.randn(100_000, generator=generator)
    kept, exact, nothing = KeptUpdate(), KeptUpdate(), KeptUpdate()
    kept.add(before, after, after.bfloat16())
    assert kept.share == pytest.approx(projection({"": before}, {"": after}, {"": after.bfloat16()}), abs=1e-4)
    exact.add(before, after, after)
    nothing.add(before, before, before)
    assert exact.share == pytest.approx(1) and nothing.share == 1
    noisy = KeptUpdate()  # rounding a checkpoint of float32 moves all its weights
    noisy.add(after, after + 1e-6, (after + 1e-6).bfloat16())
    assert noisy.share < 0.05


# ---- The tokenizer and its template


def with_text(run: TrajectoryRun, **tokenizer: object) -> TrajectoryRun:
    """The run on text, with a tokenizer in a folder of its own."""
    folder = run.folder / "tokenizer"
    folder.mkdir()
    run.config["tokenizer"] = write_dated_tokenizer(folder) | tokenizer
    rows = [{"prompt": f"sum {i:02}", "chosen": f"right {i:02}", "rejected": f"wrong {i:02}"} for i in range(16)]
    run.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.config["dataset"]["_component_"] = "humanline.data.preference_groups"
    run.config |= {"batch_size": 4, "max_steps_per_epoch": 1}
    return run


def prompt_of(folder: Path) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template([user("sum 01")], add_generation_prompt=True, return_dict=False)


PLAIN = TEMPLATE.replace("Today : {{ strftime_now('%d %B') }} ", "")


def test_an_export_has_the_tokenizer_of_the_run_where_the_checkpoint_has_none(trajectory, caplog):
    run = with_text(trajectory("dpo_8_k4"))
    write_dated_tokenizer(run.folder / "tokenizer", template=PLAIN)
    assert run.train() is None
    tokenizer = ChatTokenizer(str(run.folder / "tokenizer"))
    assert prompt_of(run.folder / "out" / "epoch_0") == tokenizer.encode_prompt([user("sum 01")])
    files = "generation_config.json, tokenizer.json, tokenizer_config.json"
    assert f"survived rounding; the run's tokenizer files, not the checkpoint's: {files}" in caplog.text


@pytest.mark.parametrize("where", ["in its config", "in a file", "by tools"])
def test_an_export_has_the_template_of_the_run_wherever_the_checkpoint_has_its_own(trajectory, where):
    run = trajectory("dpo_8_k4")
    model = run.folder / "model"
    write_dated_tokenizer(model)
    (model / "generation_config.json").write_text('{"eos_token_id": [7], "top_p": 0.5}')
    if where != "in its config":
        (model / "chat_template.jinja").write_text("another")
    if where == "by tools":
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text("another for tools")
    for file in model.glob("*.json*"):
        file.chmod(0o444)
    (run.folder / "mine.jinja").write_text(PLAIN)
    run = with_text(run, path=str(model), chat_template=str(run.folder / "mine.jinja"))
    assert run.train() is None
    folder = run.folder / "out" / "epoch_0"
    tokenizer = ChatTokenizer(str(model), chat_template=str(run.folder / "mine.jinja"))
    assert prompt_of(folder) == tokenizer.encode_prompt([user("sum 01")])
    assert transformers.AutoTokenizer.from_pretrained(folder).get_chat_template(tools=[{}]) == PLAIN
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [7, *(id for id in tokenizer.stop_tokens if id != 7)], "top_p": 0.5}
    assert not list(folder.rglob("*.new"))


def test_an_adapter_alone_has_another_template_beside_it_too(trajectory, caplog):
    run = with_text(with_adapter(trajectory("dpo_8_k4")))
    write_dated_tokenizer(run.folder / "tokenizer", template=PLAIN)
    assert run.train("save_adapter_weights_only=True") is None
    expected = ChatTokenizer(str(run.folder / "tokenizer")).encode_prompt([user("sum 01")])
    assert prompt_of(run.folder / "out" / "epoch_0" / "adapter") == expected
    assert "the run's tokenizer files, not the checkpoint's" in caplog.text


def test_the_files_of_a_checkpoint_that_is_its_own_tokenizer_stay_as_they_are(trajectory, caplog):
    run = trajectory("dpo_8_k4")
    write_dated_tokenizer(run.folder / "model")
    run = with_text(run, path=str(run.folder / "model"))
    assert run.train() is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        exported = (run.folder / "out" / "epoch_0" / name).read_bytes()
        assert exported == (run.folder / "model" / name).read_bytes()
    assert not (run.folder / "out" / "epoch_0" / "generation_config.json").exists()
    assert "not the checkpoint's" not in caplog.text


def test_a_tokenizer_whose_files_are_gone_is_not_written_in_part(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_dated_tokenizer(folder, template=PLAIN)
    tokenizer = ChatTokenizer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing"):
        tokenizer.write_files(tmp_path / "export", tmp_path)
    assert not (tmp_path / "export").exists()


def test_another_vocabulary_is_removed_and_an_older_form_of_the_same_one_is_kept(tmp_path):
    mine, export, theirs = (tmp_path / name for name in ("mine", "export", "theirs"))
    for folder in (mine, export, theirs):
        folder.mkdir()
    write_dated_tokenizer(mine, template=PLAIN)
    for name in ("tokenizer.model", "special_tokens_map.json"):
        (export / name).write_text("theirs")
        (theirs / name).write_text("theirs")
    ours = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert ChatTokenizer(str(mine)).write_files(export, theirs) == sorted([*ours, "special_tokens_map.json"])
    assert sorted(path.name for path in export.iterdir()) == sorted([*ours, "tokenizer.model"])
    (theirs / "tokenizer.json").write_text("another")
    assert "tokenizer.model" in ChatTokenizer(str(mine)).write_files(export, theirs)
    assert sorted(path.name for path in export.iterdir()) == ours


# ---- The log


def test_a_config_json_that_may_not_be_written_to_is_replaced(tmp_path):
    """As the copy of one from a model store that is shared."""
    path = tmp_path / "config.json"
    path.write_text('{"torch_dtype": "bfloat16"}')
    os.link(path, tmp_path / "original")
    _name_dtype(path, "float32")
    assert json.loads(path.read_text()) == {"torch_dtype": "float32"}
    assert json.loads((tmp_path / "original").read_text()) == {"torch_dtype": "bfloat16"}


def test_an_export_is_one_line_that_names_the_folder(trajectory):
    run = trajectory("dpo_8_k4")
    run.config["epochs"] = 2
    run.train_on(1, "max_steps_per_epoch=1")
    output = (run.folder / "output.txt").read_text()
    for epoch in range(2):
        assert len(re.findall(rf"{run.folder}/out/epoch_{epoch}: \S+ GB, float32; 100.0% of the update", output)) == 1
    for theirs in (".partial", "Model checkpoint of size", "Saving final epoch", "The full model checkpoint"):
        assert theirs not in output


# ---- The folder's name


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_folder_under_the_name_that_is_looked_for(tmp_path, monkeypatch, exchanges):
    if not exchanges:  # as a file system that cannot
        monkeypatch.setattr("humanline.checkpoint._replace._exchange", lambda one, other: False)
    ended, moment = False, 0
    while not ended:
        moment += 1
        run = tmp_path / str(moment)
        for name in ("epoch_0", "epoch_0.partial"):
            (run / name).mkdir(parents=True)
            for file in ("a", "b"):
                (run / name / file).write_text(name)
        ended = killed_at(moment, lambda run=run: replace_folder(run / "epoch_0.partial", run / "epoch_0"))
        assert exchanges <= (run / "epoch_0").is_dir()
        restore_replaced(run)  # as the next start does
        found = {file.name: file.read_text() for file in (run / "epoch_0").iterdir()}
        assert found in ({"a": name, "b": name} for name in ("epoch_0", "epoch_0.partial"))
    assert moment > 5
    assert [path.name for path in run.iterdir()] == ["epoch_0"] and found["a"] == "epoch_0.partial"


def test_a_run_that_is_killed_while_it_replaces_an_epoch_leaves_a_whole_one(trajectory):
    run = trajectory("dpo_8_k4")
    run.config |= {"save_every_n_steps": 1, "max_steps_per_epoch": 1}
    assert run.train() is None
    before = written(run)
    whole = {path.name for path in (run.folder / "out" / "epoch_0").iterdir()}
    recipe = run.recipe
    run.recipe = run.folder / "killed.py"
    run.recipe.write_text(
        f"""
import os, runpy, signal, sys

def kill(event, arguments):  # when the files of an epoch's folder are gone, and the folder is to follow
    if event == "os.rmdir" and "epoch_" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
runpy.run_path({str(recipe)!r}, run_name="__main__")
"""
    )
    with run.start("resume_from_checkpoint=latest") as ranks:  # which writes the epoch again
        assert ranks.wait() == [-signal.SIGKILL], ranks.output()
    assert {path.name for path in (run.folder / "out" / "epoch_0").iterdir()} == whole
    assert all(torch.equal(tensor, before[name]) for name, tensor in written(run).items())
    run.recipe = recipe
    assert run.train("resume_from_checkpoint=latest") is None
    assert [path.name for path in (run.folder / "out").glob("epoch_*")] == ["epoch_0"]


def killed_at(moment: int, work) -> bool:
    """Does the work in a child that is killed before its n-th system call of files; whether it ended before that."""
    child = os.fork()
    if child == 0:
        events = iter(range(1, moment))

        def kill(event: str, _: object) -> None:
            if event.split(".")[0] in ("os", "shutil", "ctypes") and event != "os.kill" and next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(kill)
            work()
            os._exit(0)
        finally:  # the child must not run the rest of the tests
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status == 0
