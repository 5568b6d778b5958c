"""main_vit.py as its users start it, on 2 CPU processes, and what it meets on the way."""

import json
import re
import shlex
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.end_to_end.common import (
    FAULTY,
    ROOT,
    VIT_COMMAND,
    comparable,
    read_lines,
    run,
    trace,
    traced,
    vit,
)
from tests.support.launch import set_launch

FINAL = "checkpoints/model_40"


def faulty(inputs, name, fault, *flags, check=False, **changes):
    """The undisturbed run's settings, and a fault."""
    environment = traced(inputs / name, SCRIPT="main_vit", FAULT=fault)
    return run(
        vit(inputs, name, *flags, **changes), script=FAULTY, check=check, environment=environment
    )


def resumed(inputs, name, **changes):
    done = run(
        vit(inputs, name, **changes),
        script=FAULTY,
        environment=traced(inputs / name, SCRIPT="main_vit"),
    )
    assert "will not be the one it continues" not in done.stderr
    return comparable(inputs / name)


def test_the_documentation_shows_the_reference_command():
    text = (ROOT / "docs/pretrain_vit.md").read_text()
    commands = [
        " ".join(block.replace("\\\n", " ").split())
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    ]
    assert any(VIT_COMMAND in command for command in commands)


def test_the_reference_command_is_accepted_verbatim(monkeypatch):
    import main_vit

    words = shlex.split(VIT_COMMAND)
    monkeypatch.setattr("sys.argv", words[words.index("main_vit.py") :])
    set_launch(monkeypatch, 2)
    args = main_vit.parse_arguments()
    assert (args.total_batch_size, args.nb_classes, args.epochs, args.weight_decay) == (
        384,
        1000,
        120,
        5e-6,
    )
    assert (
        args.model_ema and args.model_ema_eval and args.name == "NAME" and args.output_dir == "OUT"
    )


def test_it_trains_evaluates_saves_and_reports(straight_vit):
    metrics = read_lines(straight_vit / "metrics.jsonl")
    losses = [r["loss"] for r in metrics if "loss" in r]
    assert len(losses) == 40
    evaluations = [r for r in metrics if "top1" in r]
    assert [(r["update_step"], r["final"], r["eval_images"]) for r in evaluations] == [
        (20, False, 44),
        (40, True, 44),
    ]
    assert (
        evaluations[-1]["top1"] > 60
        and evaluations[-1]["top5"] == 100
        and "ema_top1" in evaluations[-1]
    )  # 25 by chance
    assert sorted({r["step"] for r in read_lines(straight_vit / "modules.jsonl")}) == [
        0,
        7,
        14,
        21,
        28,
        35,
    ]
    assert sorted(p.name for p in (straight_vit / "checkpoints").iterdir()) == [
        "model_20",
        "model_40",
    ]
    assert "<svg" in (straight_vit / "report.html").read_text()
    best = json.loads((straight_vit / "best/accuracy.json").read_text())
    assert best["top1"] == max(r["top1"] for r in evaluations)
    assert json.loads((straight_vit / "best_ema/accuracy.json").read_text())["top1"] == max(
        r["ema_top1"] for r in evaluations
    )


def test_the_schedule_of_eta_scales_all_decays_alike(straight_vit):
    """While eta falls to a fifth, decay / eta of each module stays as the analysis set it."""
    decays = [line["decays"] for line in trace(straight_vit).values()]
    ratios = [{name: decay / of["rest"] for name, decay in of.items()} for of in decays]
    assert decays[0]["rest"] == pytest.approx(5e-6, rel=0.01) and decays[-1][
        "rest"
    ] == pytest.approx(1e-6)
    modules = {
        (r["step"], r["module"]): r["weight_decay"] / 5e-6
        for r in read_lines(straight_vit / "modules.jsonl")
    }
    for update in range(40):
        step = (update + 1) // 7 * 7
        for name, ratio in ratios[update].items():
            assert name == "rest" or ratio == pytest.approx(modules[step, name])


def test_timm_loads_the_checkpoint(straight_vit):
    size = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
    for folder in (straight_vit / FINAL, straight_vit / "best_ema"):
        weights = folder / "model.safetensors"
        model = timm.create_model(
            "deit_tiny_patch16_224", checkpoint_path=str(weights), num_classes=4, **size
        )
        whole = timm.create_model(f"local-dir:{folder}", pretrained=True)
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.eval()(image), whole.eval()(image))
        assert load_file(weights).keys() == model.state_dict().keys()


def test_ranks_are_bit_identical(straight_vit):
    assert trace(straight_vit, 0) == trace(straight_vit, 1) and list(trace(straight_vit)) == list(
        range(1, 41)
    )


def test_one_process_sees_the_same_batches(inputs, straight_vit):
    """One process gives the losses of two, except for the order in which floats are added."""
    run(
        vit(inputs, "vit-alone", update_freq=2, num_workers=0),
        script="main_vit.py",
        processes=1,
        environment={"WANDB_MODE": "disabled"},
    )
    runs = [read_lines(folder / "metrics.jsonl") for folder in (inputs / "vit-alone", straight_vit)]
    for name in ("loss", "grad_norm", "weight_decay", "images_seen", "lr"):
        alone, together = ([r[name] for r in records if name in r] for records in runs)
        assert alone == pytest.approx(together, rel=5e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, every", [("kill@27@1", 1000), ("kill@33@all", 6), ("evaluate@20@all", 1000)]
)
def test_killed_and_resumed_is_bit_exact(inputs, straight_vit, fault, every):
    """From the end of an epoch, from the middle of one, and from before an evaluation."""
    name = "vit-" + fault.replace("@", "-")
    assert faulty(inputs, name, fault, save_every=every).returncode != 0
    assert not (inputs / name / FINAL).exists()
    assert resumed(inputs, name) == comparable(straight_vit)
    weights = [
        inputs / run / best / "model.safetensors"
        for best in ("best", "best_ema")
        for run in ("vit", name)
    ]
    assert (
        weights[0].read_bytes() == weights[1].read_bytes()
        and weights[2].read_bytes() == weights[3].read_bytes()
    )


