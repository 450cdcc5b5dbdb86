"""A language experiment on a tiny random model, from its folder to the report."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_language
from helpers import load_config
from safetensors.numpy import load_file, save_file

from easy_jax import pipeline as train
from easy_jax.config import (
    ConfigError,
    InstructionsConfig,
    LanguageConfig,
    LanguageModelConfig,
    MethodConfig,
    OptimizerConfig,
    ScoringConfig,
    StageConfig,
    TextConfig,
    replace,
)
from easy_jax.core import causal_lm
from easy_jax.data import DataError, instructions, text
from easy_jax.io import sealed
from easy_jax.pretrained import hugging_face
from easy_jax.report import figures
from easy_jax.report import language as language_report
from easy_jax.train import scoring
from easy_jax.train.loss_table import LossTable, LossTableError

pytestmark = pytest.mark.slow

METHODS = (
    MethodConfig("standard"),
    MethodConfig("flow", weighting="flow"),
    MethodConfig("wise_ft_0", averaging="wise_ft", alpha=0.0),
    MethodConfig("wise_ft_1", averaging="wise_ft", alpha=1.0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_language.write_folder(tmp_path_factory.mktemp("language"))


def _config(folder, **changes):
    def data(name):
        return InstructionsConfig(
            path=str(folder / f"{name}.jsonl"), instruction_field="q", response_field="a"
        )

    config = LanguageConfig(
        name="tiny",
        model=LanguageModelConfig(path=str(folder), dtype="float32", remat="none", lora_rank=2),
        train=data("train"),
        heldout=(data("heldout"),),
        general=(str(folder / "prose.txt"),),
        text=TextConfig(
            template="{instruction} ->", eos_token="<eos>", max_length=17, row_length=16
        ),
        scoring=ScoringConfig(batch_size=8),
        finetune=StageConfig(
            epochs=1,
            batch_size=8,
            reduction="token_mean",
            optimizer=OptimizerConfig(name="adamw", learning_rate=0.01),
        ),
        methods=METHODS,
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.run(_config(folder), workdir)


def _row(results, method):
    (row,) = [row for row in results["language"] if row["method"] == method]
    return {key: value for key, value in row.items() if key not in ("method", "seconds")}


def test_it_learns_and_the_averages_are_between(done):
    results = done[1]
    base, standard = _row(results, "base"), _row(results, "standard")
    assert standard["heldout_nll"] < base["heldout_nll"] - 0.1
    assert _row(results, "wise_ft_0") == base
    assert _row(results, "wise_ft_1") == standard
    assert _row(results, "flow")["heldout_nll"] not in (
        base["heldout_nll"],
        standard["heldout_nll"],
    )
    np.testing.assert_allclose(base["prose_perplexity"], np.exp(base["prose_nll"]))


def test_what_is_written(done):
    workdir, results = done
    assert sealed.read(workdir / "results.json", AssertionError, "") == results
    table = LossTable.open(workdir / "loss_table")
    assert table.num_examples == 24
    ids = np.concatenate([ids for ids, _, _ in table.rows()])
    np.testing.assert_array_equal(ids, np.arange(24))
    assert np.median(table.token_losses().values) == pytest.approx(table.token_temperature)
    header, lines = language_report.lines(results["language"])
    markdown = (workdir / "results.md").read_text()
    assert markdown.splitlines()[0] == "| " + " | ".join(header) + " |"
    assert [line[0] for line in lines] == ["base", *(m.name for m in METHODS)]
    page = (workdir / "report.html").read_text()
    assert all(text in page for line in lines for text in line)
    assert page.count("<figure>") == 2  # learnt against forgotten, and the losses


def test_every_method_of_a_shipped_config_has_a_look_of_its_own(root):
    config = load_config(root / "configs" / "smollm2_gsm.py").get_config()
    names = ["base", *(method.name for method in config.methods)]
    looks = {name: figures.style(name) for name in names}
    assert len(set(looks.values())) == len(names)
    assert {looks[name][0] for name in names if "wise_ft" in name} == {figures.style("wise_ft")[0]}


def test_learnt_and_forgotten_are_differences_from_the_first_row():
    rows = [
        {"method": "base", "heldout_nll": 1.5, "prose_nll": 2.0, "prose_perplexity": 7.389},
        {"method": "x", "heldout_nll": 1.0, "prose_nll": 2.25, "prose_perplexity": 9.488},
    ]
    header, (base, line) = language_report.lines(rows)
    assert dict(zip(header, line, strict=True)) == {
        "method": "x",
        "heldout NLL": "1.0000",
        "heldout learnt": "+0.5000",
        "prose perplexity": "9.49",
        "prose forgotten": "+0.2500",
    }
    assert (
        base[header.index("heldout learnt")] == base[header.index("prose forgotten")] == "+0.0000"
    )


def test_the_same_again_finds_all_done(done, folder):
    workdir, results = done
    before = (workdir / "metrics.jsonl").read_text()
    assert train.run(_config(folder), workdir) == results
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused(done, folder):
    with pytest.raises(ConfigError, match=r"config\.seed: 7 now, 42 there"):
        train.run(_config(folder, seed=7), done[0])


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig("flow_token", weighting="flow_token"),
        MethodConfig("head", trainable="head", weighting="flow"),
        MethodConfig("lora", trainable="lora"),
        MethodConfig("l2", anchor="l2_sp", anchor_strength=1e-3),
        MethodConfig("sfa", averaging="sfa"),
    ],
    ids=lambda method: method.name,
)
def test_every_method_runs(method, folder, tmp_path):
    results = train.run(_config(folder, methods=(method,)), tmp_path)
    base, row = _row(results, "base"), _row(results, method.name)
    assert np.isfinite(row["heldout_nll"])
    assert row["heldout_nll"] != base["heldout_nll"]


def test_only_scoring(folder, tmp_path):
    assert train.run(_config(folder), tmp_path, until="score") == {}
    assert LossTable.open(tmp_path / "loss_table").num_examples == 24
    assert not (tmp_path / "results.json").exists()


def test_export(done, folder):
    """Each method's folder loads as the model that was measured."""
    workdir, results = done
    assert train.run(_config(folder), workdir, until="export") == {}
    config = _config(folder)
    for name in ("standard", "wise_ft_0"):
        exported = {"model.path": str(workdir / "exported" / name)}
        again = replace(config, exported, methods=METHODS[:1])
        found = train.run(again, workdir / f"again-{name}", "evaluate")
        base, row = _row(found, "base"), _row(results, name)
        np.testing.assert_allclose(base["heldout_nll"], row["heldout_nll"], rtol=1e-5)
    before = (workdir / "exported" / "standard" / "model.safetensors").stat().st_mtime_ns
    train.run(_config(folder), workdir, until="export")
    after = (workdir / "exported" / "standard" / "model.safetensors").stat().st_mtime_ns
    assert after == before


