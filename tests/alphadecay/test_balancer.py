import argparse
import copy
import json
import logging
import math
import os
import sys

import pytest
import torch
import torch.nn as nn

import alphadecay
from alphadecay import AWD, AlphaDecay
from alphadecay.cli.flags import add_flags, decay_from_flags
from tests.support import fork_server


def small_model(seed=0, n=5):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(10, 64), *(nn.Linear(64, 64) for _ in range(n)), nn.LayerNorm(64)
    )


def train(model, decay, optimizer, steps, start=0):
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        loss = (
            model(torch.randint(10, (8,), generator=generator)).square().mean()
            + model[3].weight.pow(2).sum()
        )
        loss.backward()
        decay.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()


def test_three_lines():
    model = small_model()
    decay = AlphaDecay(model, weight_decay=0.1, min_ratio=0.6666, max_ratio=5, every=2)
    optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-2)
    before = dict(decay.weight_decays)
    train(model, decay, optimizer, 1)
    assert decay.weight_decays == before
    train(model, decay, optimizer, 1)
    assert decay.weight_decays != before
    assert {g["module"]: g["weight_decay"] for g in optimizer.param_groups} == {
        None: 0.1
    } | decay.weight_decays
    values = sorted(decay.weight_decays.values())
    assert values[0] == pytest.approx(0.06666) and values[-1] == pytest.approx(0.5)


def test_updates_fall_on_multiples():
    """Analyses run at every multiple of `every`: at updates 3 and 6 with every = 3."""
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=3)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-2)
    assert [decay.step(optimizer) for _ in range(7)] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert sorted({row["step"] for row in decay.history}) == [0, 3, 6]


@pytest.mark.parametrize("lag, expected", [(0, [3, 6, 9]), (1, [])])
def test_it_says_when_the_next_step_waits_for_an_analysis(lag, expected):
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=3, lag=lag)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=0.0)
    waits = []
    for update in range(1, 10):
        if decay.analyzes_next:
            waits.append(update)
        decay.step(optimizer)
    assert waits == expected and decay.analyzes and not AWD(model, 1.0).analyzes


def test_history_rows():
    decay = AlphaDecay(small_model(), 0.1)
    assert [row["module"] for row in decay.history] == ["2", "3", "4"]
    row = decay.history[0]
    assert {
        "step",
        "module",
        "type",
        "block",
        "alpha",
        "D",
        "stable_rank",
        "score",
        "weight_decay",
        "reason",
    } <= set(row)
    assert row["score"] == row["alpha"] and row["weight_decay"] == decay.weight_decays["2"]


def test_every_parameter_is_in_one_group():
    model = small_model()
    model[1].bias.requires_grad_(False)
    groups = AlphaDecay(model, 0.1).param_groups()
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) and set(held) == {
        p for p in model.parameters() if p.requires_grad
    }
    by_name = {g["module"]: g["params"] for g in groups}
    assert by_name["2"] == [model[2].weight, model[2].bias]


def test_batchnorm_follows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(3):
                setattr(self, f"conv{i}", nn.Conv2d(8, 8, 3))
                setattr(self, f"bn{i}", nn.BatchNorm2d(8))

    net = Net()
    groups = {g["module"]: g["params"] for g in AlphaDecay(net, 0.1).param_groups()}
    assert groups["conv1"] == [net.conv1.weight, net.conv1.bias, net.bn1.weight, net.bn1.bias]
    groups = {
        g["module"]: g["params"] for g in AlphaDecay(net, 0.1, batchnorm=False).param_groups()
    }
    assert groups["conv1"] == [net.conv1.weight, net.conv1.bias]


def test_attach_equals_param_groups():
    """The same run, from groups and from an optimizer that existed and had already made steps."""
    runs = []
    for attach in (False, True):
        model = small_model()
        decay = AlphaDecay(model, 0.1, every=2)
        optimizer = torch.optim.AdamW(
            model.parameters() if attach else decay.param_groups(), lr=1e-2, weight_decay=0.1
        )
        if attach:
            decay.attach(optimizer)
        train(model, decay, optimizer, 5)
        runs.append([*model.parameters()])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_attach_keeps_options_and_state():
    model = small_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.3, "lr": 1e-3},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    model(torch.arange(8)).sum().backward()
    optimizer.step()
    state = {p: optimizer.state[p]["exp_avg"] for p in model.parameters()}
    decay = AlphaDecay(model, 0.1)
    decay.attach(optimizer)
    for group in optimizer.param_groups:
        if group["module"] is not None:
            assert (
                group["weight_decay"] == decay.weight_decays[group["module"]]
                and group["lr"] == 1e-3
            )
            assert group["params"] == [
                model[int(group["module"])].weight
            ]  # its bias stays undecayed
    rest = [g for g in optimizer.param_groups if g["module"] is None]
    assert [(g["weight_decay"], g["lr"]) for g in rest] == [(0.3, 1e-3), (0.0, 1e-3)]
    assert rest[1]["params"] == vectors
    assert all(optimizer.state[p]["exp_avg"] is state[p] for p in model.parameters())


