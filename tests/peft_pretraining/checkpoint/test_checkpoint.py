"""Checkpoints: saved in the background, found, verified, loaded, deleted; torn files, full disks and kills at every step."""

import copy
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import transformers
from loguru import logger
from safetensors.torch import load_file

from peft_pretraining import checkpoint, saving
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
FILES = [*checkpoint.REQUIRED, "manifest.json"]


def small_model(**changes):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return build_model(transformers.LlamaConfig(**sizes | changes, pad_token_id=None))


def adam(model):
    return build_optimizer(
        "adam", [{"params": list(model.parameters()), "weight_decay": 0.1}], 1e-2
    )


def update(model, optimizer):
    model(torch.arange(20)[None], torch.arange(20)[None]).backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model, optimizer):
    """All tensors that a checkpoint is about, copied."""
    states = checkpoint.optimizer_state_by_name(model, optimizer)
    return copy.deepcopy(
        {
            **model.state_dict(),
            **{f"{n}.{k}": v for n, state in states.items() for k, v in state.items()},
        }
    )


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(run, step, model, optimizer, **options):
    checkpoints = Checkpoints(run, ALONE, **options)
    checkpoints.save(step, model, optimizer, {"progress": {"update_step": step}}, None)
    checkpoints.finish()
    return run / f"checkpoints/model_{step}"


def load(folder):
    """The state that a checkpoint gives, and the step that it says."""
    model = small_model()
    optimizer = adam(model)
    trainer = checkpoint.load_checkpoint(folder, model, optimizer, ALONE)
    return state_of(model, optimizer), trainer["progress"]["update_step"]


def names(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.fixture
def warnings():
    messages = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


@pytest.fixture
def trained():
    model = small_model()
    optimizer = adam(model)
    update(model, optimizer)
    return model, optimizer


@pytest.fixture
def run(tmp_path, trained):
    """A run with checkpoints of updates 10 and 20, and the state of each."""
    folder, states = tmp_path / "run", {}
    for step in (10, 20):
        update(*trained)
        save(folder, step, *trained)
        states[step] = state_of(*trained)
    return folder, states


# ------------------------------------------------------------------------------------------------------- saving and loading


def test_round_trip(tmp_path, trained):
    model, optimizer = trained
    folder = save(tmp_path, 10, model, optimizer)
    expected = torch.rand(3), random.random(), float(np.random.rand())
    other = small_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    # Cut into other groups: state goes by the parameter's name.
    other_optimizer = build_optimizer(
        "adam", [{"params": [p], "weight_decay": 0.1} for p in other.parameters()], 1e-3
    )
    assert checkpoint.load_checkpoint(folder, other, other_optimizer, ALONE) == {
        "progress": {"update_step": 10}
    }
    assert torch.equal(torch.rand(3), expected[0])  # the random states of the moment of saving
    assert (random.random(), float(np.random.rand())) == expected[1:]
    assert same(state_of(model, optimizer), state_of(other, other_optimizer))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, trained):
    folder = save(tmp_path, 10, *trained)
    model = small_model(hidden_size=32)
    with pytest.raises(
        UserError, match="trained with hidden_size 16, but the model config says 32"
    ):
        checkpoint.load_checkpoint(folder, model, adam(model), ALONE)
    model = small_model(rope_theta=500.0)
    with pytest.raises(UserError, match="trained with rope_"):
        checkpoint.load_checkpoint(folder, model, adam(model), ALONE)


def test_another_dtype_takes_the_moments_along(tmp_path, trained):
    folder = save(tmp_path, 10, *trained)
    model = small_model().bfloat16()
    optimizer = adam(model)
    checkpoint.load_checkpoint(folder, model, optimizer, ALONE)
    update(model, optimizer)
    state = optimizer.state[model.lm_head.weight]
    assert (
        state["exp_avg"].dtype == torch.bfloat16
        and state["step"].dtype == torch.float32
        and float(state["step"]) == 2
    )


def test_tied_head_is_saved_once(tmp_path):
    model = small_model(tie_word_embeddings=True)
    optimizer = adam(model)
    update(model, optimizer)
    folder = save(tmp_path, 1, model, optimizer)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    checkpoint.load_checkpoint(folder, model, optimizer, ALONE)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


