"""Every method, control and decay hook equals a plain twin (tests/support/method_twins.py)."""

import argparse
import json
import shlex

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import alphadecay
from alphadecay.cli.flags import add_flags, check_flags, decay_from_flags
from alphadecay.cli.presets import METHOD_PRESETS, parse_arguments
from alphadecay.controls import Controls, gaussian_alpha, permutation
from alphadecay.decay_hooks import install_decay_hooks
from alphadecay.modules import hidden_weights
from alphadecay.param_groups import split_hidden
from peft_pretraining.errors import UserError
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext
from tests.support import fork_server
from tests.support.method_twins import CASES, PEAK, greatest_deviation, parsed, small_llama

ETA = 0.1


@pytest.mark.parametrize("method, optimizer", CASES, ids=map(" ".join, CASES))
def test_each_method_is_its_twin(method, optimizer):
    """Weights within 1e-6 after each of 20 updates (in float64, where they are within 1e-10)."""
    assert greatest_deviation(method, optimizer) < 1e-9


@pytest.mark.slow
def test_each_method_is_its_twin_on_two_ranks(tmp_path):
    fork_server.on_ranks("tests/support/ranks/methods.py", tmp_path)
    for rank in (0, 1):
        deviations = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert set(deviations) == {" ".join(case) for case in CASES}
        assert {case: d for case, d in deviations.items() if d >= 1e-6} == {}


def test_every_method_has_a_twin():
    assert {method.split()[0] for method, _ in CASES} == set(METHOD_PRESETS)


# ------------------------------------------------------------------------------------- the controls


def small_model(n=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 64), *(nn.Linear(64, 64) for _ in range(n)))


def weighted_mean(groups, balanced):
    chosen = [g for g in groups if (g["module"] is not None) == balanced]
    sizes = [sum(p.numel() for p in g["params"]) for g in chosen]
    return sum(n * g["weight_decay"] for n, g in zip(sizes, chosen, strict=True)) / sum(sizes)


@pytest.mark.parametrize(
    "method", ["alphadecay", "inverted", "shuffled", "type_constant", "quantile", "adadecay-module"]
)
def test_iso_budget_keeps_the_mean(method):
    free, kept = (
        decay_from_flags(parsed(method + more, "adamw"), small_llama(), 100)
        for more in ("", " --iso_budget")
    )
    assert weighted_mean(kept.param_groups(), balanced=True) == pytest.approx(ETA, rel=1e-12)
    ratios = {name: decay / free.weight_decays[name] for name, decay in kept.weight_decays.items()}
    assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-12)
    assert kept.history[0]["weight_decay"] == kept.weight_decays[kept.history[0]["module"]]


def test_shuffled_moves_the_same_decays():
    straight, shuffled = (
        decay_from_flags(parsed(m, "adamw"), small_llama(), 100) for m in ("alphadecay", "shuffled")
    )
    assert sorted(shuffled.weight_decays.values()) == sorted(straight.weight_decays.values())
    assert shuffled.weight_decays != straight.weight_decays
    other = decay_from_flags(parsed("shuffled --shuffle_seed 1", "adamw"), small_llama(), 100)
    assert other.weight_decays != shuffled.weight_decays


def test_a_failed_module_fails_where_its_decay_would_go():
    model = small_model()
    decay = alphadecay.AlphaDecay(
        model, ETA, every=1, controls=Controls(shuffle_seed=3), remove_first=False
    )
    before, names = dict(decay.weight_decays), [m.name for m in decay.modules]
    with torch.no_grad():
        for layer in model[1:]:
            layer.weight.add_(0.01 * torch.randn(64, 64).cumsum(0))
        model[2].weight[0, 0] = torch.nan
    decay.step(torch.optim.SGD(decay.param_groups(), lr=1))
    taker = names[permutation(len(names), 3).index(names.index("2"))]
    assert taker != "2"
    assert [row["module"] for row in decay.history[len(names) :] if row["reason"]] == [taker]
    assert decay.weight_decays[taker] == before[taker] and decay.weight_decays != before