def test_attach_splits_param_names():
    model = small_model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    AlphaDecay(model, 0.1).attach(optimizer)
    names = {p: n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[p] for p in group["params"]]


def test_attach_refuses_what_it_cannot_place():
    model = small_model()
    decay = AlphaDecay(model, 0.1)
    stranger = nn.Parameter(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"group 0 .* shape \(3, 7\) that is not in the model"):
        decay.attach(torch.optim.SGD([*model.parameters(), stranger], lr=1))
    with pytest.raises(ValueError, match="does not hold the weight of 3"):
        decay.attach(
            torch.optim.SGD([p for p in model.parameters() if p is not model[3].weight], lr=1)
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    before = [dict(g) for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="attach first, then build the scheduler"):
        decay.attach(optimizer)
    assert len(optimizer.param_groups) == len(before) and scheduler is not None
    with pytest.raises(ValueError, match="attach once"):
        decay.attach(torch.optim.SGD(decay.param_groups(), lr=1))


def test_step_refuses_an_optimizer_without_its_groups():
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=1)
    with pytest.raises(ValueError, match="no group for 2: build it with decay.param_groups"):
        decay.step(torch.optim.SGD(model.parameters(), lr=1))


@pytest.mark.parametrize("load_optimizer", [True, False])
def test_resume_is_exact(load_optimizer):
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=2)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-2)
    train(model, decay, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), decay.state_dict(), optimizer.state_dict()))
    train(model, decay, optimizer, 3, start=3)

    other = small_model(seed=1)
    decay2 = AlphaDecay(other, 0.1, every=2)
    optimizer2 = torch.optim.SGD(decay2.param_groups(), lr=1e-2)
    other.load_state_dict(saved[0])
    decay2.load_state_dict(saved[1])
    if load_optimizer:
        optimizer2.load_state_dict(saved[2])
    train(other, decay2, optimizer2, 3, start=3)
    assert decay2.weight_decays == decay.weight_decays
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_state_of_another_model_is_refused():
    with pytest.raises(ValueError, match="3 differ, the first is 5"):
        AlphaDecay(small_model(n=8), 0.1).load_state_dict(
            AlphaDecay(small_model(n=5), 0.1).state_dict()
        )


def test_a_module_without_alpha_keeps_its_decay(caplog):
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=1)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-2)
    before = decay.weight_decays["3"]
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    with caplog.at_level(logging.WARNING):
        decay.step(optimizer)
    row = next(r for r in decay.history if r["step"] == 1 and r["module"] == "3")
    assert row["weight_decay"] == decay.weight_decays["3"] == before and row["alpha"] is None
    assert row["reason"] == "the weight holds NaN or Inf"
    assert "3 keeps its weight decay: the weight holds NaN or Inf" in caplog.text


def test_gradnorm_needs_no_eigenvalue(monkeypatch):
    def forbidden(*arguments):
        raise AssertionError("a spectrum was looked at")

    monkeypatch.setattr("alphadecay.spectral.engine.to_matrices", forbidden)
    monkeypatch.setattr("alphadecay.spectral.eigenvalues.to_matrices", forbidden)
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=1, metric="gradnorm")
    assert [r["gradnorm"] for r in decay.history] == [10.0] * 3
    for scale, module in enumerate((model[2], model[3], model[4]), start=1):
        module.weight.grad = torch.full_like(module.weight, scale / 64)
    decay.step(torch.optim.SGD(decay.param_groups(), lr=1))
    assert [r["gradnorm"] for r in decay.history[3:]] == pytest.approx([1, 2, 3])
    assert [r["alpha"] for r in decay.history] == [None] * 6