def test_what_does_not_lie_in_a_row_is_saved_as_it_reads(tmp_path, trained):
    """Weights and moments of a transposed layout."""
    model, optimizer = trained
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.t().contiguous().t()
        state = optimizer.state[model.lm_head.weight]
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    assert same(load(save(tmp_path, 10, model, optimizer))[0], state_of(model, optimizer))


def test_other_numbers_of_ranks(tmp_path, trained):
    """A rank that was not among those that saved gets random states of its own, the same each time."""
    folder = save(tmp_path, 10, *trained)
    draws = []
    for rank in (0, 1, 3, 1):
        checkpoint.seed_random_generators(99 + len(draws))
        checkpoint.load_checkpoint(
            folder, *trained, DistributedContext(rank, rank, 4, ALONE.device)
        )
        draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert draws[1] == draws[3] and len(set(draws)) == 3


def test_a_file_that_is_lost_after_it_was_verified(run):
    folder = run[0] / "checkpoints/model_20"
    for name in FILES:
        content = (folder / name).read_bytes()
        for harmed in (None, b"", b"garbled", content[: len(content) // 2]):
            (folder / name).unlink() if harmed is None else (folder / name).write_bytes(harmed)
            with pytest.raises(
                UserError,
                match="model_20 cannot be read any more .*continue from another checkpoint",
            ):
                load(folder)
            (folder / name).write_bytes(content)


# --------------------------------------------------------------------------------------------------------- in the background


def test_training_goes_on_and_the_state_is_that_of_the_call(tmp_path, trained, monkeypatch):
    """The copy is slow and the writing begins only after a later update: byte for byte as a deep copy saved with nothing else going on."""
    model, optimizer = trained
    twin = copy.deepcopy(model)
    twin_optimizer = adam(twin)
    checkpoint.load_optimizer_state_by_name(
        twin, twin_optimizer, copy.deepcopy(checkpoint.optimizer_state_by_name(model, optimizer))
    )
    trainer = {"decays": {"a": 0.1}}
    alone = Checkpoints(tmp_path / "alone", ALONE)
    alone.save(20, twin, twin_optimizer, trainer, None)
    alone.finish()

    foreach_copy, write_checkpoint, updated = (
        torch._foreach_copy_,
        saving.write_checkpoint,
        threading.Event(),
    )
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda *a, **k: time.sleep(0.2) or foreach_copy(*a, **k)
    )
    monkeypatch.setattr(
        saving, "write_checkpoint", lambda *a: updated.wait() and write_checkpoint(*a)
    )
    checkpoints = Checkpoints(tmp_path / "run", ALONE)
    for step in (10, 20):  # the second into the buffers of the first
        updated.clear()
        checkpoints.save(step, model, optimizer, trainer, None)
        trainer["decays"]["a"] += 1 if step == 20 else 0
        checkpoints.before_update()
        if step == 20:
            for _ in range(2):
                update(model, optimizer)
        updated.set()
        checkpoints.finish()
    saved = [tmp_path / where / "checkpoints/model_20" for where in ("alone", "run")]
    for name in FILES:
        assert (saved[0] / name).read_bytes() == (saved[1] / name).read_bytes(), name
    assert names(tmp_path / "run") == ["model_10", "model_20"]


def test_buffers_follow_the_state(tmp_path, trained):
    """The first save of a run has no optimizer state yet, the next has."""
    model = small_model()
    optimizer = adam(model)
    checkpoints = Checkpoints(tmp_path, ALONE)
    for step in (1, 2, 3):
        checkpoints.save(step, model, optimizer, {"progress": {"update_step": step}}, None)
        expected = state_of(model, optimizer)
        checkpoints.before_update()
        update(model, optimizer)
        checkpoints.finish()
        assert same(load(tmp_path / f"checkpoints/model_{step}")[0], expected)


def test_ranks_agree_and_an_exit_waits_for_the_save(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*start, "tests/support/ranks/checkpoint.py", str(tmp_path)],
        env=environment,
        check=True,
        capture_output=True,
    )
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    for rank in ranks:
        assert rank["newest"] == str(tmp_path / "checkpoints/model_10")
        assert "random_1.pt is damaged" in rank["named"] and "no checkpoint in" in rank["none"]
        assert rank["restored"] == rank["random"][0]
    assert ranks[0]["none"] == ranks[1]["none"] and ranks[0]["named"] == ranks[1]["named"]
    assert ranks[0]["random"] != ranks[1]["random"]
    assert ranks[0]["hashed"] > 0 and ranks[1]["hashed"] == 0
    assert checkpoint.find_corruption(tmp_path / "checkpoints/model_30") is None


