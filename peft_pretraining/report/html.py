"""The report of a run: one self-contained HTML page.

    python -m peft_pretraining.report RUN                    writes RUN/report.html
    python -m peft_pretraining.report RUN OTHER_RUN [...]    writes RUN/comparison.html

A report shows the loss and the alpha and decay of every module over time; a comparison shows runs
side by side. Both read only run.json, metrics.jsonl and modules.jsonl, so they work while a run is
still going, and on a machine without an accelerator. The figures are vector graphics inside the
page, which fetches nothing when it is opened.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from peft_pretraining.errors import UserError
from peft_pretraining.records.reader import (
    EVALUATION_FIELDS,
    Modules,
    Run,
    column,
    final_evaluation,
    number,
    read_runs,
    section,
)
from peft_pretraining.report.labels import label_runs
from peft_pretraining.report.plots import (
    accuracies,
    accuracy_figure,
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
from peft_pretraining.utils.files import atomic_write


def definition(name: str) -> str:
    """Return the name of a statistic, with an explanation for a caption."""
    return "α, the power-law exponent of the weight's spectrum," if name == "α" else name


def format_number(value: float, pattern: str = "{:.4f}") -> str:
    """Format a number for a table; an en dash if it is not finite."""
    return pattern.format(value) if math.isfinite(value) else "–"


# ---------------------------------------------------------------------------------------- the page


def escape(value: Any) -> str:
    """Return any value as HTML text."""
    return html.escape(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Return an HTML table of plain texts, which are escaped here.

    Args:
        head: Texts of the head; empty for a table without one.
        rows: Texts of the rows. The first column holds names.
        kind: The CSS class.
    """
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
    """Return a numbered figure with its caption, which is plain text."""
    title = f"<b>Figure {position}.</b> {escape(caption)}"
    return f"<figure>{svg}<figcaption>{title}</figcaption></figure>"


def method_name(run: Run) -> str:
    """Describe the method: as the arguments name it, or from what the records show."""
    given = run.info.get("method") or run.argument("method", "decay_method")
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


def method_line(run: Run) -> str:
    """Return the paragraph that describes what the run's method does; "" if it is not recorded."""
    details = run.info.get("method_details")
    if not isinstance(details, str):
        return ""
    return f'<p class="lead">{escape(method_name(run))}: {escape(details)}</p>'


def accuracy_html(runs: Sequence[Run], position: int) -> str:
    """Return the figure of the validation accuracies; "" for language models."""
    shown = [run for run in runs if accuracies(run)]
    if not shown:
        return ""
    caption = "Validation accuracy."
    if len(shown) > 1:
        caption = "Top-1 validation accuracy; dashed: of the moving average of the weights."
    return figure_html(position, as_svg(accuracy_figure, f"f{position}", shown), caption)


def run_line(run: Run) -> str:
    """Describe a run in a line: model, size, method, optimizer, eta, updates, data, device."""
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
    """Return mean seconds of an analysis, and the share of all analyses in the time of the run.

    nan if run.json has no summary, or no module was analysed.
    """
    summary = section(run.info, "summary")
    if run.modules is None:
        return math.nan, math.nan
    return number(summary, "analysis_seconds") / (number(summary, "analyses") or math.nan), number(
        summary, "analysis_share"
    )


def result_rows(run: Run) -> list[tuple[str, str]]:
    """Return name and value of each row of the table of results."""
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
        rows.append((f"{word} validation loss", format_number(number(evaluation, "eval_loss"))))
        rows.append(
            (
                f"{word} validation perplexity",
                format_number(number(evaluation, "perplexity"), "{:.2f}"),
            )
        )
        rows.append(
            (
                "reference perplexity ¹",
                format_number(number(evaluation, "reference_perplexity"), "{:.2f}"),
            )
        )
        rows += [(key, format_number(number(evaluation, key))) for key in other_results(evaluation)]
    rows.append((f"{run.unit} seen", format_number(total_items_seen(run), "{:,.0f}")))
    rows.append((f"{run.unit} per second", format_number(throughput(run), "{:,.0f}")))
    rows.append(("MFU", format_number(100 * utilisation(run), "{:.1f} %")))
    rows.append(("seconds of one analysis", format_number(seconds, "{:.3g}")))
    rows.append(("analysis, share of the run", format_number(100 * share, "{:.2g} %")))
    return [row for row in rows if row[1] != "–"]


