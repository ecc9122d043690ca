"""`polyhead …`: starts the service, and talks to one over HTTP."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyhead import __version__
from polyhead.client import DEFAULT_URL, FINAL, Client, Json, PolyheadError
from polyhead.supervise import Program, Supervisor, port_problem

DEFAULT_BACKBONE = "minilm"
WORKER_METRICS_PORT = 9109
SAMPLE_NAME = "demo"
SAMPLE_FILE = "sample.csv"
SAMPLE = """text,label
"A warm and funny film, I loved every minute.",good
The best performance of her career.,good
"Beautifully shot, with a story that stays with you.",good
I laughed until I cried and would see it again.,good
A clever script and a wonderful cast.,good
"Moving, honest and full of surprises.",good
The music alone is worth the ticket.,good
One of the finest films of the year.,good
It grips you from the first scene to the last.,good
"Charming, bright and perfectly paced.",good
A joy for the whole family.,good
The ending is simply brilliant.,good
"A dull and lifeless film, I nearly fell asleep.",bad
The worst performance of his career.,bad
"Badly shot, with a story that goes nowhere.",bad
I was bored after ten minutes and walked out.,bad
A lazy script and a wooden cast.,bad
"Clumsy, dishonest and entirely predictable.",bad
Not even the music can save it.,bad
One of the weakest films of the year.,bad
It loses you in the first scene and never recovers.,bad
"Tedious, noisy and far too long.",bad
A waste of time for everyone involved.,bad
The ending makes no sense at all.,bad
"""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    help="One pretrained backbone, many heads: fine-tune on your labels and serve the result over REST.",
)
Url = Annotated[str, typer.Option("--url", envvar="POLYHEAD_URL", help="address of the service")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="name of a model")]
Reason = Annotated[str, typer.Option(help="kept in the history of the alias")]


def main() -> None:
    app()


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context, show: Annotated[bool, typer.Option("--version", help="show the version and exit")] = False
) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


# The service


@app.command()
def up(
    port: Annotated[int, typer.Option(envvar="POLYHEAD_PORT", min=1, max=65535, help="port to listen on")] = 8000,
    data_dir: Annotated[
        Path, typer.Option(envvar="POLYHEAD_DATA_DIR", file_okay=False, help="folder of models, datasets and logs")
    ] = Path("data"),
) -> None:
    """Start the serving process and a fine-tune worker, and keep them running until Ctrl-C."""
    host = os.environ.get("POLYHEAD_HOST", "127.0.0.1")
    if problem := port_problem(host, port):
        _fail(f"port {port} on {host} cannot be used: {problem}. Choose another with --port.")
    metrics_host, metrics_port = worker_metrics(os.environ)
    if metrics_port and (problem := port_problem(metrics_host, metrics_port)):
        _fail(
            f"POLYHEAD_WORKER_METRICS_PORT: port {metrics_port} on {metrics_host} cannot be used: {problem}. Another "
            "worker may use it: set another port, or 0 to serve no metrics of the worker."
        )
    data_dir = data_dir.absolute()
    url = f"http://{_reachable(host)}:{port}"
    try:
        (data_dir / "logs").mkdir(parents=True, exist_ok=True)
        sample = _write_sample(data_dir)
    except OSError as error:
        _fail(f"the data folder cannot be used: {error}")
    programs = (
        Program("serving", (sys.executable, "-m", "service"), data_dir / "logs" / "serving.log"),
        Program("worker", (sys.executable, "-m", "finetune"), data_dir / "logs" / "worker.log"),
    )
    typer.echo(f"starting the serving process and the worker; their output goes to {data_dir / 'logs'}")
    supervisor = Supervisor(
        programs,
        f"{url}/readyz",
        environment=child_environment(os.environ, port=port, data_dir=data_dir),
        say=typer.echo,
        greeting=lambda: greeting(url, sample, backbone=_backbone(url), has_keys="POLYHEAD_API_KEYS" in os.environ),
    )
    raise typer.Exit(supervisor.run())


def worker_metrics(environment: Mapping[str, str]) -> tuple[str, int]:
    """Where the worker will serve its metrics; port 0 if nowhere, or if the worker will have to say what is wrong."""
    port = environment.get("POLYHEAD_WORKER_METRICS_PORT") or str(WORKER_METRICS_PORT)
    host = environment.get("POLYHEAD_WORKER_METRICS_HOST") or "127.0.0.1"
    return host, int(port) if port.isdecimal() and int(port) < 1 << 16 else 0


def child_environment(environment: Mapping[str, str], *, port: int, data_dir: Path) -> dict[str, str]:
    """What the processes get: ours, the options, and no folder named `service` in the current one on their path."""
    defaults = {"POLYHEAD_DRAIN_DELAY_S": "0", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return defaults | dict(environment) | {"POLYHEAD_PORT": str(port), "POLYHEAD_DATA_DIR": str(data_dir)}


def greeting(url: str, sample: Path, *, backbone: str, has_keys: bool) -> str:
    """Three commands that work as pasted, in any folder and all at once: the last waits until its model is there."""
    key = """ -H "Authorization: Bearer $POLYHEAD_API_KEY\"""" if has_keys else ""
    json = f"{key} -H 'Content-Type: application/json' -d"
    wait = "--fail --retry 300 --retry-delay 1 --retry-all-errors"
    file = shlex.quote(f'file=@"{sample}"')  # quoted once more, as curl splits at , and ;
    return f"""
ready: {url}   (API: {url}/docs; Ctrl-C stops)

  embeddings:
    curl -s {url}/v1/embeddings{json} '{{"model": "{backbone}", "input": ["a film that holds to the end"]}}'

  upload labelled texts and fine-tune on them:
    curl -s {url}/finetune{key} -F {file} -F register_as={SAMPLE_NAME}

  predict with the result (waits for it):
    curl -s {wait} {url}/predict{json} '{{"model": "{SAMPLE_NAME}", "inputs": ["what a wonderful evening"]}}'
"""