def test_a_map_that_fails_later_keeps_all_decays():
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=1, metric="gradnorm", mapping="tb_log2")
    for scale, module in zip((0.1, 1, 3), (model[2], model[3], model[4]), strict=True):
        module.weight.grad = torch.full_like(module.weight, scale / 64)
    decay.step(torch.optim.SGD(decay.param_groups(), lr=1))
    assert all(r["reason"].startswith("tb_log2 gives no decay") for r in decay.history[3:])
    assert set(decay.weight_decays.values()) == {0.1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"min_ratio": 3, "max_ratio": 1}, "out of order"),
        ({"every": 0}, "every is 0"),
        ({"metric": "beta"}, "unknown metric 'beta': choose one of alpha"),
        ({"mapping": "cubic"}, "unknown map"),
        ({"fit_method": "mean"}, "unknown fit"),
        ({"scope": "all"}, "unknown scope"),
        ({"xmin_pos": 1}, "xmin_pos is 1"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlphaDecay(small_model(), **{"weight_decay": 0.1, **arguments})


def test_nothing_to_balance():
    with pytest.raises(ValueError, match="no module to balance"):
        AlphaDecay(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.1)


def test_awd_follows_its_formula():
    model = small_model()
    awd = AWD(model, lambda_awd=0.5)
    optimizer = torch.optim.SGD(awd.param_groups(), lr=1e-2)
    average = 0.0
    for _ in range(3):
        model(torch.arange(8)).square().mean().backward()
        gradient = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        weight = math.sqrt(sum(float(p.detach().double().pow(2).sum()) for p in model.parameters()))
        average = 0.1 * average + 0.9 * 0.5 * gradient / weight
        awd.step(optimizer)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(average, rel=1e-6)
        optimizer.step()
    twin = AWD(model, 0.5)
    twin.load_state_dict(awd.state_dict())
    assert twin.average == awd.average


def test_awd_frozen_parameters_groups_and_infinite_gradients():
    model = small_model()
    model[5].requires_grad_(False)
    awd = AWD(model, 0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained[:2]}, {"params": trained[2:]}], lr=1)
    model(torch.arange(8)).square().mean().backward()
    gradient, weight = (
        math.sqrt(sum(float(t.detach().double().pow(2).sum()) for t in ts))
        for ts in ([p.grad for p in trained], trained)
    )
    awd.step(optimizer)
    expected = [pytest.approx(0.9 * 0.5 * gradient / weight, rel=1e-6)] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == expected
    trained[0].grad[0] = math.inf  # a step that a gradient scaler skips
    awd.step(optimizer)
    assert [g["weight_decay"] for g in optimizer.param_groups] == expected


@pytest.mark.parametrize("mapping", ["tb_linear_map", "layerwise_sigmoid"])
@pytest.mark.parametrize("positive", [True, False])
def test_settings_reach_the_map(mapping, positive):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(3)))
    decay = AlphaDecay(model, 0.1, mapping=mapping, positive=positive)
    scores = torch.tensor([r["score"] for r in decay.history], dtype=torch.float64)
    blocks = [m.block for m in decay.modules]
    assert blocks == ["0", "1", "1", "2"]
    expected = alphadecay.assign_decays(
        scores, 0.1, mapping, positive=positive, blocks=blocks
    ).tolist()
    assert list(decay.weight_decays.values()) == pytest.approx(expected)


def test_filter_zeros_reaches_the_fit():
    model = small_model()
    with torch.no_grad():
        model[3].weight[20:] = 0  # 44 of 64 eigenvalues are zero
    alphas = [
        {r["module"]: r["alpha"] for r in AlphaDecay(model, 0.1, filter_zeros=on).history}["3"]
        for on in (False, True)
    ]
    assert alphas[0] is None and alphas[1] > 1


def test_gradnorm_balances_small_modules():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    assert len(AlphaDecay(model, 0.1, metric="gradnorm").modules) == 2


def test_optimizers_without_decay_are_refused():
    model = small_model()
    decay = AlphaDecay(model, 0.1, every=1)
    with pytest.raises(ValueError, match="Rprop has no weight decay"):
        decay.attach(torch.optim.Rprop(model.parameters()))