def other_results(evaluation: dict[str, Any]) -> list[str]:
    """Return the fields of an evaluation that are shown under their own names, as accuracies."""
    return [key for key in evaluation if key not in EVALUATION_FIELDS]


def reference_note(runs: Sequence[Run]) -> str:
    """Return the footnote on reference perplexity, or nothing if no run has one."""
    if not any(
        math.isfinite(number(final_evaluation(run) or {}, "reference_perplexity")) for run in runs
    ):
        return ""
    text = (
        "The reference implementation's evaluation counts one batch too many and reports "
        "exp(L·n/(n+1)) for n batches of mean loss L; given only to compare with published tables."
    )
    return f'<p class="note">¹ {escape(text)}</p>'


def module_figures(run: Run, position: int) -> str:
    """Return the figures of the modules, numbered from `position`, or why there are none."""
    modules = run.modules
    if modules is None:
        return (
            "<p>No figures of single modules: this run set no decay by module "
            "(modules.jsonl is empty or missing).</p>"
        )
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
                f"{definition(name)} and decay of every balanced module by type, at this run's "
                f"only analysis.{dashed}",
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
                f"Decay of every balanced module{' in units of η (dashed)' if base else ''}. "
                f"{lines}",
            )
        )
    if np.isfinite(decays[-1]).any():
        svg = as_svg(heat_map_figure, f"f{position + len(parts)}", run, modules)
        rest = "" if modules.balanced.all() else " Without colour: not balanced, keeps η."
        parts.append(
            (
                svg,
                f"Decays (colour) and {name} (number) of every module, "
                f"{analysis_time_label(modules.steps[-1])}.{rest}",
            )
        )
    if np.isfinite(values).any():
        svg = as_svg(depth_figure, f"f{position + len(parts)}", run, modules)
        when = "first and the last" if len(modules.steps) > 1 else "only"
        parts.append((svg, f"{name} of every module against depth at the {when} analysis."))
    return "".join(
        figure_html(position + i, svg, caption) for i, (svg, caption) in enumerate(parts)
    ) + flagged_modules(modules)


def flagged_modules(modules: Modules, max_rows: int = 40) -> str:
    """Return a table of the modules whose alpha was undefined, and why; "" if there are none."""
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
        f'<p class="note">and {len(rows) - max_rows} more in modules.jsonl</p>'
        if len(rows) > max_rows
        else ""
    )
    return (
        "<h2>Modules without alpha</h2>"
        + table(("module", "why", "updates", "last at"), rows[:max_rows], "texts")
        + more
    )


def details(run: Run, summary: str) -> str:
    """Return all of run.json in a collapsible section."""
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
    tables = []
    for title, values in parts:
        rows = [
            (str(key), value if isinstance(value, str) else json.dumps(value, default=str))
            for key, value in values.items()
        ]
        if rows:
            tables.append(f"<h3>{escape(title)}</h3>" + table((), rows, "texts"))
    return f"<details><summary>{escape(summary)}</summary>{''.join(tables)}</details>"


def loss_caption(runs: Sequence[Run]) -> str:
    """Return the end of a loss figure's caption, which says what lies outside of its frame."""
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
    """Return the body of the report of one run."""
    lower = " Below: the learning rate." if np.isfinite(column(run.training, "lr")).any() else ""
    parts = [
        f'<h1>{escape(run.label)}</h1><p class="lead">{escape(run_line(run))}</p>',
        method_line(run),
        table((), result_rows(run)),
        reference_note([run]),
        figure_html(
            1,
            as_svg(loss_figure, "f1", run),
            f"Training and validation loss.{lower}{loss_caption([run])}",
        ),
        accuracy_html([run], 2),
        module_figures(run, 3 if accuracies(run) else 2),
        details(run, "All arguments, model config and versions"),
    ]
    return "\n".join(parts)


def differing_arguments(runs: Sequence[Run]) -> list[list[str]]:
    """Return [argument, value in each run] for each argument in which the runs differ."""
    arguments = [section(run.info, "arguments") for run in runs]
    names = dict.fromkeys(name for one in arguments for name in one)
    rows = [
        [name] + [json.dumps(one[name], default=str) if name in one else "–" for one in arguments]
        for name in names
    ]
    return [row for row in rows if len(set(row[1:])) > 1]