@pytest.mark.parametrize("shape", [(1024, 1024), (512, 1376), (2048, 512), (192, 576)])
def test_gaussian_alpha_is_that_of_gaussian_matrices(shape):
    torch.manual_seed(0)
    measured = alphadecay.fit_power_law(alphadecay.eigenvalues(torch.randn(shape))).alpha
    assert gaussian_alpha(*shape) == pytest.approx(measured, rel=0.02)


def test_type_constant_is_where_alphadecay_begins():
    torch.manual_seed(0)
    blocks = [
        nn.ModuleDict(
            {"proj": nn.Linear(512, 512, bias=False), "up": nn.Linear(512, 1376, bias=False)}
        )
        for _ in range(3)
    ]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
    for block in blocks:
        nn.init.normal_(block["proj"].weight), nn.init.normal_(block["up"].weight)
    constant, spectral = (
        alphadecay.AlphaDecay(model, ETA, controls=Controls(type_constant=on), scope="all_blocks")
        for on in (True, False)
    )
    expected = {
        name: ETA * (0.6666 if name.endswith("proj") else 3.0) for name in constant.weight_decays
    }
    assert constant.weight_decays == pytest.approx(expected)
    assert spectral.weight_decays == pytest.approx(expected, rel=0.15)
    assert all(row["score"] is None for row in constant.history)


def test_type_constant_reads_no_weight():
    model = small_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    decay = decay_from_flags(
        parsed("type_constant --type_multipliers up_proj=2", "adamw"), model, 100
    )
    before = dict(decay.weight_decays)
    optimizer = torch.optim.AdamW(decay.param_groups())
    assert not any(decay.step(optimizer) for _ in range(10)) and decay.weight_decays == before
    assert {name.split(".")[-1]: d for name, d in before.items()}["up_proj"] == pytest.approx(
        2 * ETA
    )


def test_one_shot_is_frozen_after_its_first_analysis():
    decay = alphadecay.AlphaDecay(small_model(), ETA, every=3, controls=Controls(one_shot=True))
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1)
    assert [decay.step(optimizer) for _ in range(9)] == [False, False, True] + [False] * 6
    assert {row["step"] for row in decay.history} == {0, 3}


# -------------------------------------------------------------------------------------------- flags


def parse(words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--weight_decay", type=float, default=1e-5)
    parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))
    add_flags(parser)
    args = parse_arguments(parser, shlex.split(words))
    check_flags(args)
    return args


def test_a_method_is_its_published_flags():
    named = parse("--method adadecay-module --weight_decay 1e-6")
    spelt = parse(
        "--use_modulewise_wd --alpha_positively_with_WD --esd_metric_for_tb gradnorm "
        "--assign_func layerwise_sigmoid --weight_decay 1e-6"
    )
    assert vars(named) | {"method": None} == vars(spelt)
    assert parse("--method wd0").weight_decay == 0 and parse("").weight_decay == 1e-5
    assert (
        parse("--method gradnorm --esd_metric_for_tb gradnorm --wd_max_ratio 5").wd_max_ratio == 5
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--method wd0 --weight_decay 1e-5",
            "--method wd0 means weight_decay 0.0, but --weight_decay says 1e-05: leave one",
        ),
        ("--method inverted --alpha_positively_with_WD", "means alpha_positively_with_WD False"),
        ("--method uniform --use_modulewise_wd", "means use_modulewise_wd False"),
        (
            "--method gradnorm --esd_metric_for_tb alpha",
            "means esd_metric_for_tb gradnorm, but --esd_metric_for_tb says alpha",
        ),
        (
            "--use_modulewise_wd --use_AdaDecay",
            "--use_modulewise_wd and --use_AdaDecay exclude each other",
        ),
        ("--use_AWD_NeurIPS2023 --use_AdaDecay", "exclude each other"),
        (
            "--method uniform --iso_budget",
            "--iso_budget concerns module-wise decays: give --use_modulewise_wd too",
        ),
        ("--one_shot", "--one_shot concerns module-wise decays"),
        (
            "--method alphadecay --type_multipliers q_proj=1",
            "--type_multipliers has no effect without --type_constant",
        ),
        (
            "--method type_constant --esd_async",
            "--type_constant analyses no weights: leave --esd_async out",
        ),
        (
            "--method adadecay --adamc",
            "--use_AdaDecay applies its decays itself, element by element: leave --adamc out",
        ),
        (
            "--method type_constant --type_multipliers q_proj",
            "'q_proj' is not a list of multipliers: give for instance q_proj=0.8",
        ),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises((ValueError, argparse.ArgumentError), match=message):
        parse(words)


