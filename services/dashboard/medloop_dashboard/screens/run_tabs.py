"""The tabs of one run. Each draws itself from what the run left in MLflow and raises what keeps it from doing so."""

import pandas as pd
import streamlit as st
from medloop.data.manifest import SPLITS
from medloop.schemas import EvaluationReport, ExplainedImage

from medloop_dashboard import charts
from medloop_dashboard.previews import Preview, preview
from medloop_dashboard.quality import HOW_TO_READ, METHOD_NAMES, quality_lines
from medloop_dashboard.reports import (
    EXPLANATION_INDEX,
    EXPLANATIONS,
    FOLDER,
    class_table,
    evaluated_splits,
    figure_table,
    mistake_pictures,
    quality_table,
    read_explanations,
    read_report,
    reliability_table,
    served_notes,
)
from medloop_dashboard.runs import RunDetail, VersionRow, tree
from medloop_dashboard.screens import cached
from medloop_dashboard.wording import file_size, moment, percent, plain, short

_PICTURE_PIXELS = 180
_EXPLAINED_PIXELS = 240
_PICTURES_A_ROW = 6
_FILE_PIXELS = 440
_QUANTITIES = {"auc": "AUC"}
_INDENT = "\u2003"  # an em space: a table cell keeps it


def metrics(model: str, row: VersionRow) -> None:
    detail = cached.detail(row.run_id)
    took = f", {detail.seconds:.0f} s" if detail.seconds is not None else ""
    st.caption(plain(f"Run {detail.run_id}, {detail.status.lower()}, started {moment(detail.started_at)}{took}."))
    st.subheader("By epoch", anchor=False)
    if detail.curves:
        _show_curves(detail)
    else:
        st.caption("This run has no figures by epoch, or only one epoch.")
    left, right = st.columns([2, 3], gap="large")
    with left:
        st.subheader("Last values", anchor=False)
        values = {name: value for name, value in sorted(detail.metrics.items()) if not name.endswith(("_low", "_high"))}
        st.dataframe(
            pd.DataFrame({"Metric": list(values), "Value": [f"{value:.6g}" for value in values.values()]}),
            hide_index=True,
            height="content",
            alt="Last value of every metric",
        )
        st.caption("As logged, shares as fractions. Intervals stand in the tab Evaluation.")
    with right:
        st.subheader("Settings", anchor=False)
        st.dataframe(
            pd.DataFrame(sorted(detail.params.items()), columns=["Setting", "Value"]),
            hide_index=True,
            height="content",
            alt="Settings of the training",
        )


def _show_curves(detail: RunDetail) -> None:
    """One chart for each quantity: `train_loss` and `val_loss` share one."""
    groups: dict[str, list[str]] = {}
    for name in detail.curves:
        groups.setdefault(name.removeprefix("train_").removeprefix("val_"), []).append(name)
    columns = st.columns(3, gap="medium")
    for place, (quantity, names) in enumerate(sorted(groups.items())):
        frame = pd.DataFrame(
            [(name, step, value) for name in names for step, value in detail.curves[name]],
            columns=["metric", "epoch", "value"],
        )
        with columns[place % 3]:
            title = _QUANTITIES.get(quantity, quantity.replace("_", " ").capitalize())
            st.altair_chart(charts.curves(frame, title), alt=f"{title} by epoch")


def artifacts(model: str, row: VersionRow) -> None:
    files = cached.files(row.run_id)
    if not files:
        st.info("This run has no files.")
        return
    table, shown = st.columns(2, gap="large")
    with table:
        lines = [(_INDENT * depth + name, file_size(size)) for depth, name, size in tree(files)]
        st.dataframe(
            pd.DataFrame(lines, columns=["File", "Size"]),
            hide_index=True,
            height=560,
            column_config={"File": st.column_config.TextColumn(width=_FILE_PIXELS)},
            alt="Files of the run, by folder",
        )
        st.caption(f"{len(files)} files, {file_size(sum(file.size for file in files))}.")
    with shown:
        by_path = {file.path: file for file in files}
        first = next((i for i, file in enumerate(files) if file.path.endswith("report.json")), 0)
        path = st.selectbox("Preview", list(by_path), index=first, key=f"preview-{row.version}")
        found = preview(by_path[path], lambda: cached.artifact(row.run_id, path))
        _show_preview(found)