def test_flags_reach_the_balancer():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    words = (
        "--use_modulewise_wd --xmin_pos 4 --filter_zeros true --remove_first_layer false "
        "--wd_min_ratio 0.5 --wd_max_ratio 2"
    )
    args = parser.parse_args(
        [*words.split(), "--unbalancedWD_every", "20", "--esd_async", "--esd_lag", "5"]
    )
    args.weight_decay = 0.1
    decay = decay_from_flags(args, small_model(), 100)
    assert [m.name for m in decay.modules] == ["1", "2", "3", "4"]
    twin = AlphaDecay(
        small_model(),
        0.1,
        0.5,
        2,
        20,
        positive=False,
        xmin_pos=4,
        filter_zeros=True,
        remove_first=False,
        lag=5,
    )
    assert decay.history == twin.history
    for name in ("every", "_fit", "_map", "_lag"):
        assert getattr(decay, name) == getattr(twin, name)
    args = parser.parse_args(["--use_AWD_NeurIPS2023"])
    args.weight_decay = 0.1
    assert decay_from_flags(args, small_model(), 100).lambda_awd == pytest.approx(10)


def test_analyze_reads_every_module():
    rows = alphadecay.analyze(small_model())
    assert [row["module"] for row in rows] == ["1", "2", "3", "4", "5"] and rows[0]["shape"] == (
        64,
        64,
    )
    assert rows[0]["gradnorm"] is None and rows[0]["entropy"] > 0


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_agree_with_one_process(tmp_path, processes):
    """Ranks that share the analysis end with the decays and weights of a single process."""
    script = "tests/support/ranks/balancer.py"
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun gives each of its processes
    fork_server.run([sys.executable, script, tmp_path / "alone"], check=True, env=one_thread)
    fork_server.on_ranks(script, tmp_path / "together", processes=processes)
    expected = json.loads((tmp_path / "alone/rank0.json").read_text())
    results = [
        json.loads((tmp_path / f"together/rank{rank}.json").read_text())
        for rank in range(processes)
    ]
    assert all(result == results[0] for result in results)
    assert (
        results[0]["decays"] == expected["decays"] and results[0]["weights"] == expected["weights"]
    )
    assert results[0]["history"] == expected["history"]
    flagged = next(r for r in expected["history"] if r["module"] == "2")
    assert flagged["weight_decay"] == 0.1 and "median eigenvalue is zero" in flagged["reason"]


def test_loaded_decays_are_written_in_the_next_step():
    """Also if that step has no analysis, and the optimizer was built with other decays."""
    trained = AlphaDecay(small_model(), 0.1, every=2)
    train(trained.model, trained, torch.optim.SGD(trained.param_groups(), lr=1e-2), 2)
    decay = AlphaDecay(small_model(seed=1), 0.1, every=2)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-2)
    decay.step(optimizer)  # update 1: the groups are up to date
    state = trained.state_dict() | {"updates": 2}
    decay.load_state_dict(state)
    assert not decay.step(optimizer)  # update 3
    written = {g["weight_decay"] for g in optimizer.param_groups}
    assert written >= set(state["weight_decays"].values())


def test_messages_say_what_to_use_instead():
    model = small_model()
    with pytest.raises(TypeError, match="argument 'colour': use xmin_pos, filter_zeros, remove"):
        AlphaDecay(model, 0.1, colour="red")
    decay = AlphaDecay(model, 0.1)
    state = decay.state_dict()
    state["weight_decays"] = {"other": 0.1, **state["weight_decays"]}
    message = (
        "the saved decays belong to other modules than this model's: 1 differ, the first is other; "
        "use the model and the module flags that they were saved with"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        decay.load_state_dict(state)
    with pytest.raises(ValueError, match=r"attach once, and not after param_groups\(\)$"):
        decay.attach(torch.optim.SGD(decay.param_groups(), lr=1, weight_decay=0.1))


def test_adadecay_without_a_decay():
    """No decay is a control, as it is for the other methods."""
    assert alphadecay.AdaDecay(small_model(), 0.0).weight_decay == 0


def test_remove_last():
    model = small_model()
    names = [m.name for m in AlphaDecay(model, 0.1).modules]
    assert [m.name for m in AlphaDecay(model, 0.1, remove_last=False).modules] == [*names, "5"]


def test_a_small_weight_is_balanced_by_its_gradient_alone():
    """A norm needs no spectrum. A power law needs more than two eigenvalues."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    assert len(AlphaDecay(model, 0.1, metric="gradnorm").modules) == 3
    with pytest.raises(ValueError):
        AlphaDecay(model, 0.1)


def test_adamc_needs_to_know_the_hidden_weights():
    optimizer = torch.optim.AdamW(small_model().parameters())
    with pytest.raises(ValueError, match="AdamC needs to know which weights are followed by"):
        alphadecay.install_decay_hooks(optimizer, peak_lr=1.0)