def test_export_is_for_language_models(root, tmp_path):
    config = load_config(root / "configs" / "quickstart.py").get_config()
    with pytest.raises(ConfigError, match="export is for language models"):
        train.run(config, tmp_path, until="export")


def _change_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")


def _change_data(folder):
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))


@pytest.mark.parametrize(("change", "named"), [(_change_weights, "model"), (_change_data, "data")])
def test_a_loss_table_of_another_model_or_data_set(change, named, folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    train.run(_config(copy), tmp_path / "run", until="score")
    change(copy)
    with pytest.raises(LossTableError, match=f"was computed with different inputs: {named} is"):
        train.run(_config(copy), tmp_path / "run", until="score")


def test_a_tokenizer_of_another_model(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"]["it"] = 99
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"token id 99.*, the model a vocabulary of 14"):
        train.run(_config(copy), tmp_path / "run", until="score")


def test_token_losses_that_are_not_returned(folder, tmp_path):
    config = _config(folder)
    tokenizer = text.load_tokenizer(folder)
    source = instructions.load(config.train, config.text, tokenizer)
    model = hugging_face.load(folder)
    for loss_fn, kept, arrays in (
        (causal_lm.causal_lm_loss, True, 2),
        (causal_lm.causal_lm_token_losses, False, 3),
    ):
        with pytest.raises(ValueError, match=rf"token_losses is {kept}, .* returns {arrays} "):
            scoring.score(
                model,
                source,
                tmp_path / str(kept),
                loss_fn=loss_fn,
                token_losses=kept,
                batch_size=8,
            )
    # What the mistake left behind does not refuse the call without it.
    table = scoring.score(
        model,
        source,
        tmp_path / "True",
        loss_fn=causal_lm.causal_lm_token_losses,
        token_losses=True,
        batch_size=8,
    )
    assert table.num_examples == 24


def test_the_example_of_the_readme(root, folder, tmp_path, monkeypatch):
    """Word by word, but for files, the fields' names and the token that ends a text."""
    blocks = (root / "README.md").read_text().split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if "hugging_face" in block]
    for theirs, ours in (
        ("models/smollm2", str(folder)),
        ("problems.jsonl", str(folder / "train.jsonl")),
        ('"query", "response"', '"q", "a"'),
        ("<|im_end|>", "<eos>"),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "fine-tuned" / "model.safetensors").is_file()