# ------------------------------------------------------------------------------------------------------------------ finding


def test_finding(run, trained):
    folder, _ = run
    checkpoints = folder / "checkpoints"
    (checkpoints / "model_30.tmp").mkdir()
    (checkpoints / "model_²").mkdir()
    shutil.copytree(
        checkpoints / "model_20", checkpoints / "model_40.tmp"
    )  # killed just before it got its name
    shutil.copytree(checkpoints / "model_20", checkpoints / "model_50.abandoned")
    (checkpoints / "model_60").write_text("no folder")
    assert checkpoint.find_checkpoint("auto", folder, ALONE) == checkpoints / "model_20"
    assert checkpoint.find_checkpoint(str(folder), folder, ALONE) == checkpoints / "model_20"
    assert (
        checkpoint.find_checkpoint(str(checkpoints / "model_10"), folder, ALONE)
        == checkpoints / "model_10"
    )
    assert checkpoint.find_checkpoint("auto", folder / "nothing", ALONE) is None
    for nothing in (folder / "nothing", checkpoints / "model_70"):
        with pytest.raises(UserError, match="no checkpoint there"):
            checkpoint.find_checkpoint(str(nothing), folder, ALONE)


def test_later_checkpoints_of_another_history_are_set_aside(run, trained):
    """The damaged too."""
    folder, _ = run
    (save(folder, 30, *trained) / "manifest.json").unlink()
    newer = [folder / "checkpoints" / name for name in ("model_20", "model_30")]
    assert sorted(checkpoint.archive_newer_checkpoints(folder, 10)) == newer
    assert names(folder) == ["model_10", "model_20.abandoned", "model_30.abandoned"]


@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "flipped"])
def test_a_torn_checkpoint_is_passed_over(run, warnings, harm):
    """Each file of the newest in turn: one warning that names it, and exactly the state of the one before."""
    folder, states = run
    newest = folder / "checkpoints/model_20"
    for name in FILES:
        path = newest / name
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.unlink() if harm == "missing" else path.write_bytes(
            {"empty": b"", "cut": content[:middle], "flipped": flipped}[harm]
        )
        warnings.clear()
        found = checkpoint.find_checkpoint("auto", folder, ALONE)
        state, step = load(found)
        assert found.name == "model_10" and step == 10 and same(state, states[10])
        if not (name == "manifest.json" and harm == "flipped"):  # which may accuse another file
            assert len(warnings) == 1 and str(path) in warnings[0]
        with pytest.raises(UserError, match="continue from an older checkpoint"):
            checkpoint.find_checkpoint(str(newest), folder, ALONE)
        path.write_bytes(content)
    assert checkpoint.find_checkpoint("auto", folder, ALONE) == newest


def test_a_manifest_that_lists_too_little_is_damage(run):
    folder = run[0] / "checkpoints/model_20"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in checkpoint.REQUIRED:
        (folder / "manifest.json").write_text(
            json.dumps({k: v for k, v in manifest.items() if k != name})
        )
        assert f"it does not list {name}" in checkpoint.find_corruption(folder)
    for text in ("[]", "{}", "null", '{"a": 1}', '{"a": {}}', "[" * 100_000):
        (folder / "manifest.json").write_text(text)
        assert str(folder / "manifest.json") in checkpoint.find_corruption(folder)
    for name in ("\0", "a" * 5000, "config.json/x", "\ud800", "."):
        (folder / "manifest.json").write_text(
            json.dumps({**manifest, name: {"size": 1, "sha256": ""}})
        )
        assert str(folder) in checkpoint.find_corruption(folder)