def comparison_row(run: Run) -> dict[str, str]:
    """Return the row of a run in the table of results, by column name."""
    evaluation, (seconds, share) = final_evaluation(run) or {}, analysis_cost(run)
    return {
        "run": run.label,
        "method": method_name(run),
        "update": f"{int(evaluation['update_step']):,}" if evaluation else "–",
        "validation loss": format_number(number(evaluation, "eval_loss")),
        "perplexity": format_number(number(evaluation, "perplexity"), "{:.2f}"),
        "reference perplexity ¹": format_number(
            number(evaluation, "reference_perplexity"), "{:.2f}"
        ),
        **{key: format_number(number(evaluation, key)) for key in other_results(evaluation)},
        f"{run.unit}/s": format_number(throughput(run), "{:,.0f}"),
        "MFU": format_number(100 * utilisation(run), "{:.1f} %"),
        "s per analysis": format_number(seconds, "{:.3g}"),
        "share": format_number(100 * share, "{:.2g} %"),
    }


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the body of a comparison: results, figure, and arguments in which the runs differ."""
    rows = [comparison_row(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = [name for name in columns if any(row.get(name, "–") != "–" for row in rows)]
    results = [[row.get(name, "–") for name in head] for row in rows]
    unfinished = [
        run.label for run in runs if (final_evaluation(run) or {}).get("final") is not True
    ]
    differences = differing_arguments(runs)
    caption = (
        f"Losses, validation loss minus that of {runs[0].label}, parameter-weighted mean decay, "
        "and learning rate."
    )
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
        accuracy_html(runs, 2),
        "<h2>Arguments that differ</h2>"
        if differences
        else "<p>The runs' arguments are the same.</p>",
        table(("argument", *(run.label for run in runs)), differences, "texts")
        if differences
        else "",
        *(details(run, f"All arguments, model config and versions of {run.label}") for run in runs),
    ]
    return "\n".join(parts)


CSS = """
:root {
  color-scheme: light dark; --page: #fff; --text: #1a1a1a; --faint: #5f6368; --rule: #d9d9d9;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #17191c; --text: #e6e6e6; --faint: #a0a4a8; --rule: #3a3d42; }
}
@media print {
  :root { --page: #fff; --text: #000; --faint: #444; --rule: #bbb; } body { padding: 0; }
}
body {
  background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif;
  max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 4rem;
}
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; }
.lead { margin: 0 0 .4rem; color: var(--faint); }
.note { color: var(--faint); font-size: .85rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
table { border-top: 1.5px solid; border-bottom: 1.5px solid; }
th, td {
  padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere;
}
tbody th { font-weight: normal; }
thead th { border-bottom: 1px solid; font-weight: 600; }
td { text-align: right; }
thead th:not(:first-child) { text-align: right; }
td:last-child, th:last-child { padding-right: 0; }
.results td, .results th { overflow-wrap: normal; }
.results td:nth-child(2), .results th:nth-child(2) { text-align: left; }
.texts td, .texts thead th:not(:first-child) { text-align: left; }
.texts { font-size: .85rem; width: 100%; }
figure { margin: 2.2rem 0; break-inside: avoid; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--faint); margin-top: .4rem; }
details { margin-top: 2rem; }
summary { cursor: pointer; }
"""


def page(title: str, body: str) -> str:
    """Return a whole HTML document around `body`."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{CSS}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


# ----------------------------------------------------------------------------------------- writing


def write_report(
    run_folder: Path | str, *others: Path | str, output: Path | str | None = None
) -> Path:
    """Write the report of a run, or a comparison of several runs.

    A run that cannot be read, because it has no metrics yet or an invalid line (an incomplete last
    line is ignored), is left out of a comparison, and the log and the page say so.

    Args:
        run_folder: The folder of a run, with run.json, metrics.jsonl and perhaps modules.jsonl.
        others: The folders of further runs.
        output: The file to write. By default report.html in the folder of the run; for several
            runs, comparison.html in the folder of the first.

    Returns:
        The file that was written.

    Raises:
        UserError: A folder is not that of a run, no run can be read, or the output cannot be
            written.
    """
    runs, problems = read_runs((run_folder, *others))
    for problem in problems:
        logger.warning(f"left out: {problem}")
    label_runs(runs)
    path = Path(run_folder) / ("comparison.html" if others else "report.html")
    if output is not None:
        path = Path(output)
    body = comparison_page(runs) if len(runs) > 1 else single_page(runs[0])
    if problems:
        body += f'<p class="note">Left out: {escape(" ".join(problems))}</p>'
    text = page(" vs. ".join(run.label for run in runs), body)
    try:
        atomic_write(path, text, durable=False)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None
    return path