@pytest.mark.parametrize(
    "multipliers, message",
    [
        ({"k": 1.0}, "no balanced module is of type 'k': the types are k_proj, v_proj"),
        ({"k_proj": -1.0}, "multiplier of k_proj is -1.0"),
    ],
)
def test_multipliers_that_fit_no_module_are_refused(multipliers, message):
    with pytest.raises(ValueError, match=message):
        controls = Controls(type_constant=True, type_multipliers=multipliers)
        alphadecay.AlphaDecay(small_llama(), ETA, controls=controls)


# ------------------------------------------------------------------ how a decay reaches the weights


def groups_of(model, decay=ETA):
    return split_hidden([{"params": list(model.parameters()), "weight_decay": decay}], model)


def test_hidden_weights_are_all_but_the_output_layer():
    model = small_llama()
    hidden = {id(w) for w in hidden_weights(model)}
    assert {n for n, p in model.named_parameters() if id(p) in hidden} == {
        n for n, _ in model.named_parameters() if "layers." in n and "norm" not in n
    }
    assert [g["hidden"] for g in groups_of(model)] == [True, False]
    model.lm_head.weight = model.model.embed_tokens.weight
    assert {id(w) for w in hidden_weights(model)} == hidden
    tied_first = nn.ModuleDict(
        {
            "head": nn.Linear(8, 8),
            "embed": nn.Embedding(8, 8),
            "inner": nn.Linear(8, 8),
            "last": nn.Linear(8, 8),
        }
    )
    tied_first.head.weight = tied_first.embed.weight
    assert [id(w) for w in hidden_weights(tied_first)] == [id(tied_first.inner.weight)]


def test_what_a_decay_cannot_reach_is_refused():
    model = small_llama()
    with pytest.raises(
        ValueError,
        match="AdamC and cautious decay need a decoupled weight decay, which Adam does not have",
    ):
        install_decay_hooks(build_optimizer("adam", groups_of(model), 1e-2), PEAK)
    with pytest.raises(ValueError, match="split_hidden"):
        install_decay_hooks(torch.optim.AdamW(model.parameters()), PEAK)
    with pytest.raises(ValueError, match="does not provide: use AdamW"):
        install_decay_hooks(build_optimizer("muon", groups_of(model), 1e-2), cautious=True)
    narrow = small_llama().bfloat16()
    with pytest.raises(ValueError, match="cautious decay changes .* bfloat16 rounds .* bf16_mixed"):
        install_decay_hooks(build_optimizer("adamw", groups_of(narrow), 1e-2), cautious=True)
    with pytest.raises(ValueError, match="AdaDecay changes .* bfloat16"):
        alphadecay.AdaDecay(narrow, ETA)
    with pytest.raises(UserError, match="Muon's decays are rounded away in bfloat16"):
        build_optimizer("muon", groups_of(narrow), 1e-2)
    with pytest.raises(ValueError, match="the optimizer also decays the weights"):
        alphadecay.AdaDecay(model, ETA).step(torch.optim.AdamW([nn.Parameter(torch.ones(3))]))