def _show_preview(found: Preview) -> None:
    match found.kind:
        case "image":
            st.image(found.data, width="content", alt=found.file.path)
        case "json":
            st.json(found.document, expanded=1)
        case "table":
            st.dataframe(found.table, hide_index=True, alt=found.file.path)
        case "text":
            st.code(found.text, language=None)
        case "none":
            st.info(plain(found.text))
    if found.note:
        st.caption(found.note)


def evaluation(model: str, row: VersionRow) -> None:
    files = cached.files(row.run_id)
    splits = evaluated_splits(files)
    if not splits:
        st.info(plain(f"Version {row.version} was not evaluated yet. Run: medloop evaluate {model} {row.version}"))
        return
    split = splits[0] if len(splits) == 1 else st.segmented_control("Split", splits, default=splits[0], required=True)
    report = read_report(cached.artifact(row.run_id, f"{FOLDER}/{split}/report.json"))
    st.caption(
        plain(
            f"{report.images} images of split {report.split}, data set version {short(report.model.dataset_id)}; "
            f"{report.model.engine} {report.model.precision}; {moment(report.created_at)}."
        )
    )
    _show_figures(report)
    _show_worst(row.run_id, report)


def _show_figures(report: EvaluationReport) -> None:
    left, right = st.columns([5, 4], gap="large")
    with left:
        st.subheader("Metrics with 95 % intervals", anchor=False)
        st.dataframe(figure_table(report.metrics), hide_index=True, alt="Metrics with their 95 % intervals")
        if report.leaks:
            _show_leak_line(report)
        _show_served(report)
    with right:
        st.subheader("Confusion matrix", anchor=False)
        st.altair_chart(charts.confusion(report.confusion, report.classes), alt="Confusion matrix")
        st.caption("Images of each true class (row) by the class they were called (column); shade: share of the row.")
    st.subheader("By class", anchor=False)
    st.dataframe(class_table(report), hide_index=True, alt="Metrics of each class, one versus the rest")


def _show_served(report: EvaluationReport) -> None:
    st.subheader("Prediction sets and referrals", anchor=False)
    if report.served is not None:
        st.dataframe(
            figure_table(report.served.figures), hide_index=True, alt="Prediction sets and referrals on this split"
        )
    for note in served_notes(report):
        st.caption(plain(note))


def _show_leak_line(report: EvaluationReport) -> None:
    exact, near = report.leaks.get("exact", 0), report.leaks.get("near", 0)
    distance = report.leaks.get("distance")
    within = f" within distance {distance}" if distance is not None else ""
    st.caption(
        f"Leaks between splits of this data set: {exact} images exact, {near} near{within} (exact ones included). "
        "The more there are, the more these figures flatter the model."
    )


def _show_worst(run_id: str, report: EvaluationReport) -> None:
    st.subheader("Worst mistakes", anchor=False)
    if not report.worst:
        st.success(f"All {report.images} images of this split were called rightly.")
        return
    st.caption("The most confidently wrong answers, as the network saw the images.")
    pictures = mistake_pictures(cached.files(run_id), report.split)
    for start in range(0, len(report.worst), _PICTURES_A_ROW):
        columns = st.columns(_PICTURES_A_ROW)
        for number, column in zip(range(start, len(report.worst)), columns, strict=False):
            mistake = report.worst[number]
            with column:
                if number in pictures:
                    st.image(cached.artifact(run_id, pictures[number]), width=_PICTURE_PIXELS, alt=mistake.label)
                st.markdown(plain(f"{mistake.label} called {mistake.predicted}") + f" ({percent(mistake.probability)})")


def visualizations(model: str, row: VersionRow) -> None:
    left, right = st.columns(2, gap="large")
    with left:
        _show_reliability(row)
        _show_classes(row)
    with right:
        _show_embedding(row)
        _show_leaks(row)