def _backbone(url: str) -> str:
    """The name of one that is served."""
    try:
        with Client(url) as client:
            return next(iter(client.info()["backbones"]), DEFAULT_BACKBONE)
    except PolyheadError:
        return DEFAULT_BACKBONE


def _reachable(host: str) -> str:
    """Where a service that listens on `host` answers this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _write_sample(data_dir: Path) -> Path:
    sample = data_dir / SAMPLE_FILE
    if not sample.exists():
        sample.write_text(SAMPLE)
    return sample


# Inference


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="name, name@alias or name:version")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="one prediction for each")],
    url: Url = DEFAULT_URL,
) -> None:
    """Predict the label, the labels or the value of each text."""
    with connected(url) as client:
        answer = client.predict(model, texts)
    rows = list(zip(answer["predictions"], texts, strict=True))
    if "value" in answer["predictions"][0]:
        show(("value", "text"), [(f"{row['value']:.7g}", text) for row, text in rows])
        return
    show(("label", "score", "text"), [(*_best(row), text) for row, text in rows])


# Fine-tuning


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="a table or an archive")],
    url: Url = DEFAULT_URL,
) -> None:
    """Upload a file with labelled data, wait for its check and print its id."""
    with connected(url) as client:
        dataset = client.upload_dataset(file)
    if dataset["status"] == "invalid":
        _fail(f"{file} cannot be used", errors=dataset["errors"])
    columns = ", ".join(column["name"] for column in dataset["columns"] or ())
    typer.echo(dataset["id"])
    typer.echo(_plain(f"{dataset['rows']} rows; columns: {columns}"), err=True)


@app.command()
def finetune(
    dataset: Annotated[str, typer.Argument(help="id of a dataset: ds_…")],
    register_as: Annotated[str, typer.Option(metavar="NAME", help="model that gets the result as a new version")],
    method: Annotated[str, typer.Option(help="auto, baseline, linear_probe, lora or full")] = "auto",
    test_dataset: Annotated[str | None, typer.Option(help="dataset to test on, else a part is cut off")] = None,
    task: Annotated[str | None, typer.Option(help="text-classification, text-multi-label or text-regression")] = None,
    text_column: Annotated[str | None, typer.Option(help="column with the texts")] = None,
    label_column: Annotated[str | None, typer.Option(help="column with the labels")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="show events until the job has ended")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Start a fine-tune job and print its id."""
    columns = {name: column for name, column in (("text", text_column), ("label", label_column)) if column}
    with connected(url) as client:
        job = client.finetune(
            dataset,
            register_as,
            test_dataset=test_dataset,
            task=task,
            columns=columns or None,
            hyperparameters={"method": method},
        )
        typer.echo(job["id"])
        if watch:
            _watch(client, job["id"])