@pytest.mark.parametrize("optimizer_name", ["adam", "adamw", "muon"])
@pytest.mark.parametrize("kind", ["adadecay", "cautious", "plain"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nothing_moves_in_an_update_that_is_left_out(optimizer_name, kind, bad):
    if kind == "cautious" and optimizer_name != "adamw":
        pytest.skip("refused")
    model = small_llama()
    decay = alphadecay.AdaDecay(model, ETA) if kind == "adadecay" else None
    groups = split_hidden(decay.param_groups(), model) if decay else groups_of(model)
    optimizer = build_optimizer(optimizer_name, groups, 1e-2)
    if kind == "cautious":
        install_decay_hooks(optimizer, PEAK, cautious=True)
    ranks = DistributedContext(0, 0, 1, torch.device("cpu"))
    guard = NonFiniteGuard(optimizer, ranks, max_consecutive_skips=3)
    history = []
    for update in range(1, 4):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(update))
        model(ids, ids).backward()
        if update == 2:
            model.model.layers[0].mlp.up_proj.weight.grad[3, 4] = bad
        guard.check_update(
            update,
            torch.tensor(1.0),
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]),
        )
        if decay:
            decay.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        history.append([p.detach().clone() for p in model.parameters()])
    first, left_out, last = history
    assert all(torch.equal(a, b) for a, b in zip(first, left_out, strict=True))
    assert all(torch.isfinite(p).all() for p in last) and not torch.equal(left_out[0], last[0])


def test_decays_stay_in_their_groups():
    """Between steps the groups hold the method's decays, not those of a decay hook."""
    model = small_llama()
    optimizer = build_optimizer("adamw", groups_of(model), 1e-3)
    install_decay_hooks(optimizer, PEAK, cautious=True)
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    optimizer.step()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [ETA, ETA]


def test_muon_is_torchs_two_optimizers():
    """With module-wise decays, Muon steps the matrices of blocks and AdamW all other parameters."""
    ours, theirs = small_llama(), small_llama()
    optimizer = build_optimizer(
        "muon", split_hidden(alphadecay.AlphaDecay(ours, ETA).param_groups(), ours), 1e-3
    )
    decays = alphadecay.AlphaDecay(theirs, ETA).weight_decays
    named = [(n.removesuffix(".weight"), p) for n, p in theirs.named_parameters()]
    matrices = [(n, p) for n, p in named if "layers." in n and "norm" not in n]
    others = [p for n, p in named if "layers." not in n or "norm" in n]
    by_hand = [
        torch.optim.Muon(
            [{"params": [p], "weight_decay": decays.get(n, ETA)} for n, p in matrices],
            1e-3,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, 1e-3, weight_decay=ETA, betas=(0.9, 0.999), eps=1e-8, fused=True),
    ]
    for step in range(5):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((ours, [optimizer]), (theirs, by_hand)):
            model(ids, ids).backward()
            for o in optimizers:
                for group in o.param_groups:
                    group["lr"] = 1e-3 * (step + 1)
                o.step()
            model.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert set(optimizer.state) == set(ours.parameters())


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for its device: reads of a tensor's value."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method, most", [("awd", 1), ("adadecay", 0), ("alphadecay", 0)])
@pytest.mark.parametrize("optimizer_name", ["adam", "adamw"])
def test_a_step_waits_for_the_device_at_most_once(method, most, optimizer_name):
    model = small_llama()
    decay = decay_from_flags(parsed(method, optimizer_name), model, 100)
    optimizer = build_optimizer(optimizer_name, decay.param_groups(), 1e-2)
    optimizer.found_inf = torch.zeros(())
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    with Waits() as waits:
        decay.step(optimizer)
    assert waits.count == most


@pytest.mark.parametrize("optimizer_name", ["adam", "adamw"])
def test_adadecay_of_gradients_all_alike_is_eta(optimizer_name):
    weight = nn.Parameter(torch.ones(4, 4))
    model = nn.ParameterList([weight])
    decay = alphadecay.AdaDecay(model, ETA)
    optimizer = build_optimizer(optimizer_name, decay.param_groups(), 1.0)
    weight.grad = torch.zeros(4, 4)
    decay.step(optimizer)
    changed = weight.grad if optimizer_name == "adam" else 1 - weight.detach()
    assert torch.allclose(changed, torch.full((4, 4), ETA))
    twin = alphadecay.AdaDecay(model, ETA)
    twin.load_state_dict(decay.state_dict())
    with pytest.raises(ValueError, match="the saved one holds average"):
        twin.load_state_dict({"average": 1.0})