def _show_reliability(row: VersionRow) -> None:
    st.subheader("Reliability", anchor=False)
    splits = evaluated_splits(cached.files(row.run_id))
    if not splits:
        st.caption("Comes with the evaluation.")
        return
    table = reliability_table(cached.artifact(row.run_id, f"{FOLDER}/{splits[0]}/predictions.csv"))
    st.altair_chart(charts.reliability(table), alt="Accuracy against confidence")
    st.caption(
        f"Split {splits[0]}: accuracy against confidence in 15 bins, with 95 % intervals (images taken as "
        "independent); the larger a dot, the more images. "
        "On the dashed line confidence can be taken at its word; below it the model is overconfident."
    )


def _show_embedding(row: VersionRow) -> None:
    st.subheader("Embeddings of training images", anchor=False)
    projection = cached.embedding(row.run_id)
    frame = pd.DataFrame(projection.points, columns=["x", "y"]).assign(**{"class": projection.labels})
    titles = [
        f"Principal component {i} ({percent(share, 0)} of variance)" for i, share in enumerate(projection.explained, 1)
    ]
    st.altair_chart(charts.scatter(frame, (titles[0], titles[1])), alt="Embeddings in two dimensions, by class")
    st.caption(
        f"{len(frame)} images in the plane of largest variance. Classes that overlap here may still be apart in the "
        "other dimensions."
    )


def _show_classes(row: VersionRow) -> None:
    st.subheader("Class distribution", anchor=False)
    facts = cached.dataset(row.dataset_id)
    frame = pd.DataFrame(
        [(name, split, count) for split in SPLITS for name, count in facts.counts[split].items()],
        columns=["class", "split", "images"],
    )
    st.altair_chart(charts.class_counts(frame, SPLITS), alt="Images by class and split")
    parts = ", ".join(f"{split} {facts.in_split(split)}" for split in SPLITS)
    st.caption(plain(f"Data set {facts.name}, version {short(row.dataset_id)}: {facts.images} images ({parts})."))


def _show_leaks(row: VersionRow) -> None:
    st.subheader("Leaks between splits", anchor=False)
    leaks = cached.dataset(row.dataset_id).leaks
    if leaks is None:
        st.caption("This data set version has no leak report.")
        return
    st.dataframe(
        pd.DataFrame(leaks.table(), columns=["Where", "Exact duplicates", "Near duplicates"]),
        hide_index=True,
        alt="Images that have a duplicate in another split",
    )
    st.caption(
        f"Images that have a duplicate in another split: exact by pixels; near within {leaks.distance} bits of a "
        "64-bit perceptual hash, exact ones included."
    )


def explanations(model: str, row: VersionRow) -> None:
    if EXPLANATION_INDEX not in {file.path for file in cached.files(row.run_id)}:
        st.info(plain(f"Version {row.version} has no explanations yet. Run: medloop explain {model} {row.version}"))
        return
    index = read_explanations(cached.artifact(row.run_id, EXPLANATION_INDEX))
    st.caption(plain(f"{len(index.images)} images of split {index.split}; {moment(index.created_at)}."))
    st.markdown(HOW_TO_READ)
    st.dataframe(quality_table(index), hide_index=True, alt="Mean quality of the explanations, by method")
    st.caption("Means over these images, in probability.")
    for image in index.images:
        with st.container(border=True):
            _show_explained(row.run_id, image)


def _show_explained(run_id: str, image: ExplainedImage) -> None:
    verdict = "rightly" if image.label == image.predicted else f"but is {image.label}"
    st.markdown(f"**{plain(f'Called {image.predicted}')}** ({percent(image.probability)}), {plain(verdict)}")
    columns = st.columns(len(image.attributions) + 1, gap="large")
    with columns[0]:
        original = cached.artifact(run_id, f"{EXPLANATIONS}/{image.original}")
        st.image(original, width=_EXPLAINED_PIXELS, caption="As the network saw it", alt="Image")
    for column, attribution in zip(columns[1:], image.attributions, strict=True):
        name = METHOD_NAMES.get(attribution.method, attribution.method)
        with column:
            overlay = cached.artifact(run_id, f"{EXPLANATIONS}/{attribution.overlay}")
            st.image(overlay, width=_EXPLAINED_PIXELS, caption=plain(name), alt=f"{name} overlay")
            for line in quality_lines(attribution.quality):
                st.caption(plain(line))