@pytest.mark.slow
def test_a_signal_saves_in_the_middle_of_an_epoch(inputs, straight_vit):
    done = faulty(inputs, "vit-signal", "SIGUSR1@13@1")
    assert (
        done.returncode == 0 and "stopped after update 13; the same command goes on" in done.stderr
    )
    assert (
        resumed(inputs, "vit-signal", num_workers=0)["trace"] == comparable(straight_vit)["trace"]
    )


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_is_applied_on_none(inputs):
    faulty(inputs, "vit-nan", "nan@5@1", check=True, epochs=1, warmup_epochs=0)
    after = trace(inputs / "vit-nan")
    assert trace(inputs / "vit-nan", 1) == after
    assert after[5]["weights"] == after[4]["weights"] and after[6]["weights"] != after[5]["weights"]


def test_accuracy_is_the_same_for_any_ranks_and_batches(inputs, straight_vit):
    """44 images: no size divides them but 4."""
    said = set()
    for processes, size in ((1, 6), (2, 10), (3, 14)):
        words = vit(inputs, "vit-eval", "--eval", "true", "--resume", straight_vit, batch_size=size)
        done = run(words, script="main_vit.py", processes=processes)
        said.add(
            re.search(
                r"top-1 ([\d.]+) %, top-5 100.00 %, loss ([\d.]+) over 44 images", done.stderr
            ).groups()
        )
    final = read_lines(straight_vit / "metrics.jsonl")[-1]
    assert said == {(f"{final['top1']:.2f}", f"{final['eval_loss']:.4f}")}


@pytest.mark.slow
def test_an_image_that_cannot_be_read(inputs, tmp_path):
    """The image is named, and no work is lost.

    With --skip_bad_images true the run goes on, and the accuracy is that of the other images.
    """
    shutil.copytree(inputs / "images", tmp_path / "images")
    bad = tmp_path / "images/val/red/05.png"
    bad.write_bytes(bad.read_bytes()[:300])
    words = vit(tmp_path, "run", epochs=1, warmup_epochs=0)
    done = run(words, script="main_vit.py", check=False, environment={"WANDB_MODE": "disabled"})
    assert done.returncode != 0
    assert (
        f"error: {bad} cannot be read as an image" in done.stderr
        and "--skip_bad_images" in done.stderr
    )
    assert (tmp_path / "run/checkpoints/model_20/manifest.json").is_file()
    words = vit(tmp_path, "again", "--skip_bad_images", "true", epochs=1, warmup_epochs=0)
    done = run(words, script="main_vit.py", environment={"WANDB_MODE": "disabled"})
    assert "skipped:" in done.stderr and str(bad) in done.stderr
    assert read_lines(tmp_path / "again/metrics.jsonl")[-1]["eval_images"] == 43


@pytest.mark.slow
@pytest.mark.parametrize("choice, code", [("continue", 0), ("stop", 2)])
def test_a_best_model_that_cannot_be_exported(inputs, tmp_path, choice, code):
    """As on a full disk: a file is in the way. --on_save_error decides, as for checkpoints."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.tmp").write_text("in the way")
    words = vit(inputs, "unused", "--on_save_error", choice, "--output_dir", tmp_path / "run")
    done = run(words, "main_vit.py", 1, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    assert re.search("run/best could not be saved .*File exists.*: make room or make", done.stderr)
    assert (tmp_path / "run/checkpoints").is_dir() and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        "--model convnext_atto --optimizer adamw --use_modulewise_wd --use_amp true "
        "--clip_grad 1.0 --dist_eval false",
        "--model test_resnet --use_AWD_NeurIPS2023 --mixup 0 --cutmix 0 --model_ema true "
        "--model_ema_force_cpu true --save_ckpt false",
        "--model test_vit --aa none --reprob 0 --mixup_mode elem --use_modulewise_wd "
        "--esd_async --esd_lag 1 --disable_eval true",
    ],
)
def test_other_models_and_flags_run(inputs, tmp_path, flags):
    base = [
        "--data_path",
        inputs / "images",
        "--nb_classes",
        4,
        "--input_size",
        32,
        "--batch_size",
        80,
        "--epochs",
        2,
    ]
    base += [
        "--warmup_epochs",
        1,
        "--unbalancedWD_every",
        2,
        "--num_workers",
        0,
        "--enable_wandb",
        "false",
        "--output_dir",
        tmp_path / "run",
    ]
    run([*base, *flags.split()], script="main_vit.py", processes=1)
    records = read_lines(tmp_path / "run/metrics.jsonl")
    assert all(r["loss"] < 3 for r in records if "loss" in r)
    assert any("top1" in r for r in records) != ("disable_eval" in flags)
    assert (tmp_path / "run/checkpoints").exists() != ("save_ckpt" in flags)
