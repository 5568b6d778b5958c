"""A run's report: one self-contained HTML page with the loss curve and the alpha and decay of every module over time.

    python -m peft_pretraining.report RUN                          writes RUN/report.html
    python -m peft_pretraining.report RUN OTHER_RUN [...]          writes RUN/comparison.html: the runs side by side

It reads what the training scripts leave behind (run.json, metrics.jsonl, modules.jsonl) and nothing else, so it works while a run is
still going and on a machine without an accelerator. Figures are vector graphics inside the page; nothing is fetched when it is opened.
"""

from __future__ import annotations

import html
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_pretraining.errors import UserError

if (
    TYPE_CHECKING
):  # matplotlib takes a second to import: the functions that draw import it themselves
    pass
from peft_pretraining.records.reader import (
    EVALUATION_FIELDS,
    Modules,
    Run,
    column,
    final_evaluation,
    number,
    read_run,
    section,
)
from peft_pretraining.report.plots import (
    analysis_time_label,
    as_svg,
    by_type_figure,
    comparison_figure,
    decay_in_eta,
    depth_figure,
    heat_map_figure,
    last_update,
    loss_figure,
    loss_limits,
    over_time_figure,
    short_number,
    shown_statistic,
    throughput,
    total_items_seen,
    utilisation,
)


def definition(name: str) -> str:
    """A statistic's name as a caption introduces it."""
    return "α, the power-law exponent of the weight's spectrum," if name == "α" else name


def shown(value: float, pattern: str = "{:.4f}") -> str:
    """A number for a table, or an en dash where there is none."""
    return pattern.format(value) if math.isfinite(value) else "–"


# --------------------------------------------------------------------------------------------------------------------- the page


