"""The model card of a run: what the model is, whose records made it, at which cost, how good it is, how to use it."""

import json

from urna.models.catalogue import CandidateSpec
from urna.server.model_config import ModelConfig
from urna.server.report import Report
from urna.server.report_page import decision_in_words

PIPELINES = {"image": "image-classification", "text": "text-classification"}  # as Hugging Face names them


def model_card(report: Report, config: ModelConfig, facts: CandidateSpec) -> str:
    """The model card, as Hugging Face reads it: a YAML header (every value is JSON, which is YAML too), then Markdown."""
    header = {
        "license": facts.licence.lower(),
        "library_name": "urna",
        "pipeline_tag": PIPELINES[config.modality],
        "tags": ["differential-privacy", "federated-learning", "secure-aggregation", "urna"],
    }
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    sections = [
        (
            f"# {config.candidate}, fine-tuned by the sites of plan {_plain(report.plan['name'])}",
            _about_model(report, config, facts),
        ),
        ("## How it was chosen", " ".join(_plain(sentence) for sentence in decision_in_words(report))),
        ("## Data", _about_data(report)),
        ("## Privacy", _about_privacy(report)),
        ("## Accuracy", _about_accuracy(report)),
        ("## Limits", "\n".join(f"- {_plain(line)}" for line in report.limits)),
        ("## How to use it", _how_to_use(config)),
        ("## Provenance", _provenance(config)),
    ]
    return f"---\n{yaml}\n---\n\n" + "\n\n".join(f"{title}\n\n{text}" for title, text in sections) + "\n"


def _about_model(report: Report, config: ModelConfig, facts: CandidateSpec) -> str:
    origin = f"{_plain(facts.summary)} Pretrained on {_plain(facts.pretrained_on)}"
    head = f"a linear head of {config.num_classes} classes on its {config.feature_dim} features"
    who = f"by {len(report.sites)} sites that did not pool their records"
    if config.tuning == "head":
        return f"{origin}; frozen. {head.capitalize()} was trained {who}."
    what = (
        f"Low-rank factors (LoRA, rank {config.lora_rank}) beside its linear layers"
        if config.tuning == "lora"
        else "Its weights"
    )
    text = (
        f"{origin}. {what} and {head} were trained {who}: {config.num_trained:,} numbers, {config.share_trained:.1%} of what "
        "this mode trains."
    )
    lines = [*config.notes]
    if report.preparation is not None:
        lines.append(f"Engine of per-example gradients, by the operator's preflight: {report.preparation.engine}")
        lines += [f"Fallback: {why}" for why in report.preparation.fallbacks]
    return f"{text}{'' if not lines else chr(10)}" + "".join(f"\n- {_plain(line)}" for line in lines)


def _about_data(report: Report) -> str:
    sites = "\n".join(f"| {_plain(site)} | {size} |" for site, size in report.sites.items())
    held = report.plan["evaluation"]["holdout_fraction"]
    return (
        "Sizes are what the sites declared; nothing else about their records is known here.\n\n"
        f"| site | records |\n|---|---:|\n{sites}\n\n"
        f"{held:.0%} of each site's records, chosen by a keyed hash, never trained and measured the accuracy."
    )


def _about_privacy(report: Report) -> str:
    spent = report.epsilon_spent.max
    cost = f"epsilon {spent:.3f}, by the sites' own statements" if spent is not None else "not stated by the sites yet"
    missing = (
        f" No statement came from {', '.join(map(_plain, report.epsilon_spent.missing))}."
        if report.epsilon_spent.missing
        else ""
    )
    return (
        f"(epsilon, delta) differential privacy. Planned: epsilon {report.epsilon_planned:g} at delta {report.delta:g}. "
        f"Spent by the dearest site: {cost}.{missing}\n"
        f"Unit: {report.unit_of_privacy}. Choice, training and evaluation are all in it.\n"
        f"Noise is {report.noise.kind}: {report.noise.meaning}."
    )


def _about_accuracy(report: Report) -> str:
    if report.accuracy is None or report.accuracy_stderr is None:
        return "Not measured: the run is unfinished, or its final counts were lost."
    rows = [("accuracy", f"{100 * report.accuracy:.1f} % ± {100 * report.accuracy_stderr:.1f}")]
    if report.macro_f1 is not None:  # the plan asked for a confusion matrix
        assert report.macro_f1_stderr is not None
        assert report.baseline_majority_accuracy is not None
        rows.append(("macro F1", f"{100 * report.macro_f1:.1f} % ± {100 * report.macro_f1_stderr:.1f}"))
        rows.append(("always the largest class", f"{100 * report.baseline_majority_accuracy:.1f} %"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    note = "On held-out records of all sites; ± is one standard error, of sampling and privacy noise."
    return f"{note}\n\n| | |\n|---|---:|\n{table}"


def _how_to_use(config: ModelConfig) -> str:
    read = {
        "image": 'read_images(Path("digits.csv"), max_value=16)',
        "text": 'read_texts(Path("texts.csv"), column="text")',
    }[config.modality]
    return f"""\
    urna predict RUN --input FILE

or, with this folder at RUN/model:

    from pathlib import Path
    from urna.server.artefact import load_model
    from urna.server.inputs import {read.partition("(")[0]}

    model = load_model(Path("RUN"))
    labels, probabilities = model.predict({read})

{_about_inputs(config)}"""


def _about_inputs(config: ModelConfig) -> str:
    if config.modality == "text":
        return "A text is one line of a text file, or a column of a CSV, or a key of JSON lines; long texts are cut."
    if config.is_built_in:
        return (
            "Images are square and grey, 0 to 1, of any size (they are averaged down to 8 x 8), with the polarity of the\n"
            "training records (for the bundled digits: bright strokes on a dark ground)."
        )
    return "Images are grey or coloured, 0 to 1, of any size: they are resized whole, as those of the training records were."


def _provenance(config: ModelConfig) -> str:
    rows = [
        ("run", _plain(config.run_id)),
        ("plan sha256", config.plan_sha256),
        ("backbone sha256", config.backbone_sha256),
        *([("head sha256", config.head_sha256)] if config.head_sha256 else []),
        *([("trained weights sha256", config.tuned_sha256)] if config.tuned_sha256 else []),
        ("urna", config.urna_version),
    ]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | `{value}` |" for name, value in rows)


def _plain(text: object) -> str:
    """A text of elsewhere as one line without Markdown or HTML of its own."""
    return "".join(" " if one in "\r\n" else one for one in str(text) if one not in "`|<>[]*\\")
