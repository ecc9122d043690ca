"""What deploy/ and the Dockerfile claim about the service, held against the code and the tools that will read them."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from finetune.worker.metrics import WorkerMetrics
from service.memory_plan import plan_memory
from service.metrics import ServingMetrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
BASE = DEPLOY / "k8s" / "base"
LOCAL = DEPLOY / "k8s" / "overlays" / "local"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Metric names


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DEPLOY / "grafana" / "polyhead.json").read_text())
    return document


def dashboard_queries() -> list[tuple[str, str]]:
    return [(panel["title"], t["expr"]) for panel in dashboard()["panels"] for t in panel.get("targets", [])]


def alert_queries() -> list[tuple[str, str]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [(rule["alert"], rule["expr"]) for group in groups for rule in group["rules"]]


def exported_names(registry: CollectorRegistry) -> Iterator[str]:
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    for family in registry.collect():
        yield from (family.name + suffix for suffix in suffixes.get(family.type, [""]))


DECLARED = {"up", *exported_names(ServingMetrics().registry), *exported_names(WorkerMetrics().registry)}
QUERIES = [*dashboard_queries(), *alert_queries()]


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_queries_use_declared_metrics_only(title: str, query: str) -> None:
    used = set(re.findall(r"\b(?:polyhead_|process_|python_)\w+|\bup\b", query))
    assert used, f"{title} uses no metric at all"
    assert used <= DECLARED


def test_queries_select_jobs_that_are_scraped() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {"polyhead-serving": ["127.0.0.1:8000"], "polyhead-worker": ["127.0.0.1:9109"]}
    selected = {match for _, query in QUERIES for match in re.findall(r'job=~?"([^"]+)"', query)}
    assert all(any(re.fullmatch(pattern, job) for job in targets) for pattern in selected)


# Prometheus


@needs_promtool
def test_prometheus_configuration_is_valid() -> None:
    run("promtool", "check", "config", PROMETHEUS / "prometheus.yml")


@needs_promtool
def test_alert_rules_are_valid() -> None:
    run("promtool", "check", "rules", PROMETHEUS / "alerts.yml")


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    run("promtool", "test", "rules", PROMETHEUS / "alerts_test.yml")


def test_every_alert_has_a_test() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == {alert for alert, _ in alert_queries()}


# Grafana


def test_every_panel_takes_its_data_source_from_the_variable() -> None:
    document = dashboard()
    variables = {variable["name"]: variable for variable in document["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert document["schemaVersion"] >= 41
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    sources = [source["datasource"] for panel in panels for source in (panel, *panel["targets"])]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_panels_have_distinct_ids_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def started() -> tuple[ServingMetrics, WorkerMetrics]:
    """Both processes right after their start: one backbone on one engine, no model published."""
    serving, worker = ServingMetrics(), WorkerMetrics(clock=lambda: 0.0)
    serving.start_engine("minilm", "onnx")
    return serving, worker


def add_traffic(serving: ServingMetrics, worker: WorkerMetrics) -> None:
    """What two predictions and one fine-tune job leave behind."""
    model, engine = ("intent", "1", "text-classification", "default"), ("minilm", "onnx")
    serving.start_model(*model, backbone="minilm", engine="onnx")
    serving.set_model_state(*model, state="ready")
    serving.adapter_loads_total.inc()
    serving.adapter_load_duration_seconds.observe(0.2)
    for _ in range(2):
        serving.count_management("GET", "", status=404, seconds=0.01)
        serving.requests_total.labels(*model, "200").inc()
        serving.request_duration_seconds.labels(*model).observe(0.01)
        serving.prediction_confidence.labels(*model).observe(0.9)
        serving.queue_duration_seconds.labels(*engine).observe(0.001)
        serving.inference_duration_seconds.labels(*engine).observe(0.005)
        serving.batch_size.labels(*engine).observe(4)
        serving.batch_tokens.labels(*engine).observe(64)
        serving.batch_padding_ratio.labels(*engine).observe(0.1)
    serving.set_finetune_jobs({"succeeded": 1})
    worker.finetune_duration_seconds.labels("linear_probe", "succeeded").observe(12)


def scrape(serving: ServingMetrics, worker: WorkerMetrics) -> dict[str, float]:
    series = {}
    for job, registry in (("polyhead-serving", serving.registry), ("polyhead-worker", worker.registry)):
        for sample in (s for family in registry.collect() for s in family.samples):
            labels = {**sample.labels, "job": job, "instance": f"{job}:1"}
            series[f"{sample.name}{{{', '.join(f'{k}={json.dumps(v)}' for k, v in labels.items())}}}"] = sample.value
    return series


def assert_queries_answer(tmp_path: Path, before: dict[str, float], after: dict[str, float], *, numbers: bool) -> None:
    """Evaluate the dashboard at 90 s: five scrapes of `before`, then of `after`; with `numbers`, NaN is no answer."""

    def substituted(query: str) -> str:
        query = query.replace("$__rate_interval", "1m").replace("$model", ".*")
        return f"count(({query}) >= -Inf)" if numbers else f"count({query})"

    values = {name: [before.get(name)] * 5 + [value] * 3 for name, value in after.items()}
    document = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": name, "values": " ".join("_" if value is None else f"{value:f}" for value in points)}
                    for name, points in values.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": f"{substituted(query)} > bool 0",
                        "eval_time": "90s",
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    }
                    for _, query in dashboard_queries()
                ],
            }
        ],
    }
    (tmp_path / "dashboard_test.yml").write_text(yaml.safe_dump(document))
    run("promtool", "test", "rules", tmp_path / "dashboard_test.yml")


@needs_promtool
def test_every_dashboard_query_answers_right_after_start(tmp_path: Path) -> None:
    series = scrape(*started())
    assert_queries_answer(tmp_path, series, series, numbers=False)


@needs_promtool
def test_every_dashboard_query_gives_numbers_with_a_little_traffic(tmp_path: Path) -> None:
    serving, worker = started()
    serving.start_model("intent", "1", "text-classification", "default")
    before = scrape(serving, worker)
    add_traffic(serving, worker)
    assert_queries_answer(tmp_path, before, scrape(serving, worker), numbers=True)


def test_a_rendered_scrape_is_what_the_registry_holds() -> None:
    """So that the queries above are evaluated on what Prometheus would read."""
    serving, _ = started()
    body, _ = serving.render()
    rendered = {s.name for family in text_string_to_metric_families(body.decode()) for s in family.samples}
    assert rendered == {s.name for family in serving.registry.collect() for s in family.samples}


# Kubernetes


def documents(folder: Path) -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = [folder / name for name in kustomization["resources"] if (folder / name).is_file()]
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def of_kind(kind: str, found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {document["metadata"]["name"]: document for document in found if document["kind"] == kind}


def settings() -> dict[str, str]:
    lines = (BASE / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


DEPLOYMENTS = of_kind("Deployment", documents(BASE))


@pytest.mark.parametrize("folder", [BASE, LOCAL], ids=["base", "local"])
def test_files_named_by_a_kustomization_exist_and_are_all_named(folder: Path) -> None:
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    generators = kustomization.get("configMapGenerator", []) + kustomization.get("secretGenerator", [])
    named = {
        *kustomization["resources"],
        *(patch["path"] for patch in kustomization.get("patches", [])),
        *(name for generator in generators for name in generator.get("envs", [])),
    }
    # the one file that an operator makes: from its example, and never committed
    assert not [n for n in named - {"secrets.env"} if not (folder / n).exists()]
    assert {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"} <= named
    if "secrets.env" in named:
        assert (folder / "secrets.env.example").is_file()
        assert "secrets.env" in (folder / ".gitignore").read_text().split()


def test_references_between_resources_resolve() -> None:
    found = documents(BASE)
    config_maps = {g["name"] for g in yaml.safe_load((BASE / "kustomization.yaml").read_text())["configMapGenerator"]}
    for deployment in DEPLOYMENTS.values():
        pod = deployment["spec"]["template"]["spec"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert pod["serviceAccountName"] in of_kind("ServiceAccount", found)
        claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        assert claims == set(of_kind("PersistentVolumeClaim", found))
        for container in pod["containers"]:
            assert {source["configMapRef"]["name"] for source in container["envFrom"]} == config_maps
            assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    serving = DEPLOYMENTS["polyhead-serving"]["spec"]["template"]
    for service in of_kind("Service", found).values():
        assert service["spec"]["selector"].items() <= serving["metadata"]["labels"].items()
        ports = {port["name"] for port in serving["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for budget in of_kind("PodDisruptionBudget", found).values():
        assert budget["spec"]["selector"]["matchLabels"].items() <= serving["metadata"]["labels"].items()


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_pods_meet_the_restricted_profile_and_more(deployment: dict[str, Any]) -> None:
    pod = deployment["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {tuple(set(volume) - {"name"}) for volume in pod["volumes"]} <= {("persistentVolumeClaim",), ("emptyDir",)}
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 65532
    for container in pod["containers"] + pod.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts["/data"] == "data"
        temporary = next(volume for volume in pod["volumes"] if volume["name"] == mounts["/tmp"])
        assert "sizeLimit" in temporary["emptyDir"]


def serving_limits() -> dict[str, int]:
    """Of the serving container, in bytes, by where it is said."""
    found = {}
    for place in (BASE, LOCAL):
        for document in [
            document for path in place.glob("*.yaml") for document in yaml.safe_load_all(path.read_text())
        ]:
            if document["kind"] == "Deployment" and document["metadata"]["name"] == "polyhead-serving":
                (container,) = document["spec"]["template"]["spec"]["containers"]
                number = re.fullmatch(r"(\d+)Gi", container["resources"]["limits"]["memory"])
                assert number
                found[place.name] = int(number[1]) << 30
    return found


@pytest.mark.parametrize("place", ["base", "local"])
def test_what_the_settings_come_to_fits_the_containers_memory(place: str) -> None:
    chosen = {
        name: settings().get(f"POLYHEAD_{name}") for name in ("MEMORY_BUDGET_BYTES", "DATASET_CHECK_MEMORY_BYTES")
    }
    budget, check = (int(value) if value else None for value in chosen.values())
    limit = serving_limits()[place]
    assert plan_memory(budget, check, limit=limit, physical=1 << 40).total_bytes <= limit


def test_the_table_of_memory_is_what_the_settings_come_to() -> None:
    text = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| (\d+) GiB(?: and more)? \| (\d+) (GiB|MiB) \| (\d+) (GiB|MiB) \|$", text, re.MULTILINE)
    assert len(rows) > 3
    units = {"GiB": 1 << 30, "MiB": 1 << 20}
    for limit, budget, of_budget, check, of_check in rows:
        plan = plan_memory(None, None, limit=int(limit) << 30, physical=1 << 40)
        assert (plan.budget_bytes, plan.check_bytes) == (int(budget) * units[of_budget], int(check) * units[of_check])


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_environment_names_carry_the_prefix_and_nothing_else_adds_any(deployment: dict[str, Any]) -> None:
    pod = deployment["spec"]["template"]["spec"]
    # service links would set POLYHEAD_PORT=tcp://… from the Service named polyhead
    assert pod["enableServiceLinks"] is False
    variables = [variable for container in pod["containers"] for variable in container["env"]]
    assert all(variable["name"].startswith("POLYHEAD_") for variable in variables)
    assert all(name.startswith("POLYHEAD_") for name in settings())
    secrets = {v["name"]: v["valueFrom"]["secretKeyRef"]["key"] for v in variables}
    assert secrets["POLYHEAD_DATABASE_URL"] == "database-url"
    # the worker has no use for the keys, so it does not get them
    is_serving = deployment["metadata"]["name"] == "polyhead-serving"
    assert secrets.get("POLYHEAD_API_KEYS") == ("api-keys" if is_serving else None)


def test_serving_probes_and_rollout() -> None:
    spec = DEPLOYMENTS["polyhead-serving"]["spec"]
    pod, container = spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert probes == {
        "startup": {"path": "/livez", "port": "http"},
        "liveness": {"path": "/livez", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
    }
    assert container["command"] == ["python", "-m", "service"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    # readiness off for the drain delay, then at most 60 s until exit
    assert pod["terminationGracePeriodSeconds"] >= int(settings()["POLYHEAD_DRAIN_DELAY_S"]) + 60


def test_the_worker_is_replaced_not_doubled() -> None:
    spec = DEPLOYMENTS["polyhead-worker"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["containers"][0]["command"] == ["python", "-m", "finetune"]
    assert spec["strategy"] == {"type": "Recreate"}
    serving = DEPLOYMENTS["polyhead-serving"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > serving["terminationGracePeriodSeconds"]
    assert pod["containers"][0]["image"] == serving["containers"][0]["image"]


@pytest.mark.parametrize(("name", "setting"), [("serving", "PORT"), ("worker", "WORKER_METRICS_PORT")])
def test_ports_agree_with_the_settings(name: str, setting: str) -> None:
    template = DEPLOYMENTS[f"polyhead-{name}"]["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    port = int(settings()[f"POLYHEAD_{setting}"])
    assert [p["containerPort"] for p in template["spec"]["containers"][0]["ports"]] == [port]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port),
        "prometheus.io/path": "/metrics",
    }
    policy = of_kind("NetworkPolicy", documents(BASE))[f"polyhead-{name}-ingress"]
    assert [p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]] == [port]


def test_network_is_denied_unless_allowed() -> None:
    deny = of_kind("NetworkPolicy", documents(BASE))["polyhead-default-deny"]["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert not {"ingress", "egress"} & set(deny)
    for deployment in DEPLOYMENTS.values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deny["podSelector"]["matchLabels"].items() <= labels.items()


@needs_kubectl
def test_base_builds() -> None:
    built = list(yaml.safe_load_all(run("kubectl", "kustomize", BASE)))
    config = next(iter(of_kind("ConfigMap", built).values()))
    assert config["data"] == settings()


@needs_kubectl
def test_local_overlay_builds_without_postgresql(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DEPLOY / "k8s", tmp_path / "k8s")) / "overlays" / "local"
    shutil.copy(copy / "secrets.env.example", copy / "secrets.env")
    built = list(yaml.safe_load_all(run("kubectl", "kustomize", copy)))
    for deployment in of_kind("Deployment", built).values():
        container = deployment["spec"]["template"]["spec"]["containers"][0]
        assert "POLYHEAD_DATABASE_URL" not in {variable["name"] for variable in container.get("env", [])}
        assert deployment["spec"]["replicas"] == 1
    claim = of_kind("PersistentVolumeClaim", built)["polyhead-data"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


# The image


def dockerfile() -> list[list[tuple[str, str]]]:
    """Stages, each a list of (instruction, rest); what precedes the first FROM is dropped."""
    text = (ROOT / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    stages: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((instruction, rest))
    return stages


def values_of(stage: list[tuple[str, str]], wanted: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == wanted]


def copied_from_context() -> set[str]:
    copies = [rest.split() for stage in dockerfile() for rest in values_of(stage, "COPY")]
    return {source for words in copies if not words[0].startswith("--from=") for source in words[:-1]}


def test_copied_sources_exist() -> None:
    made_elsewhere = {"constraints.txt", "README.md"}
    assert not [s for s in copied_from_context() - made_elsewhere if not (ROOT / s).exists()]


def test_every_package_is_copied_and_nothing_else_reaches_the_builder() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    metadata = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied_from_context() == packages | metadata | {"constraints.txt"}

    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line[0] == "!"} == copied_from_context()
    excluded = [line for line in lines[1:] if line[0] != "!"]
    assert any(fnmatch("service/__pycache__", pattern) for pattern in excluded)


def test_stages_are_named_before_use() -> None:
    stages = dockerfile()
    names = [stage[0][1].partition(" AS ")[2] for stage in stages]
    used = {m for stage in stages for rest in values_of(stage, "COPY") for m in re.findall(r"--from=(\S+)", rest)}
    assert used and used <= set(names[:-1])
    assert {stage[0][1].split()[0] for stage in stages} == {"${PYTHON_IMAGE}"}
    assert "ARG PYTHON_IMAGE=python:3.11-slim-bookworm" in (ROOT / "Dockerfile").read_text()


def test_the_final_stage_runs_as_no_root_and_builds_nothing() -> None:
    final = dockerfile()[-1]
    assert values_of(final, "USER") == ["65532:65532"]
    instructions = [instruction for instruction, _ in final]
    assert "RUN" not in instructions[instructions.index("USER") :]
    assert not re.search(r"\b(pip|apt-get|gcc|build-essential|curl)\b", " ".join(values_of(final, "RUN")))
    assert values_of(final, "EXPOSE") == ["8000"]
    assert json.loads(values_of(final, "CMD")[-1]) == ["python", "-m", "service"]


def test_the_health_check_is_python_that_compiles() -> None:
    (check,) = values_of(dockerfile()[-1], "HEALTHCHECK")
    interpreter, flag, program = json.loads(check[check.index("[") :])
    assert (interpreter, flag) == ("python", "-c")
    compile(program, "HEALTHCHECK", "exec")
    assert "/livez" in program


def test_dependencies_are_installed_under_the_constraints() -> None:
    installs = [rest for rest in values_of(dockerfile()[0], "RUN") if " install " in rest]
    assert len(installs) == 3
    assert all("-c constraints.txt" in rest or "==" in rest for rest in installs)
    assert any('--index-url "${TORCH_INDEX}"' in rest and "--no-deps" in rest for rest in installs)


# The guide


def test_files_named_in_the_guide_exist() -> None:
    guide = (DEPLOY / "README.md").read_text()
    paths = set(re.findall(r"`((?:\.\./|k8s/|prometheus/|grafana/)[\w./-]*)`", guide))
    assert {"../Dockerfile", "k8s/base", "grafana/polyhead.json"} <= paths
    assert not [path for path in paths if not (DEPLOY / path).exists()]
    commands = set(re.findall(r"\bdeploy/[\w./-]+", guide))
    assert not [path for path in commands if not (ROOT / path).exists()]