def escape(value: Any) -> str:
    """Any value as HTML text."""
    return html.escape(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """An HTML table of plain texts, escaped here; the first column holds names."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr><th>"
        + escape(row[0])
        + "</th>"
        + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<table class="{kind}">'
        + (f"<thead><tr>{top}</tr></thead>" if top else "")
        + f"<tbody>{body}</tbody></table>"
    )


def figure_html(position: int, svg: str, caption: str) -> str:
    """A numbered figure with its caption (plain text)."""
    return f"<figure>{svg}<figcaption><b>Figure {position}.</b> {escape(caption)}</figcaption></figure>"


def method_name(run: Run) -> str:
    """The method in words: what the arguments call it, or what the files show."""
    given = run.argument("method", "decay_method")
    if isinstance(given, str):
        return given
    if run.modules is None:
        means = column(run.training, "weight_decay")
        means = means[np.isfinite(means)]
        if len(means) and np.ptp(means) > 1e-6 * abs(means).max():
            return "one decay for the whole network, changing over time"
        return "no weight decay" if run.eta == 0 else "uniform weight decay"
    bounds = [run.argument("wd_min_ratio"), run.argument("wd_max_ratio")]
    details = [
        str(part)
        for part in (run.argument("esd_metric_for_tb"), run.argument("assign_func"))
        if part
    ]
    details += [f"{bounds[0]} η to {bounds[1]} η"] if None not in bounds else []
    return "decay by module" + (f" ({', '.join(details)})" if details else "")


def run_line(run: Run) -> str:
    """One line that says what the run was: model, size, method, optimizer, eta, updates, data, device."""
    model = run.argument("model_config", "model", "model_name") or section(
        run.info, "model_config"
    ).get("model_type")
    parts = [Path(model).stem if isinstance(model, str) and model.endswith(".json") else model]
    size, eta, planned = number(run.info, "parameters"), run.eta, run.argument("num_training_steps")
    parts.append(
        f"{short_number(float(f'{size:.3g}'))} parameters" if math.isfinite(size) else None
    )
    parts += [method_name(run), run.argument("optimizer")]
    parts.append(f"η = {eta:g}" if math.isfinite(eta) else None)
    done = last_update(run)
    parts.append(
        f"{done:,} of {planned:,} updates"
        if isinstance(planned, int) and planned != done
        else f"{done:,} updates"
    )
    seen = total_items_seen(run)
    parts.append(
        f"{short_number(float(f'{seen:.3g}'))} {run.unit}" if math.isfinite(seen) else None
    )
    parts.append(run.info.get("device"))
    return " · ".join(
        part if isinstance(part, str) else escape(part) for part in parts if part is not None
    )


def analysis_cost(run: Run) -> tuple[float, float]:
    """(mean seconds of one analysis, share of the run's time), nan where run.json has no summary or no module was analysed."""
    summary = section(run.info, "summary")
    if run.modules is None:
        return math.nan, math.nan
    return number(summary, "analysis_seconds") / (number(summary, "analyses") or math.nan), number(
        summary, "analysis_share"
    )


def result_rows(run: Run) -> list[tuple[str, str]]:
    """(name, value) of each line in the result table."""
    evaluation, (seconds, share) = final_evaluation(run), analysis_cost(run)
    rows: list[tuple[str, str]] = []
    if evaluation is None:
        rows.append(("validation", "not evaluated yet"))
    else:
        word = (
            "final"
            if evaluation.get("final") is True
            else f"latest (update {int(evaluation['update_step']):,})"
        )
        rows.append((f"{word} validation loss", shown(number(evaluation, "eval_loss"))))
        rows.append(
            (f"{word} validation perplexity", shown(number(evaluation, "perplexity"), "{:.2f}"))
        )
        rows.append(
            ("reference perplexity ¹", shown(number(evaluation, "reference_perplexity"), "{:.2f}"))
        )
        rows += [(key, shown(number(evaluation, key))) for key in other_results(evaluation)]
    rows.append((f"{run.unit} seen", shown(total_items_seen(run), "{:,.0f}")))
    rows.append((f"{run.unit} per second", shown(throughput(run), "{:,.0f}")))
    rows.append(("MFU", shown(100 * utilisation(run), "{:.1f} %")))
    rows.append(("seconds of one analysis", shown(seconds, "{:.3g}")))
    rows.append(("analysis, share of the run", shown(100 * share, "{:.2g} %")))
    return [row for row in rows if row[1] != "–"]


def other_results(evaluation: dict[str, Any]) -> list[str]:
    """The fields of an evaluation that are shown under their own names, as accuracies are."""
    return [key for key in evaluation if key not in EVALUATION_FIELDS]


def reference_note(runs: Sequence[Run]) -> str:
    """The footnote on reference perplexity, where any run has one."""
    if not any(
        math.isfinite(number(final_evaluation(run) or {}, "reference_perplexity")) for run in runs
    ):
        return ""
    text = (
        "The reference implementation's evaluation counts one batch too many and reports exp(L·n/(n+1)) for n batches of mean loss L; "
        "given only to compare with published tables."
    )
    return f'<p class="note">¹ {escape(text)}</p>'


def module_figures(run: Run, position: int) -> str:
    """Figures about the modules, numbered from `position`; a sentence where the run has none."""
    modules = run.modules
    if modules is None:
        return "<p>No figures of single modules: this run set no decay by module (modules.jsonl is empty or missing).</p>"
    name, values = shown_statistic(run, modules)
    decay_name, decays = decay_in_eta(run, modules)
    base = 1.0 if run.eta > 0 else None
    drawn = modules.balanced.any() and np.isfinite(values[:, modules.balanced]).any()
    parts: list[tuple[str, str]] = []
    if drawn and len(modules.steps) == 1:
        strip = as_svg(
            by_type_figure,
            f"f{position}",
            modules,
            [(name, values, None), (decay_name, decays, base)],
        )
        dashed = " Dashed: η." if base else ""
        parts.append(
            (
                strip,
                f"{definition(name)} and decay of every balanced module by type, at this run's only analysis.{dashed}",
            )
        )
    elif drawn:
        lines = "One line for each module, coloured by depth; thick: the mean of the type."
        svg = as_svg(over_time_figure, f"f{position}", modules, values, name, None)
        parts.append((svg, f"{definition(name)} of every balanced module. {lines}"))
        svg = as_svg(over_time_figure, f"f{position + 1}", modules, decays, decay_name, base)
        parts.append(
            (
                svg,
                f"Decay of every balanced module{' in units of η (dashed)' if base else ''}. {lines}",
            )
        )
    if np.isfinite(decays[-1]).any():
        svg = as_svg(heat_map_figure, f"f{position + len(parts)}", run, modules)
        rest = "" if modules.balanced.all() else " Without colour: not balanced, keeps η."
        parts.append(
            (
                svg,
                f"Decays (colour) and {name} (number) of every module, {analysis_time_label(modules.steps[-1])}.{rest}",
            )
        )
    if np.isfinite(values).any():
        svg = as_svg(depth_figure, f"f{position + len(parts)}", run, modules)
        when = "first and the last" if len(modules.steps) > 1 else "only"
        parts.append((svg, f"{name} of every module against depth at the {when} analysis."))
    return "".join(
        figure_html(position + i, svg, caption) for i, (svg, caption) in enumerate(parts)
    ) + flagged_modules(modules)


def flagged_modules(modules: Modules, most: int = 40) -> str:
    """A table of the modules whose alpha was undefined, and why; nothing where there are none."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, step, reason in modules.reasons:
        groups.setdefault((name, reason), []).append(step)
    if not groups:
        return ""
    rows = [
        (name, reason, f"{len(steps)} of {len(modules.steps)}", f"{steps[-1]:,}")
        for (name, reason), steps in groups.items()
    ]
    more = (
        f'<p class="note">and {len(rows) - most} more in modules.jsonl</p>'
        if len(rows) > most
        else ""
    )
    return (
        "<h2>Modules without alpha</h2>"
        + table(("module", "why", "updates", "last at"), rows[:most], "texts")
        + more
    )


def details(run: Run, summary: str) -> str:
    """Everything run.json says, folded away."""
    info = run.info
    named = ("arguments", "model_config", "versions", "summary")
    parts = [
        (
            "run",
            {
                "folder": run.folder.name,
                **{key: value for key, value in info.items() if key not in named},
            },
        )
    ]
    parts += [(key.replace("_", " "), section(info, key)) for key in named]
    tables = [
        f"<h3>{escape(title)}</h3>" + table((), [(str(key), value if isinstance(value, str) else json.dumps(value, default=str))
                                                for key, value in values.items()], "texts")
        for title, values in parts if values
    ]  # fmt: skip
    return f"<details><summary>{escape(summary)}</summary>{''.join(tables)}</details>"


def loss_caption(runs: Sequence[Run]) -> str:
    """The caption's second half of a loss figure: what lies outside its frame."""
    limits = loss_limits(runs)
    highest = max(
        (value for run in runs for value in column(run.training, "loss") if math.isfinite(value)),
        default=math.nan,
    )
    return (
        f" The first updates (loss up to {highest:.2f}) lie above the frame."
        if limits and highest > limits[1]
        else ""
    )


def single_page(run: Run) -> str:
    """The body of one run's report."""
    lower = " Beneath: the learning rate." if np.isfinite(column(run.training, "lr")).any() else ""
    parts = [
        f'<h1>{escape(run.label)}</h1><p class="lead">{escape(run_line(run))}</p>',
        table((), result_rows(run)),
        reference_note([run]),
        figure_html(
            1,
            as_svg(loss_figure, "f1", run),
            f"Training and validation loss.{lower}{loss_caption([run])}",
        ),
        module_figures(run, 2),
        details(run, "All arguments, model config and versions"),
    ]
    return "\n".join(parts)


def differing_arguments(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (argument, value in each run) of the arguments in which the runs differ."""
    arguments = [section(run.info, "arguments") for run in runs]
    names = dict.fromkeys(name for one in arguments for name in one)
    rows = [
        [name] + [json.dumps(one[name], default=str) if name in one else "–" for one in arguments]
        for name in names
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


def comparison_row(run: Run) -> dict[str, str]:
    """What the table of results says of a run, by the names of its columns."""
    evaluation, (seconds, share) = final_evaluation(run) or {}, analysis_cost(run)
    return {
        "run": run.label,
        "method": method_name(run),
        "update": f"{int(evaluation['update_step']):,}" if evaluation else "–",
        "validation loss": shown(number(evaluation, "eval_loss")),
        "perplexity": shown(number(evaluation, "perplexity"), "{:.2f}"),
        "reference perplexity ¹": shown(number(evaluation, "reference_perplexity"), "{:.2f}"),
        **{key: shown(number(evaluation, key)) for key in other_results(evaluation)},
        f"{run.unit}/s": shown(throughput(run), "{:,.0f}"),
        "MFU": shown(100 * utilisation(run), "{:.1f} %"),
        "s per analysis": shown(seconds, "{:.3g}"),
        "share": shown(100 * share, "{:.2g} %"),
    }


def comparison_page(runs: Sequence[Run]) -> str:
    """The body of a report of several runs: results, what differs, and the curves over one another."""
    rows = [comparison_row(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = [name for name in columns if any(row.get(name, "–") != "–" for row in rows)]
    results = [[row.get(name, "–") for name in head] for row in rows]
    unfinished = [
        run.label for run in runs if (final_evaluation(run) or {}).get("final") is not True
    ]
    differences = differing_arguments(runs)
    caption = f"Losses, validation loss minus that of {runs[0].label}, parameter-weighted mean decay, and learning rate."
    parts = [
        f"<h1>{escape(' vs. '.join(run.label for run in runs))}</h1>",
        *(
            f'<p class="lead"><b>{escape(run.label)}</b>: {escape(run_line(run))}</p>'
            for run in runs
        ),
        "<h2>Final validation</h2>" + table(head, results, "results"),
        f'<p class="note">Latest, not final, evaluation: {escape(", ".join(unfinished))}.</p>'
        if unfinished
        else "",
        reference_note(runs),
        figure_html(1, as_svg(comparison_figure, "f1", runs), caption + loss_caption(runs)),
        "<h2>Arguments that differ</h2>"
        if differences
        else "<p>The runs' arguments are the same.</p>",
        table(("argument", *(run.label for run in runs)), differences, "texts")
        if differences
        else "",
        *(details(run, f"All arguments, model config and versions of {run.label}") for run in runs),
    ]
    return "\n".join(parts)


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    css = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --faint: #5f6368; --rule: #d9d9d9; }
@media (prefers-color-scheme: dark) { :root { --page: #17191c; --text: #e6e6e6; --faint: #a0a4a8; --rule: #3a3d42; } }
@media print { :root { --page: #fff; --text: #000; --faint: #444; --rule: #bbb; } body { padding: 0; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif;
       max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
.lead { margin: 0 0 .4rem; color: var(--faint); } .note { color: var(--faint); font-size: .85rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
table { border-top: 1.5px solid; border-bottom: 1.5px solid; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; } tbody th { font-weight: normal; }
thead th { border-bottom: 1px solid; font-weight: 600; } td { text-align: right; } thead th:not(:first-child) { text-align: right; }
td:last-child, th:last-child { padding-right: 0; }
.results td, .results th { overflow-wrap: normal; } .results td:nth-child(2), .results th:nth-child(2) { text-align: left; }
.texts td, .texts thead th:not(:first-child) { text-align: left; } .texts { font-size: .85rem; width: 100%; }
figure { margin: 2.2rem 0; break-inside: avoid; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--faint); margin-top: .4rem; } details { margin-top: 2rem; } summary { cursor: pointer; }
"""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{css}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


# ------------------------------------------------------------------------------------------------------------------- the command


def write_atomically(path: Path, text: str) -> None:
    """Write the file under a temporary name and rename it: a reader sees the old page or the new one, never half of one."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None


def make_labels_unique(runs: Sequence[Run]) -> None:
    """Give runs of the same name labels that tell them apart: the folder's name, and a number where that is the same too."""
    for label_of in (
        lambda run, i: run.folder.resolve().name,
        lambda run, i: f"{run.label} #{i + 1}",
    ):
        labels = [run.label for run in runs]
        for i, run in enumerate(runs):
            if labels.count(run.label) > 1:
                run.label = label_of(run, i)


def write_report(
    run_folder: Path | str, *others: Path | str, output: Path | str | None = None
) -> Path:
    """Write the report of a run, or of several side by side, and return its path.

    run_folder, others: folders that hold run.json, metrics.jsonl and perhaps modules.jsonl.
    output: the file to write; by default report.html in the run's folder, or comparison.html in the first run's folder for several.
    Raises UserError for a folder that is no run, a run without metrics, a broken line (a torn last line is left out) and a path that
    cannot be written.
    """
    runs = [read_run(folder) for folder in (run_folder, *others)]
    make_labels_unique(runs)
    path = (
        Path(output)
        if output is not None
        else Path(run_folder) / ("comparison.html" if others else "report.html")
    )
    body = comparison_page(runs) if others else single_page(runs[0])
    write_atomically(path, page(" vs. ".join(run.label for run in runs), body))
    return path