def test_no_silent_start_from_scratch(run, warnings):
    folder, _ = run
    for step in (10, 20):
        (folder / f"checkpoints/model_{step}/config.json").write_text("{}")
    for place in ("auto", str(folder)):
        with pytest.raises(
            UserError, match=r"no checkpoint in .* is whole \(.*model_20/config.json is damaged"
        ):
            checkpoint.find_checkpoint(place, folder, ALONE)
    assert len(warnings) == 4


def test_random_damage(run):
    """Random bytes at random places of a random file: found and loaded is exactly one of the two states."""
    folder, states = run
    newest = folder / "checkpoints/model_20"
    generator = random.Random(0)
    fell_back = 0
    for _ in range(400):
        path = newest / generator.choice(FILES)
        content = path.read_bytes()
        harmed = bytearray(content)
        for _ in range(generator.choice([1, 1, 2, 30])):
            harmed[generator.randrange(len(harmed))] = generator.choice(
                [generator.randrange(256), *b'"{}[],:0 e']
            )
        cut = generator.random() < 0.2
        path.write_bytes(harmed[: generator.randrange(len(harmed))] if cut else harmed)
        found = checkpoint.find_checkpoint("auto", folder, ALONE)
        state, step = load(found)
        assert same(state, states[step])
        fell_back += step == 10
        path.write_bytes(content)
    assert fell_back > 350


# ---------------------------------------------------------------------------------------------------------------- full disks


def full_disk(monkeypatch, limit):
    """Files of at most `limit` bytes; 0: the disk itself refuses."""
    if limit:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    else:

        def fsync(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture(params=[0, 300, 12_000, 20_000], ids=["sync", "config", "weights", "optimizer"])
def room_for(request, monkeypatch):
    """How much of a checkpoint the disk takes; the function that it returns makes room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fsync = os.fsync

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.fsync = fsync

    yield request.param, make_room
    make_room()


def test_a_full_disk(run, trained, warnings, monkeypatch, room_for):
    """The checkpoints before it stay, nothing of the new one does, one line tells why, and the next save tries again."""
    limit, make_room = room_for
    folder, _ = run
    checkpoints = Checkpoints(folder, ALONE, keep=1)
    full_disk(monkeypatch, limit)
    checkpoints.save(30, *trained, {}, None)
    with pytest.raises(
        UserError,
        match=r"model_30 could not be saved .*(No space left on device|File too large).*: make room",
    ):
        checkpoints.finish()
    make_room()
    assert (
        names(folder) == ["model_10", "model_20"]
        and checkpoint.newest_checkpoint(folder).name == "model_20"
    )
    assert checkpoints.failure() is None
    assert len(warnings) == 1 and "training goes on and the next save tries again" in warnings[0]
    checkpoints.save(40, *trained, {}, None)
    checkpoints.finish()
    assert names(folder) == ["model_40"]


def test_stop_on_a_full_disk(run, trained, warnings, monkeypatch):
    folder, _ = run
    checkpoints = Checkpoints(folder, ALONE, on_error="stop")
    assert checkpoints.failure() is None
    with monkeypatch.context() as patch:
        full_disk(patch, 0)
        checkpoints.save(30, *trained, {}, None)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.finish()
    assert "model_30 could not be saved (No space left on device)" in checkpoints.failure()
    assert checkpoints.failure() is None and not warnings


def test_a_copy_that_fails_lets_the_training_go_on(tmp_path, trained, monkeypatch):
    def no_memory(*arguments, **options):
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(10, *trained, {}, None)
    checkpoints.before_update()
    with pytest.raises(UserError, match="could not be saved .no memory"):
        checkpoints.finish()


def test_what_a_library_says_of_a_full_disk(tmp_path, trained):
    """The operating system's words, not those that the library wraps them in."""

    class Tokenizer:
        def save_pretrained(self, folder):
            raise RuntimeError("unexpected pos 704 vs 662") from OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC)
            )

    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(10, *trained, {}, Tokenizer())
    with pytest.raises(UserError, match="could not be saved .No space left on device"):
        checkpoints.finish()


