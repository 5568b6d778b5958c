"""AlphaDecay: owns the parameter groups of an optimizer and rebalances their weight decay during training."""

import logging
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from alphadecay.assignment import MAPS, assign_decays
from alphadecay.async_analysis import AsyncAnalysis
from alphadecay.controls import constant_ratios, permutation, rescale_to_mean, shape_multipliers
from alphadecay.distributed import (
    agreed_choices,
    assign_owners,
    check_agreement,
    gather_rows,
    is_sharded,
    rank_and_size,
    whole_weight,
)
from alphadecay.modules import BalancedModule, balanced_modules, batchnorm_followers, unwrap
from alphadecay.norms import gradient_norms
from alphadecay.param_groups import check_has_weight_decay, sub_group
from alphadecay.spectral.engine import SpectralEngine
from alphadecay.spectral.power_law import METHODS
from alphadecay.spectral.statistics import COLUMNS, FAILURES, METRICS, SOLVER_FAILED, empty_row

logger = logging.getLogger(__name__)


class AlphaDecay:
    """Module-wise weight decay from the spectra of the weights (He et al., NeurIPS 2025, arXiv 2506.14562).

        decay = alphadecay.AlphaDecay(model, weight_decay=0.1, min_ratio=0.6666, max_ratio=5, every=500)
        optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-3)
        ...
        decay.step(optimizer)  # before optimizer.step(): an analysis every 500 calls, otherwise free

    Under torch.distributed every rank must construct it and call `step` alike: each analyses a share of the modules,
    and all then compute the same decays from the same numbers.

    Args:
        model: any module; DistributedDataParallel and compiled wrappers are seen through.
        weight_decay: eta, the decay of everything that is not balanced and the scale of everything that is.
        min_ratio, max_ratio: s1 and s2: decays of the linear map run from s1 * eta to s2 * eta.
        every: updates between two analyses. The decays are first set at construction.
        metric: the statistic modules are scored by (`alphadecay.METRICS`).
        mapping: score -> decay (`alphadecay.MAPS`).
        positive: decay rises with the score, as published; False reverses the order (a causal control).
        method, xmin_pos, filter_zeros: the power-law fit, see `fit_power_law`.
        scope, remove_first, remove_last: which modules are balanced, see `balanced_modules`.
        batchnorm, batchnorm_type: whether and how BatchNorm2d follows its convolution, see `batchnorm_followers`.
        process_group: the ranks that share the analysis; None: all of them, if torch.distributed is initialised.
        lag: 0: an analysis ends before `step` returns, as published. Above 0: it runs beside the training, on a copy of this rank's
            share of the weights, and its decays take effect `lag` updates later (on all ranks in the same update, waiting if need
            be), so `lag` must be below `every`.
        one_shot: freeze the decays after the first analysis during training (the one of update `every`).
        shuffle_seed: give the decays to the modules in a fixed random order of this seed (a control); None: each to its own.
        iso_budget: rescale the decays so that their mean over the balanced modules, weighted by parameters, is eta. (The linear map
            otherwise raises it: to about 1.5 eta for ratios 0.67 and 3.)
        type_constant: one multiplier of eta for each module type, for good, and no spectrum (a control): of `type_multipliers`
            (1 for types not in it), by default the linear map of the alphas that the shapes alone would give, see `shape_multipliers`.
        timeout: seconds that the analysis of one module on a CPU may take; a module that takes longer keeps its decay. Below the
            process group's own timeout, so that the other ranks are still there.

    Attributes:
        weight_decays: name of each balanced module -> its decay now.
        history: one dictionary for each balanced module and update of the decays: step (the first update that uses
            them, counted from 1; 0 for those from construction), module, type, block, the statistics (None where not
            computed), score, weight_decay, reason (why the module kept its previous decay, else None).

    With a gradient scaler call `step` after `scaler.unscale_(optimizer)`, so that `gradnorm` sees the true gradients.

    Raises ValueError for settings that do not go together, with what to give instead.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_decay: float,
        min_ratio: float = 0.6666,
        max_ratio: float = 3.0,
        every: int = 500,
        *,
        metric: str = "alpha",
        mapping: str = "tb_linear_map",
        positive: bool = True,
        method: str = "median",
        xmin_pos: float = 2.0,
        filter_zeros: bool = False,
        scope: str = "reference",
        remove_first: bool = True,
        remove_last: bool = True,
        batchnorm: bool = True,
        batchnorm_type: str = "name",
        process_group: dist.ProcessGroup | None = None,
        lag: int = 0,
        one_shot: bool = False,
        shuffle_seed: int | None = None,
        iso_budget: bool = False,
        type_constant: bool = False,
        type_multipliers: Mapping[str, float] | None = None,
        timeout: float = 240.0,
    ):
        _check_settings(weight_decay, min_ratio, max_ratio, every, lag)
        _check_choice("metric", metric, METRICS)
        _check_choice("map", mapping, MAPS)
        _check_choice("fit", method, METHODS)
        if not xmin_pos > 1:
            raise ValueError(
                f"xmin_pos is {xmin_pos}: it must be above 1 (2 fits the upper half of the spectrum)"
            )
        self.model = unwrap(model)
        self.weight_decay = weight_decay
        self.every = every
        self.metric = metric
        self.updates = 0
        self.history: list[dict] = []
        self._map = {
            "mapping": mapping,
            "min_ratio": min_ratio,
            "max_ratio": max_ratio,
            "positive": positive,
        }
        self._fit = {"method": method, "xmin_pos": xmin_pos, "filter_zeros": filter_zeros}
        self._group = process_group
        self._lag = lag
        self._controls = {
            "shuffle_seed": shuffle_seed,
            "iso_budget": iso_budget,
            "type_constant": type_constant,
            "one_shot": one_shot,
        }
        self._engine = SpectralEngine(timeout)
        self._pending: AsyncAnalysis | None = None
        self._stream: torch.cuda.Stream | None = None
        limit = {"min_eigenvalues": 0} if metric == "gradnorm" else {}
        self.modules = balanced_modules(self.model, scope, remove_first, remove_last, **limit)
        self._check_ranks()
        if not self.modules:
            raise ValueError(
                "the model has no module to balance: none with 50 eigenvalues or more is left after the first and the last "
                "were removed; use a larger model, or remove_first=False, remove_last=False or scope='all_blocks'"
            )
        rank, world_size = rank_and_size(process_group)
        self._owners = assign_owners([m.cost for m in self.modules], world_size)
        self._owned = [i for i, owner in enumerate(self._owners) if owner == rank]
        self._followers = (
            batchnorm_followers(self.model, self.modules, batchnorm_type) if batchnorm else {}
        )
        self.weight_decays = {m.name: float(weight_decay) for m in self.modules}
        self._shuffle_order = (
            list(range(len(self.modules)))
            if shuffle_seed is None
            else permutation(len(self.modules), shuffle_seed)
        )
        self._budget = self._sizes() if iso_budget else None
        self._ratios: Tensor | None = None  # of type_constant
        if type_constant:
            multipliers = (
                shape_multipliers(self.modules, min_ratio, max_ratio)
                if type_multipliers is None
                else type_multipliers
            )
            self._ratios = constant_ratios(self.modules, multipliers)
        self._groups_up_to_date = (
            True  # param_groups() and attach() hand out the decays of construction themselves
        )
        self._rebalance(self._table())
        # The ranks tried solvers on their own; from here on all use the same, and a resumed run those of the saved one.
        self._engine.solvers = agreed_choices(self._engine.solvers, process_group)

    def param_groups(self) -> list[dict]:
        """Parameter groups for an optimizer: one for each balanced module, holding its own parameters (and those of the
        BatchNorm2d that follows it), and one for all else, at eta. `module` names the balanced module, None for the rest."""
        owner = self._owners_of_parameters()
        parts: dict[str | None, list] = {None: []} | {m.name: [] for m in self.modules}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parts[owner.get(parameter)].append(parameter)
        decays = {None: float(self.weight_decay)} | self.weight_decays
        return [
            {"params": p, "module": name, "weight_decay": decays[name]}
            for name, p in parts.items()
            if p
        ]

    def attach(self, optimizer: Optimizer) -> None:
        """Split the groups of an existing optimizer so that each balanced module has its own, and write the decays.

        Every other option of a group and the optimizer's state stay. Parameters that are not balanced stay in their
        group at its own weight decay; so does a balanced module's bias that the group of its weight does not hold.

        Raises:
            ValueError: the optimizer has no weight decay, holds a parameter that is not the model's, lacks a balanced weight, is attached
                already, or a learning-rate scheduler has already been built on it.
        """
        groups = optimizer.param_groups
        check_has_weight_decay(optimizer)
        if any("module" in group for group in groups):
            raise ValueError(
                "the optimizer's groups are named by module already: attach once, and not after param_groups()"
            )
        if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            raise ValueError(
                "a learning-rate scheduler already counts this optimizer's groups: attach first, then build the scheduler"
            )
        self._check_optimizer_covers_model(groups)
        owner = self._owners_of_parameters()
        split = []
        for group in groups:
            in_group = set(group["params"])
            leaders = {m.name for m in self.modules if m.weight in in_group}
            names = [owner.get(p) if owner.get(p) in leaders else None for p in group["params"]]
            split += [sub_group(group, names, name) for name in dict.fromkeys(names)]
        optimizer.param_groups[:] = split
        self._write(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Count one update; every `every` of them analyse the weights and write new decays. Call before `optimizer.step()`.

        Returns True where the decays were rebalanced. Raises ValueError where a balanced module has no group of its own.
        """
        self.updates += 1
        rebalanced = False
        if self._pending is not None and self.updates >= self._pending.update + self._lag:
            self._rebalance(self._finish_pending())
            self._pending = None
            rebalanced = True
        if self._is_due():
            if self._lag:
                self._pending = self._start_async_analysis()
            else:
                self._rebalance(self._table())
                rebalanced = True
        if rebalanced or not self._groups_up_to_date:
            self._write(optimizer)
        return rebalanced

    def state_dict(self) -> dict:
        """What decides the future: the number of updates, the decays by module name, the solvers. With `lag` above 0 also the
        statistics of an analysis under way, for which this waits, and all ranks must call it together."""
        state = {
            "updates": self.updates,
            "weight_decays": dict(self.weight_decays),
            "solvers": dict(self._engine.solvers),
        }
        if self._pending is not None:
            state["pending"] = {
                "update": self._pending.update,
                "rows": self._finish_pending().tolist(),
            }
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict()`. The optimizer's groups get the decays at the next `step`. `history` is kept.

        Raises ValueError where the state is of another set of balanced modules.
        """
        saved, mine = set(state["weight_decays"]), set(self.weight_decays)
        if saved != mine:
            odd = sorted(saved ^ mine)
            raise ValueError(
                f"the saved decays are of other modules than this model's: {len(odd)} differ, the first is {odd[0]}; "
                "use the model and the module flags they were saved with"
            )
        self.updates = state["updates"]
        self.weight_decays = {name: state["weight_decays"][name] for name in self.weight_decays}
        self._groups_up_to_date = False
        self._engine.solvers = dict(state["solvers"])
        pending = state.get("pending")
        self._pending = (
            AsyncAnalysis(pending["update"], torch.tensor(pending["rows"], dtype=torch.float64))
            if pending
            else None
        )

    def _is_due(self) -> bool:
        """Whether this update analyses the weights."""
        if self._ratios is not None or self._controls["one_shot"] and self.updates > self.every:
            return False
        return self.updates % self.every == 0

    def _table(self) -> Tensor:
        """Statistics of the weights of now and failure codes, the same on all ranks: [M, columns + 1] float64."""
        if self._ratios is not None:
            return torch.tensor(
                [[*empty_row(math.nan).values(), 0]] * len(self.modules), dtype=torch.float64
            )
        return self._gather(self._analyze(*self._snapshot()))

    def _rebalance(self, table: Tensor) -> None:
        """Turn statistics [M, columns and failure code] into decays and note both in the history. A module that failed keeps its decay."""
        rows, failures = table[:, :-1], table[:, -1].int().tolist()
        score = COLUMNS.index(self.metric)
        reasons = [FAILURES[code] for code in failures]
        try:
            decays = self._apply_controls(
                self._assign(
                    rows[:, score], [i for i, reason in enumerate(reasons) if reason is None]
                )
            )
            reasons = [reasons[source] for source in self._shuffle_order]
        except ValueError as error:
            if self.updates == 0:
                raise
            decays, reasons = {}, [reason or str(error) for reason in reasons]
        for i, decay in decays.items():
            self.weight_decays[self.modules[i].name] = decay
        for module, row, reason in zip(self.modules, rows.tolist(), reasons, strict=True):
            self.history.append(self._record(module, row, reason, row[score]))
            if reason and rank_and_size(self._group)[0] == 0:
                logger.warning(
                    "update %d: %s keeps its weight decay: %s", self.updates, module.name, reason
                )

    def _assign(self, scores: Tensor, sound: list[int]) -> dict[int, float]:
        """Decay of each sound module, by its index."""
        if self._ratios is not None:
            decays = self.weight_decay * self._ratios
        else:
            decays = assign_decays(
                scores[sound],
                self.weight_decay,
                blocks=[self.modules[i].block for i in sound],
                **self._map,
            )
        return dict(zip(sound, decays.tolist(), strict=True))

    def _apply_controls(self, decays: dict[int, float]) -> dict[int, float]:
        """The controls that act on decays, whatever gave them: module i takes that of module sources[i], at the same budget."""
        decays = {
            i: decays[source] for i, source in enumerate(self._shuffle_order) if source in decays
        }
        return rescale_to_mean(decays, self._budget, self.weight_decay) if self._budget else decays

    def _sizes(self) -> list[int]:
        """Parameters that take each module's decay."""
        sizes = dict.fromkeys(self.weight_decays, 0)
        for parameter, name in self._owners_of_parameters().items():
            sizes[name] += parameter.numel()
        return list(sizes.values())

    def _snapshot(self) -> tuple[list[Tensor], list[float]]:
        """Weights of the modules that this rank analyses, whole, and the norms of their gradients."""
        norms = gradient_norms([m.weight for m in self.modules])
        if self.metric == "gradnorm":
            return [], [norms[i] for i in self._owned]
        whole = [
            whole_weight(m.weight, owner, self._group)
            for m, owner in zip(self.modules, self._owners, strict=True)
        ]
        return [whole[i] for i in self._owned], [norms[i] for i in self._owned]

    def _analyze(
        self, weights: list[Tensor], norms: list[float], background: bool = False
    ) -> Tensor:
        """Statistics and failure code of the modules that this rank owns, zeros for the others: [M, columns + 1] float64."""
        table = torch.zeros(len(self.modules), len(COLUMNS) + 1, dtype=torch.float64)
        try:
            rows = self._engine.rows(
                weights, norms, self.metric, background=background, **self._fit
            )
        except (
            Exception
        ):  # out of memory, say: the other ranks wait for this one's rows all the same
            logger.exception("the analysis failed on this rank")
            rows = [(empty_row(norm), SOLVER_FAILED) for norm in norms]
        for i, (row, failure) in zip(self._owned, rows, strict=True):
            table[i] = torch.tensor([*row.values(), failure], dtype=torch.float64)
        return table

    def _gather(self, table: Tensor) -> Tensor:
        return gather_rows(table, self._owned, self.modules[0].weight.device, self._group)

    def _start_async_analysis(self) -> "AsyncAnalysis":
        """Begin an analysis of the weights of now, beside the training."""
        weights, norms = self._snapshot()
        # A sharded weight has just been put together for this; any other is the parameter itself, which training goes on to change.
        copies = [
            w if is_sharded(self.modules[i].weight) else w.clone()
            for w, i in zip(weights, self._owned, strict=False)
        ]
        pending = AsyncAnalysis(self.updates)
        if self._stream is None and copies and copies[0].is_cuda:
            self._stream = torch.cuda.Stream(
                copies[0].device
            )  # one for all analyses: the allocator keeps a pool for each
        pending.start(lambda: self._analyze(copies, norms, background=True), copies, self._stream)
        return pending

    def _finish_pending(self) -> Tensor:
        """The table of the analysis under way, the same on all ranks; waits for it."""
        if self._pending.table is None:
            self._pending.table = self._gather(self._pending.wait())
        return self._pending.table

    def _check_ranks(self) -> None:
        """Every rank must analyse the same modules at the same updates on the same kind of device."""
        settings = (
            {"every": self.every, "lag": self._lag, "metric": self.metric, "eta": self.weight_decay}
            | self._map
            | self._fit
        )
        settings |= self._controls
        device = f"device {next(iter(self.model.parameters())).device.type}"
        modules = [f"{m.name} {tuple(m.weight.shape)}" for m in self.modules]
        check_agreement([device, *(f"{k}={v}" for k, v in settings.items()), *modules], self._group)

    def _record(
        self, module: BalancedModule, row: list[float], reason: str | None, score: float
    ) -> dict:
        number = {
            name: None if math.isnan(value) else value
            for name, value in zip(COLUMNS, row, strict=True)
        }
        return {
            "step": self.updates,
            "module": module.name,
            "type": module.type,
            "block": module.block,
            **number,
            "score": None if math.isnan(score) else score,
            "weight_decay": self.weight_decays[module.name],
            "reason": reason,
        }

    def _owners_of_parameters(self) -> dict[nn.Parameter, str]:
        """Parameter -> the balanced module whose decay it takes."""
        owner: dict[nn.Parameter, str] = {}
        for balanced in self.modules:
            for module in (balanced.module, *self._followers.get(balanced.name, ())):
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad:
                        owner.setdefault(parameter, balanced.name)
        return owner

    def _check_optimizer_covers_model(self, groups: list[dict]) -> None:
        own = set(self.model.parameters())
        held = set()
        for index, group in enumerate(groups):
            for parameter in group["params"]:
                if parameter not in own:
                    raise ValueError(
                        f"group {index} of the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in the model: "
                        "give AlphaDecay the model that the optimizer trains"
                    )
            held.update(group["params"])
        for module in self.modules:
            if module.weight not in held:
                raise ValueError(
                    f"the optimizer does not hold the weight of {module.name}: build it with all of the model's parameters"
                )

    def _write(self, optimizer: Optimizer) -> None:
        check_has_weight_decay(optimizer)
        missing = set(self.weight_decays) - {
            group.get("module") for group in optimizer.param_groups
        }
        if missing:
            first = next(name for name in self.weight_decays if name in missing)
            raise ValueError(
                f"the optimizer has no group for {first}: build it with decay.param_groups() or call decay.attach(optimizer)"
            )
        for group in (
            optimizer.param_groups
        ):  # several may be of one module, where its weight and its bias are optimized apart
            if group.get("module") is not None:
                group["weight_decay"] = self.weight_decays[group["module"]]
        self._groups_up_to_date = True


def _check_settings(
    weight_decay: float, min_ratio: float, max_ratio: float, every: int, lag: int
) -> None:
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay is {weight_decay}: it must be a finite number, 0 or more")
    if not 0 <= min_ratio <= max_ratio or not math.isfinite(max_ratio):
        raise ValueError(
            f"the ratios are out of order: 0 <= min_ratio <= max_ratio must hold, not {min_ratio} and {max_ratio}"
        )
    if not (isinstance(every, int) and every >= 1):
        raise ValueError(f"every is {every}: it must be a whole number of updates, 1 or more")
    if not 0 <= lag < every:
        raise ValueError(
            f"lag is {lag}: an analysis must end before the next one begins, so 0 <= lag < every ({every}) must hold"
        )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")
