"""The model card: what a version is, on what data, how good and where its limits are."""

from __future__ import annotations

from typing import Any

from model_registry.manifest import ModelManifest


def render_card(manifest: ModelManifest, evaluation: dict[str, Any], *, metadata: dict[str, str]) -> str:
    """Markdown. `evaluation` is the report stored beside it."""
    side = "test" if evaluation["test"] else "validation"
    numbers = evaluation[side]
    low, high = numbers["accuracy_interval_95"]
    base = (
        f"{manifest.base.name} ({manifest.base.source}, sha256 {manifest.base.digest[:16]}…)"
        if manifest.base
        else "none"
    )
    lines = [
        f"# {manifest.name}, version {manifest.version}",
        "",
        f"- Task: {manifest.task}, {len(manifest.labels)} labels: {', '.join(manifest.labels[:50])}",
        f"- Method: {manifest.method}; backbone: {base}",
        f"- Trained on dataset {manifest.dataset.get('id')} (sha256 {str(manifest.dataset.get('sha256'))[:16]}…), "
        f"{evaluation['rows']['train']} rows; {evaluation['rows']['validation']} for validation, "
        f"{evaluation['rows']['test']} for test",
        *(f"- {key}: {value}" for key, value in metadata.items()),
        "",
        f"## Quality on the {side} rows",
        "",
        f"Accuracy {numbers['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
        f"macro F1 {numbers['macro_f1']:.4f}, calibration error {numbers['ece_after']:.4f} "
        f"after temperature {evaluation['temperature']:.3f}.",
        "",
        "| label | precision | recall | F1 | rows |",
        "|---|---|---|---|---|",
        *(
            f"| {row['label']} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} | {row['rows']} |"
            for row in numbers["per_class"]
        ),
        "",
        "## Methods compared on validation",
        "",
        "| method | accuracy | macro F1 | seconds |",
        "|---|---|---|---|",
        *(
            f"| {item['method']} | {item['validation']['accuracy']:.4f} | {item['validation']['macro_f1']:.4f} "
            f"| {item['seconds']} |"
            for item in evaluation["methods"]
        ),
        "",
        "## Limits",
        "",
        "The figures hold for texts like those it was tested on. Labels with few rows have wide uncertainty. "
        "The backbone's licence and its training data apply to this version too.",
        "",
    ]
    return "\n".join(lines)