def test_too_few_records(folder, tmp_path):
    config = replace(_config(folder), {"train.size": 25})
    with pytest.raises(DataError, match="has 24 records; start=0 and size=25 ask for more"):
        train.run(config, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": TextConfig(row_length=8)}, r"config\.text\.row_length is 8"),
        ({"text": TextConfig(template="no place")}, r"config\.text\.template"),
        ({"model": LanguageModelConfig()}, r"config\.model\.path"),
        ({"train": InstructionsConfig()}, r"config\.train\.path"),
        (
            {
                "methods": (MethodConfig("t", weighting="flow_token"),),
                "finetune": StageConfig(reduction="weight_mean"),
            },
            r"config\.finetune\.reduction is 'weight_mean'",
        ),
        (
            {
                "methods": (
                    MethodConfig("x", trainable="lora", anchor="l2_sp", anchor_strength=1.0),
                )
            },
            r"methods\[x\]: adapters",
        ),
    ],
)
def test_a_bad_configuration_is_named(change, message, folder):
    with pytest.raises(ConfigError, match=message):
        _config(folder, **change).validate()


def _shipped():
    """Every language configuration in `configs/`, by file and argument."""
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py")):
        module = load_config(path)
        if isinstance(module.get_config(), LanguageConfig):
            for argument in module.ARGUMENTS:
                yield pytest.param(module, argument, id=f"{path.stem}:{argument}")


_RUN = set()  # configurations that have run; those of two models are the same on the tiny one


@pytest.mark.parametrize(("module", "argument"), list(_shipped()))
def test_every_shipped_config_is_valid_and_runs_one_step(module, argument, folder, tmp_path):
    config = module.get_config(argument)
    config.validate()
    assert all(part in module.__doc__ for part in argument.split(","))
    tiny = _config(folder)
    only = config.methods[:3] if not argument else config.methods
    config = replace(
        config,
        {
            "model.path": str(folder),
            "model.lora_rank": 2,
            "mesh.data": 8,
            "mesh.fsdp": 1,
            "finetune.epochs": 1,
            "finetune.batch_size": 8 * config.finetune.micro_batches,
            "scoring.batch_size": 8,
        },
        train=tiny.train,
        heldout=tiny.heldout,
        general=(),
        text=replace(tiny.text, max_segments=config.text.max_segments),
        eval_batch_size=8,
        methods=only,
    )
    anonymous = replace(
        config, name="shipped", text=replace(config.text, bos_token="", eos_token="")
    )
    if anonymous in _RUN:
        return
    _RUN.add(anonymous)
    results = train.run(config, tmp_path)
    assert [row["method"] for row in results["language"]] == ["base", *(m.name for m in only)]
    assert all(np.isfinite(row["heldout_nll"]) for row in results["language"])