def test_a_run_folder_that_is_no_folder(tmp_path, trained):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="Not a directory|File exists"):
        save(tmp_path, 10, *trained)


# ------------------------------------------------------------------------------------------------------- deleting and kills


def test_keep_and_milestones(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path, ALONE, keep=2, milestone_every=3)
    for step in range(1, 9):
        checkpoints.save(step, *trained, {}, None)
    checkpoints.finish()
    assert names(tmp_path) == ["model_3", "model_6", "model_7", "model_8"]


def test_a_damaged_checkpoint_is_none_of_those_that_remain(run, trained):
    folder, _ = run
    (folder / "checkpoints/model_20/config.json").write_text("")
    save(folder, 30, *trained, keep=2)
    assert names(folder) == ["model_10", "model_20", "model_30"]


@pytest.mark.parametrize("what", ["rename", "rmtree"])
def test_a_deletion_that_fails_is_a_warning(run, trained, warnings, monkeypatch, what):
    folder, _ = run
    checkpoints = Checkpoints(folder, ALONE, keep=1)
    rename = saving.Path.rename

    def refuse(path, *arguments):
        if what == "rename" and not str(*arguments).endswith("deleted"):
            return rename(path, *arguments)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(*(saving.Path, "rename") if what == "rename" else (shutil, "rmtree"), refuse)
        checkpoints.save(30, *trained, {}, None)
        checkpoints.finish()
    assert warnings and all(
        "could not be deleted (Permission denied" in warning for warning in warnings
    )
    assert checkpoint.newest_checkpoint(folder).name == "model_30"
    checkpoints.save(40, *trained, {}, None)
    checkpoints.finish()
    assert names(folder) == ["model_40"]


def test_a_checkpoint_that_could_not_be_replaced_comes_back(run, trained, monkeypatch):
    folder, _ = run
    rename = saving.Path.rename

    def refuse(path, target):
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(saving.Path, "rename", refuse)
        with pytest.raises(UserError, match="Input/output error"):
            save(folder, 20, *trained)
    Checkpoints(folder, ALONE)
    assert names(folder) == ["model_10", "model_20"]


class Killed(BaseException):
    """No handler of `Exception` sees it."""


class Killer:
    """An audit hook under which the process is as good as dead from its n-th call that changes the file system on."""

    def __init__(self):
        self.left, self.folder = None, None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.left is None or event not in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
        ):
            return
        if self.folder in str(arguments[0]) or event in ("os.remove", "os.rmdir"):
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.fixture(scope="module")
def killer():
    return Killer()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step", [20, 30], ids=["again", "new"])
def test_killed_at_every_step(tmp_path, trained, killer, warnings, step):
    """While it saves a checkpoint (or the same step again) and deletes the old: there is always a whole one, the newest that is whole
    is one of the two states, nothing is taken for damage, and the next start clears up."""
    base = tmp_path / "base"
    save(base, 10, *trained)
    save(base, 20, *trained)
    states = {20: [state_of(*trained)]}
    update(*trained)
    states.setdefault(step, []).append(state_of(*trained))
    kills = 0
    while True:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        checkpoints = Checkpoints(run, ALONE, keep=1)
        killer.folder, killer.left = str(run), kills
        checkpoints.save(step, *trained, {"progress": {"update_step": step}}, None)
        checkpoints.before_update()
        checkpoints._wait()
        completed, killer.left = killer.left >= 0, None
        found = checkpoint.find_checkpoint("auto", run, ALONE)
        state, found_step = load(found)
        assert any(
            same(state, expected) for expected in states[found_step]
        ) and found_step == checkpoint.step_of(found)
        assert all(
            checkpoint.find_corruption(folder) is None for folder in checkpoint.checkpoints_of(run)
        )
        Checkpoints(run, ALONE)
        assert set(names(run)) <= {"model_10", "model_20", "model_30"}
        if completed:
            break
        kills += 1
    assert names(run) == [f"model_{step}"] and same(load(found)[0], states[step][-1])
    assert kills > 40 and not warnings