def _watch(client: Client, job_id: str) -> None:
    for event in client.follow(job_id):
        typer.echo(_plain(f"{event['type']}: {event['message']}"))
    job = client.job(job_id)
    if job["status"] != "succeeded":
        error = job["error"] or {}
        hint = f" {error['hint']}" if error.get("hint") else ""
        _fail(
            f"{job['status']}: {error.get('message', 'no result')}{hint}", error.get("code"), error.get("findings", ())
        )
    typer.echo(f"registered {job['result']['name']}:{job['result']['version']}")


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="only jobs in this state")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    url: Url = DEFAULT_URL,
) -> None:
    """List fine-tune jobs, newest first."""
    with connected(url) as client:
        found = client.jobs(status=status, limit=limit)
    show(("job", "status", "phase", "progress", "result", "error"), [_job_row(job) for job in found])


def _job_row(job: Json) -> tuple[str, ...]:
    result, error = job["result"] or {}, job["error"] or {}
    phase, percent = "", ""
    if job["status"] not in FINAL:
        phase, done = job["phase"] or "", (job["progress"] or {}).get("percent")
        percent = "" if done is None else f"{done:.0f} %"
    name = f"{result['name']}:{result['version']}" if result else f"→ {job['register_as']}"
    return job["id"], job["status"], phase, percent, name, error.get("message", "")


# Models


@app.command()
def models(url: Url = DEFAULT_URL) -> None:
    """List backbones and models."""
    with connected(url) as client:
        found = client.models()
    show(("model", "version", "aliases", "state", "parent", "labels"), [_model_row(model) for model in found])


def _model_row(model: Json) -> tuple[str, ...]:
    aliases = ", ".join(f"{alias}={version}" for alias, version in sorted(model["aliases"].items()))
    version = "" if model["version"] is None else str(model["version"])
    return model["id"], version, aliases, model["state"], model.get("parent") or "", ", ".join(model["labels"])


@app.command()
def promote(
    name: ModelName,
    version: Annotated[int, typer.Argument(min=1, help="version that the champion shall be")],
    reason: Reason = "",
    url: Url = DEFAULT_URL,
) -> None:
    """Make a version the champion, which answers where only the name is given."""
    with connected(url) as client:
        current = client.model(name)["aliases"].get("champion")
        change = client.set_alias(name, "champion", version=version, expected_version=current, reason=reason)
    _tell_change(change)


@app.command()
def rollback(name: ModelName, reason: Reason = "", url: Url = DEFAULT_URL) -> None:
    """Make the version before it the champion again."""
    with connected(url) as client:
        _tell_change(client.rollback(name, reason=reason))


def _tell_change(answer: Json) -> None:
    is_pending = answer.get("object") == "alias.pending"
    change = answer["change"] if is_pending else answer
    before = f"{change['from_version']} → " if change["from_version"] is not None else ""
    typer.echo(_plain(f"{change['model']}@{change['alias']}: {before}{change['version']}"))
    if is_pending:
        serving = f"version {answer['serving']}" if answer["serving"] is not None else "no version"
        typer.echo(_plain(f"not served yet, {serving} answers meanwhile: {answer['reason']}"), err=True)


# Output


@contextmanager
def connected(url: str) -> Iterator[Client]:
    """A client whose errors end the command with status 1 and a line that says why."""
    try:
        with Client(url) as client:
            yield client
    except PolyheadError as error:
        _fail(error.detail, error.code, error.errors)


def _fail(detail: str, code: str | None = None, errors: Sequence[Json] = ()) -> NoReturn:
    typer.echo(_plain(f"error: {detail}" + (f" ({code})" if code else "")), err=True)
    for error in errors:
        place = ".".join(str(part) for part in error.get("loc", ()))
        rows = f" (rows {', '.join(map(str, error['rows'][:5]))})" if error.get("rows") else ""
        fix = f"; {error['fix']}" if error.get("fix") else ""
        typer.echo(_plain(f"  {place + ': ' if place else ''}{error.get('message', '')}{rows}{fix}"), err=True)
    raise typer.Exit(1)


def show(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, tab-separated lines for programs."""
    if not sys.stdout.isatty():
        for row in (header, *rows):
            typer.echo("\t".join(_plain(cell).replace("\t", " ") for cell in row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(_plain(cell)) for cell in row))
    Console().print(table)


def _plain(text: str) -> str:
    """On one line, without what a terminal would obey: labels and messages come from the data."""
    return "".join(character if character.isprintable() else " " for character in text)


def _best(row: dict[str, Any]) -> tuple[str, str]:
    """The label with its score; of several labels all, with the score of each."""
    if "labels" not in row:
        return row["label"] or "(none)", _number(row["score"])
    scores = [_number(one["score"]) for one in row["scores"] if one["label"] in row["labels"]]
    return ", ".join(row["labels"]) or "(none)", ", ".join(scores)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
