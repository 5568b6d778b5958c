"""AlphaDecay: owns an optimizer's parameter groups and rebalances their weight decays."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from alphadecay.assignment import SQUEEZED, MapSettings, assign_decays, squeezing_module
from alphadecay.async_analysis import AsyncAnalysis
from alphadecay.constants import FIT_METHODS, MAPS, METRICS
from alphadecay.controls import (
    Controls,
    constant_ratios,
    permutation,
    rescale_to_mean,
    shape_multipliers,
)
from alphadecay.deprecated import renamed_keyword, warn_deprecated
from alphadecay.distributed import AnalysisPlan
from alphadecay.modules import BalancedModule, balanced_modules, batchnorm_followers, unwrap
from alphadecay.norms import gradient_norms
from alphadecay.param_groups import check_has_weight_decay, sub_group
from alphadecay.spectral.engine import SpectralEngine
from alphadecay.spectral.power_law import FitSettings
from alphadecay.spectral.statistics import COLUMNS, FAILURES, SOLVER_FAILED, empty_row

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class MoreSettings(TypedDict, total=False):
    """Keyword arguments of AlphaDecay that are rarely needed, and old names of others."""

    xmin_pos: float
    filter_zeros: bool
    remove_first: bool
    remove_last: bool
    batchnorm: bool
    batchnorm_type: str
    # Old names, accepted for one more release.
    method: str  # now fit_method
    shuffle_seed: int | None  # these five are now fields of Controls
    iso_budget: bool
    type_constant: bool
    type_multipliers: Any
    one_shot: bool


class AlphaDecay:
    """Module-wise weight decay from the spectra of the weights (He et al. 2025, arXiv 2506.14562).

        decay = alphadecay.AlphaDecay(model, weight_decay=0.1, min_ratio=0.6666, max_ratio=5)
        optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-3)
        ...
        decay.step(optimizer)  # before optimizer.step(): analyses the weights every 500 calls

    Under torch.distributed every rank must construct it and call `step` in the same updates. Each
    rank analyses some of the modules, and all compute the same decays from the same numbers.

    With a gradient scaler call `step` after `scaler.unscale_(optimizer)`, so that the metric
    `gradnorm` uses the true gradients.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are unwrapped.
        weight_decay: eta, the decay of everything that is not balanced, and the scale of the
            decays of everything that is.
        min_ratio: s1: the decays of the linear map range from s1 * eta ...
        max_ratio: s2: ... to s2 * eta.
        every: updates between two analyses. The decays are set at construction for the first time.
        metric: the statistic that modules are scored by, one of `alphadecay.METRICS`.
        mapping: the map from scores to decays, one of `alphadecay.MAPS`; see `assign_decays`.
        positive: True: the decay rises with the score, as published. False: the order is reversed
            (a control of whether the order matters).
        fit_method: how the power-law fit chooses its threshold, one of `alphadecay.FIT_METHODS`;
            see `fit_power_law`.
        scope: which modules are balanced, one of `alphadecay.SCOPES`; see `balanced_modules`.
        controls: settings of control experiments, see `alphadecay.Controls`.
        lag: 0: an analysis ends before `step` returns, as published. Above 0: it runs in the
            background on a copy of this rank's share of the weights, and its decays take effect
            `lag` updates later, in the same update on all ranks, which wait for it if necessary.
            Must be below `every`.
        process_group: the ranks that share the analysis. None: all of them if torch.distributed is
            initialised, otherwise this process alone.
        timeout: seconds that the analysis of one module may take on a CPU. A module that takes
            longer keeps its decay. Must be shorter than the process group's timeout, or other
            ranks will time out first.
        more: rarely needed settings. `xmin_pos` (default 2) and `filter_zeros` (default False) of
            the power-law fit, see `fit_power_law`. `remove_first` and `remove_last` (default True)
            of the scope, see `balanced_modules`. `batchnorm` (default True): BatchNorm2d modules
            take the decay of their convolution; `batchnorm_type` (default `name`): which one, see
            `batchnorm_followers`.

    Attributes:
        weight_decays: name of each balanced module -> its current decay.
        history: one dictionary for each balanced module and each time the decays were set: step
            (the first update that uses the decays, counted from 1; 0 for those of construction),
            module, type, block, the statistics (None where not computed), score, weight_decay, and
            reason (why the module kept its previous decay, else None).
        modules: the balanced modules.
        updates: number of calls of `step`.

    Raises:
        ValueError: settings are out of range or contradict each other, the model has no module to
            balance, or the ranks do not agree. The message says what to give instead.
        TypeError: an unknown keyword argument.
    """

    analyzes = True  # unlike the baselines that share this interface

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
        fit_method: str | None = None,
        scope: str = "reference",
        controls: Controls | None = None,
        lag: int = 0,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 240.0,
        **more: Unpack[MoreSettings],
    ) -> None:
        _check_keywords(more)
        fit_method = renamed_keyword(
            "AlphaDecay", ("method", "fit_method"), more.get("method"), fit_method
        )
        self._fit: FitSettings = {
            "method": fit_method or "median",
            "xmin_pos": more.get("xmin_pos", 2.0),
            "filter_zeros": more.get("filter_zeros", False),
        }
        self._controls = _controls_from_old_keywords(more, controls)
        _check_settings(weight_decay, min_ratio, max_ratio, every, lag, self._fit["xmin_pos"])
        _check_choice("metric", metric, METRICS)
        _check_choice("map", mapping, MAPS)
        _check_choice("fit", self._fit["method"], FIT_METHODS)
        self.model = unwrap(model)
        self.weight_decay = weight_decay
        self.every = every
        self.metric = metric
        self.updates = 0
        self.history: list[dict[str, Any]] = []
        self._map: MapSettings = {
            "mapping": mapping,
            "min_ratio": min_ratio,
            "max_ratio": max_ratio,
            "positive": positive,
        }
        self._lag = lag
        self._engine = SpectralEngine(timeout)
        self._pending: AsyncAnalysis | None = None
        self._stream: torch.cuda.Stream | None = None
        self._outliers: set[str] = set()  # modules that a warning has named

        self.modules = balanced_modules(
            self.model,
            scope,
            more.get("remove_first", True),
            more.get("remove_last", True),
            # The gradient's norm does not need a spectrum.
            **({"min_eigenvalues": 0} if metric == "gradnorm" else {}),
        )
        self._followers = (
            batchnorm_followers(self.model, self.modules, more.get("batchnorm_type", "name"))
            if more.get("batchnorm", True)
            else {}
        )
        self._plan = AnalysisPlan(self.modules, process_group)
        self._plan.check_agreement(self._settings_that_ranks_share())
        if not self.modules:
            raise ValueError(
                "the model has no module to balance: none with 50 eigenvalues or more is left "
                "after the first and the last were removed; use a larger model, or "
                "remove_first=False, remove_last=False or scope='all_blocks'"
            )
        self.weight_decays = {m.name: float(weight_decay) for m in self.modules}
        self._shuffle_order = self._order_of_decays()
        self._constant_ratios = self._ratios_of_type_constant()
        # param_groups() and attach() themselves write the decays of construction.
        self._groups_up_to_date = True
        self._rebalance(self._collect_statistics())

    def param_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer.

        There is one group for each balanced module, with the module's own parameters and those of
        the BatchNorm2d modules that follow it, and one group at eta for all other parameters.

        Returns:
            Groups with `params`, `weight_decay`, and `module`: the balanced module's name, None
            for the other parameters. Frozen parameters are left out.
        """
        module_of = self._module_of_parameter()
        parameters: dict[str | None, list[nn.Parameter]] = {None: []}
        parameters |= {m.name: [] for m in self.modules}
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameters[module_of.get(parameter)].append(parameter)
        decays = {None: float(self.weight_decay)} | self.weight_decays
        return [
            {"params": members, "module": name, "weight_decay": decays[name]}
            for name, members in parameters.items()
            if members
        ]

    def attach(self, optimizer: Optimizer) -> None:
        """Split an existing optimizer's groups by balanced module, and write the decays.

        All other options of the groups and the optimizer's state are kept. Parameters that are not
        balanced stay in their group at its own weight decay. So does a balanced module's bias if
        the group does not hold the module's weight.

        Args:
            optimizer: an optimizer over the model's parameters.

        Raises:
            ValueError: the optimizer has no weight decay, holds a parameter of another model, lacks
                the weight of a balanced module, is attached already, or has a learning-rate
                scheduler already.
        """
        groups = optimizer.param_groups
        check_has_weight_decay(optimizer)
        if any("module" in group for group in groups):
            raise ValueError(
                "the optimizer's groups are split by module already: attach once, and not after "
                "param_groups()"
            )
        if getattr(optimizer.step, "_wrapped_by_lr_sched", False):
            raise ValueError(
                "a learning-rate scheduler has counted this optimizer's groups already: "
                "attach first, then build the scheduler"
            )
        self._check_optimizer_covers_model(groups)
        module_of = self._module_of_parameter()
        split = []
        for group in groups:
            in_group = set(group["params"])
            weights_here = {m.name for m in self.modules if m.weight in in_group}
            names = [module_of.get(p) for p in group["params"]]
            names = [name if name in weights_here else None for name in names]
            split += [sub_group(group, names, name) for name in dict.fromkeys(names)]
        optimizer.param_groups[:] = split
        self._write_decays(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Count one update; in every `every`-th of them analyse the weights and set new decays.

        Call it before `optimizer.step()`. With `lag` above 0, new decays are set `lag` updates
        after their analysis started.

        Args:
            optimizer: an optimizer over `param_groups()`, or one that was attached.

        Returns:
            True if new decays were set.

        Raises:
            ValueError: a balanced module has no group of its own in the optimizer.
        """
        self.updates += 1
        rebalanced = False
        if self._pending is not None and self.updates >= self._pending.update + self._lag:
            self._rebalance(self._finish_async_analysis(self._pending))
            self._pending = None
            rebalanced = True
        if self._analysis_is_due(self.updates):
            if self._lag:
                self._pending = self._start_async_analysis()
            else:
                self._rebalance(self._collect_statistics())
                rebalanced = True
        if rebalanced or not self._groups_up_to_date:
            self._write_decays(optimizer)
        return rebalanced

    @property
    def analyzes_next(self) -> bool:
        """Whether the next `step` analyses the weights and waits for the result.

        False for an analysis in the background, which is waited for in a later step.
        """
        return not self._lag and self._analysis_is_due(self.updates + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs.

        These are the number of updates and the decays by module name. With `lag` above 0 the
        statistics of a running analysis are included; then all ranks must call this together, and
        it waits for the analysis.
        """
        state: dict[str, Any] = {
            "updates": self.updates,
            "weight_decays": dict(self.weight_decays),
        }
        if self._pending is not None:
            state["pending"] = {
                "update": self._pending.update,
                "rows": self._finish_async_analysis(self._pending).tolist(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`.

        The next `step` writes the decays to the optimizer's groups. `history` is kept.

        Args:
            state: the saved state.

        Raises:
            ValueError: the state belongs to another set of balanced modules.
        """
        saved, ours = set(state["weight_decays"]), set(self.weight_decays)
        if saved != ours:
            mismatched = sorted(saved ^ ours)
            raise ValueError(
                "the saved decays belong to other modules than this model's: "
                f"{len(mismatched)} differ, the first is {mismatched[0]}; "
                "use the model and the module flags that they were saved with"
            )
        self.updates = state["updates"]
        self.weight_decays = {name: state["weight_decays"][name] for name in self.weight_decays}
        self._groups_up_to_date = False
        self._pending = None
        if state.get("pending"):
            rows = torch.tensor(state["pending"]["rows"], dtype=torch.float64)
            self._pending = AsyncAnalysis(state["pending"]["update"], rows)

    # -------------------------------------------------------------------------------- analyse

    def _analysis_is_due(self, update: int) -> bool:
        """Return True if the weights must be analysed in an update."""
        if self._controls.type_constant:
            return False
        if self._controls.one_shot and update > self.every:
            return False
        return update % self.every == 0

    def _collect_statistics(self) -> Tensor:
        """Analyse the current weights.

        Returns:
            [M, columns + 1] float64: the statistics, and the failure code in the last column. The
            same on all ranks.
        """
        if self._controls.type_constant:
            empty_rows = [[*empty_row(math.nan).values(), 0]] * len(self.modules)
            return torch.tensor(empty_rows, dtype=torch.float64)
        norms = self._gradient_norms()
        weights = [] if self.metric == "gradnorm" else self._plan.whole_weights()
        return self._plan.gather(self._analyze_owned(weights, norms))

    def _gradient_norms(self) -> list[float]:
        """Return the gradient norms of the modules that this rank analyses; a collective."""
        norms = gradient_norms([m.weight for m in self.modules])
        return [norms[i] for i in self._plan.owned]

    def _analyze_owned(
        self, weights: Sequence[Tensor], norms: Sequence[float], background: bool = False
    ) -> Tensor:
        """Compute the rows of the modules that this rank owns.

        Args:
            weights: their weights, unsharded; empty for the metric `gradnorm`.
            norms: their gradient norms.
            background: training goes on meanwhile.

        Returns:
            [M, columns + 1] float64 as in `_collect_statistics`, zero for modules of other ranks.
        """
        table = torch.zeros(len(self.modules), len(COLUMNS) + 1, dtype=torch.float64)
        try:
            rows = self._engine.rows(
                weights, norms, self.metric, background=background, **self._fit
            )
        except Exception:
            # For example out of memory. The other ranks still wait for this rank's rows.
            logger.exception("the analysis failed on this rank")
            rows = [(empty_row(norm), SOLVER_FAILED) for norm in norms]
        for i, (row, failure) in zip(self._plan.owned, rows, strict=True):
            table[i] = torch.tensor([*row.values(), failure], dtype=torch.float64)
        return table

    def _start_async_analysis(self) -> AsyncAnalysis:
        """Start an analysis of the current weights in the background."""
        norms = self._gradient_norms()
        copies = [] if self.metric == "gradnorm" else self._plan.copied_whole_weights()
        if self._stream is None and copies and copies[0].is_cuda:
            # One stream for all analyses, because torch's allocator keeps memory for each stream.
            self._stream = torch.cuda.Stream(copies[0].device)  # type: ignore[no-untyped-call]
        pending = AsyncAnalysis(self.updates)
        pending.start(
            lambda: self._analyze_owned(copies, norms, background=True), copies, self._stream
        )
        return pending

    def _finish_async_analysis(self, pending: AsyncAnalysis) -> Tensor:
        """Wait for a background analysis and return its table, the same on all ranks."""
        if pending.table is None:
            pending.table = self._plan.gather(pending.wait())
        return pending.table

    # --------------------------------------------------------------------------------- assign

    def _rebalance(self, table: Tensor) -> None:
        """Set new decays and record them, with their statistics, in the history.

        A module whose row has a failure code keeps its decay.

        Args:
            table: [M, columns + 1], see `_collect_statistics`.
        """
        rows, failures = table[:, :-1], table[:, -1].int().tolist()
        scores = rows[:, COLUMNS.index(self.metric)]
        reasons = [FAILURES[code] for code in failures]
        valid_indices = [i for i, reason in enumerate(reasons) if reason is None]
        try:
            assigned = self._assign(scores, valid_indices)
            self._warn_of_outlier(assigned, scores)
            decays = self._apply_controls(assigned)
            reasons = [reasons[source] for source in self._shuffle_order]
        except ValueError as error:
            if self.updates == 0:
                raise
            decays, reasons = {}, [reason or str(error) for reason in reasons]
        for i, decay in decays.items():
            self.weight_decays[self.modules[i].name] = decay
        for module, row, score, reason in zip(
            self.modules, rows.tolist(), scores.tolist(), reasons, strict=True
        ):
            self.history.append(self._history_record(module, row, score, reason))
        self._warn_of_kept_decays(reasons)

    def _warn_of_kept_decays(self, reasons: Sequence[str | None]) -> None:
        """Log which modules keep their decays and why, in one line if it is the same for all."""
        if self._plan.rank != 0:
            return
        kept = [(m.name, r) for m, r in zip(self.modules, reasons, strict=True) if r is not None]
        if len(kept) == len(reasons) > 1 and len(set(reasons)) == 1:
            kept = [(f"every one of the {len(kept)} modules", kept[0][1])]
        for name, reason in kept:
            logger.warning("update %d: %s keeps its weight decay: %s", self.updates, name, reason)

    def _assign(self, scores: Tensor, valid_indices: Sequence[int]) -> dict[int, float]:
        """Return the decay of each module that has a score, by its index."""
        if self._constant_ratios is not None:
            decays = self.weight_decay * self._constant_ratios
        else:
            decays = assign_decays(
                scores[valid_indices],
                self.weight_decay,
                blocks=[self.modules[i].block for i in valid_indices],
                **self._map,
            )
        return dict(zip(valid_indices, decays.tolist(), strict=True))

    def _warn_of_outlier(self, decays: dict[int, float], scores: Tensor) -> None:
        """Warn once of each module whose score leaves all other decays practically equal."""
        if self._constant_ratios is not None or self._plan.rank != 0:
            return
        position = squeezing_module(torch.tensor(list(decays.values()), dtype=torch.float64))
        if position is None:
            return
        index = list(decays)[position]
        name = self.modules[index].name
        if name not in self._outliers:
            self._outliers.add(name)
            logger.warning(
                "update %d: the %s of %s, %.3g, lies so far from the others that their decays lie "
                "within %.0f %% of the range; the map tb_quantile is not affected by an outlier",
                self.updates, self.metric, name, float(scores[index]), 100 * SQUEEZED,
            )  # fmt: skip

    def _history_record(
        self, module: BalancedModule, row: Sequence[float], score: float, reason: str | None
    ) -> dict[str, Any]:
        """Return one entry of the history, with None for numbers that were not computed."""
        statistics = {
            name: None if math.isnan(value) else value
            for name, value in zip(COLUMNS, row, strict=True)
        }
        return {
            "step": self.updates,
            "module": module.name,
            "type": module.type,
            "block": module.block,
            **statistics,
            "score": None if math.isnan(score) else score,
            "weight_decay": self.weight_decays[module.name],
            "reason": reason,
        }

    # ------------------------------------------------------------------------------- controls

    def _apply_controls(self, decays: dict[int, float]) -> dict[int, float]:
        """Shuffle the decays over the modules and rescale them, as the controls ask for."""
        decays = {
            i: decays[source] for i, source in enumerate(self._shuffle_order) if source in decays
        }
        if self._controls.iso_budget:
            return rescale_to_mean(decays, self._parameter_counts(), self.weight_decay)
        return decays

    def _order_of_decays(self) -> list[int]:
        """Return for each module the index of the module whose decay it takes."""
        seed = self._controls.shuffle_seed
        count = len(self.modules)
        return list(range(count)) if seed is None else permutation(count, seed)

    def _ratios_of_type_constant(self) -> Tensor | None:
        """Return decay / eta of each module for `type_constant`, [M]; None without it."""
        if not self._controls.type_constant:
            return None
        multipliers = self._controls.type_multipliers
        if multipliers is None:
            multipliers = shape_multipliers(
                self.modules, self._map["min_ratio"], self._map["max_ratio"]
            )
        return constant_ratios(self.modules, multipliers)

    def _parameter_counts(self) -> list[int]:
        """Return the number of parameters that each module's weight decay applies to."""
        counts = dict.fromkeys(self.weight_decays, 0)
        for parameter, name in self._module_of_parameter().items():
            counts[name] += parameter.numel()
        return list(counts.values())

    # ----------------------------------------------------------------------------- the groups

    def _module_of_parameter(self) -> dict[nn.Parameter, str]:
        """Return the name of the balanced module whose decay each parameter takes."""
        names: dict[nn.Parameter, str] = {}
        for balanced in self.modules:
            for module in (balanced.module, *self._followers.get(balanced.name, ())):
                for parameter in module.parameters(recurse=False):
                    if parameter.requires_grad:
                        names.setdefault(parameter, balanced.name)
        return names

    def _check_optimizer_covers_model(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if the groups hold foreign parameters or lack a balanced weight."""
        of_model = set(self.model.parameters())
        in_groups: set[nn.Parameter] = set()
        for index, group in enumerate(groups):
            for parameter in group["params"]:
                if parameter not in of_model:
                    raise ValueError(
                        f"group {index} of the optimizer holds a parameter of shape "
                        f"{tuple(parameter.shape)} that is not in the model: give AlphaDecay the "
                        "model that the optimizer trains"
                    )
            in_groups.update(group["params"])
        for module in self.modules:
            if module.weight not in in_groups:
                raise ValueError(
                    f"the optimizer does not hold the weight of {module.name}: "
                    "build it with all of the model's parameters"
                )

    def _write_decays(self, optimizer: Optimizer) -> None:
        """Write the current decays to the optimizer's groups."""
        check_has_weight_decay(optimizer)
        in_optimizer = {group.get("module") for group in optimizer.param_groups}
        missing = [name for name in self.weight_decays if name not in in_optimizer]
        if missing:
            raise ValueError(
                f"the optimizer has no group for {missing[0]}: "
                "build it with decay.param_groups() or call decay.attach(optimizer)"
            )
        # A module has several groups if its weight and its bias are optimized differently.
        for group in optimizer.param_groups:
            if group.get("module") is not None:
                group["weight_decay"] = self.weight_decays[group["module"]]
        self._groups_up_to_date = True

    def _settings_that_ranks_share(self) -> list[str]:
        """Return what must be equal on all ranks: device and settings, one text for each."""
        settings = {
            "every": self.every,
            "lag": self._lag,
            "metric": self.metric,
            "eta": self.weight_decay,
            **self._map,
            **self._fit,
            **vars(self._controls),
        }
        device = next(iter(self.model.parameters())).device.type
        return [f"device {device}", *(f"{name}={value}" for name, value in settings.items())]


def _check_keywords(more: MoreSettings) -> None:
    """Raise TypeError for a keyword argument that AlphaDecay does not have."""
    for name in more:
        if name not in MoreSettings.__annotations__:
            known = ", ".join(MoreSettings.__annotations__)
            raise TypeError(f"AlphaDecay got an unexpected keyword argument {name!r}: use {known}")


def _controls_from_old_keywords(more: MoreSettings, controls: Controls | None) -> Controls:
    """Return the controls, which may be given by their old keyword arguments.

    Raises:
        TypeError: controls were given in both ways.
    """
    old = {name: value for name, value in more.items() if name in Controls.__dataclass_fields__}
    if not old:
        return controls if controls is not None else Controls()
    if controls is not None:
        raise TypeError(
            f"AlphaDecay got controls and {', '.join(old)}: give all of them in controls"
        )
    arguments = ", ".join(f"{name}={value!r}" for name, value in old.items())
    warn_deprecated(
        f"AlphaDecay({arguments})", f"controls=alphadecay.Controls({arguments})", stacklevel=4
    )
    return Controls(**old)  # type: ignore[arg-type]


def _check_settings(
    weight_decay: float,
    min_ratio: float,
    max_ratio: float,
    every: int,
    lag: int,
    xmin_pos: float,
) -> None:
    """Raise ValueError for a number that is out of its range."""
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay is {weight_decay}: it must be a finite number, 0 or more")
    if not 0 <= min_ratio <= max_ratio or not math.isfinite(max_ratio):
        raise ValueError(
            "the ratios are out of order: 0 <= min_ratio <= max_ratio must hold, "
            f"not {min_ratio} and {max_ratio}"
        )
    if not (isinstance(every, int) and every >= 1):
        raise ValueError(f"every is {every}: it must be a whole number of updates, 1 or more")
    if not 0 <= lag < every:
        raise ValueError(
            f"lag is {lag}: an analysis must end before the next one begins, "
            f"so 0 <= lag < every ({every}) must hold"
        )
    if not xmin_pos > 1:
        raise ValueError(
            f"xmin_pos is {xmin_pos}: it must be above 1 (2 fits the upper half of the spectrum)"
        )


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError, with the choices, for a value that is not one of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")
