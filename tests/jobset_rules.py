"""What a JobSet of TPUs may say, of the fields that ours use, and how their numbers hang together.

From the CRD and the admission webhook of kubernetes-sigs/jobset (api/jobset/v1alpha2, pkg/webhooks), Kubernetes' rules
for Jobs (batch/v1), and GKE's for nodes with TPUs (cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus).
"""

import math
import re

_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1035: names of services, and so of Jobs and their pods
_QUALIFIED = re.compile(r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
_ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob")
_ACTIONS += ("RestartJobAndIgnoreMaxRestarts",)


def _number(low, high=2**31 - 1):
    return lambda x: type(x) is int and low <= x <= high


def _text(x):
    return type(x) is str


def _names(x):
    """Labels and the like: names with texts. A number or a bool that YAML has made of one is refused."""
    return type(x) is dict and all(_text(k) and _QUALIFIED.fullmatch(k) and _text(v) for k, v in x.items())


# name → what it must be: the values it may have, a predicate, a dict of fields, or a list with one of its items.
# Names that end with "!" must be there.
_CONTAINER = {
    "name!": _LABEL.fullmatch,
    "image!": _text,
    "command": [_text],
    "env": [{"name!": re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch, "value!": _text}],
    "ports": [{"containerPort!": _number(1, 65535)}],
    "resources": {"limits!": {"google.com/tpu!": _number(1)}},
}
_POD = {
    "restartPolicy!": ("Never", "OnFailure"),
    "terminationGracePeriodSeconds": _number(0),
    "nodeSelector!": _names,
    "containers!": [_CONTAINER],
}
_EXIT_CODES = {"containerName": _text, "operator!": ("In", "NotIn"), "values!": [_number(0, 255)]}
_JOB = {
    "parallelism!": _number(1),
    "completions!": _number(1),
    "completionMode": ("Indexed",),  # also what the webhook makes of a missing one
    "backoffLimit": _number(0),
    "backoffLimitPerIndex": _number(0),
    "podFailurePolicy": {
        "rules!": [{"action!": ("FailJob", "FailIndex", "Ignore", "Count"), "onExitCodes!": _EXIT_CODES}]
    },
    "template!": {"spec!": _POD},
}
_RULE = {"name!": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?").fullmatch, "action!": _ACTIONS}
_RULE |= {"onJobFailureReasons": [_REASONS], "targetReplicatedJobs": [_text]}
_JOBSET = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": {"name!": _LABEL.fullmatch, "annotations": _names},
    "spec!": {
        "failurePolicy": {"maxRestarts": _number(0), "rules": [_RULE]},
        "replicatedJobs!": [{"name!": _LABEL.fullmatch, "replicas": _number(0), "template!": {"spec!": _JOB}}],
    },
}

# cloud.google.com/gke-tpu-accelerator → sides of a topology, and chips that a host may have.
_TPUS = {
    "tpu-v4-podslice": (3, (4,)),
    "tpu-v5-lite-podslice": (2, (1, 4, 8)),
    "tpu-v5p-slice": (3, (4,)),
    "tpu-v6e-slice": (2, (1, 4, 8)),
}


def problems(manifest) -> list[str]:
    """One line for each rule that a manifest breaks."""
    found = _of_shape(manifest, _JOBSET, "")
    return found or [line for job in manifest["spec"]["replicatedJobs"] for line in _of_job(manifest, job)]


def _of_shape(value, shape, where) -> list[str]:
    if isinstance(shape, dict):
        if type(value) is not dict:
            return [f"{where}: must have fields"]
        fields = {name.rstrip("!"): kind for name, kind in shape.items()}
        lines = [f"{where}.{name}: no such field" for name in value if name not in fields]
        lines += [f"{where}.{n[:-1]}: is missing" for n in shape if n.endswith("!") and n[:-1] not in value]
        return lines + [
            ln for n, kind in fields.items() if n in value for ln in _of_shape(value[n], kind, f"{where}.{n}")
        ]
    if isinstance(shape, list):
        if type(value) is not list or not value:
            return [f"{where}: must be a list"]
        return [line for i, item in enumerate(value) for line in _of_shape(item, shape[0], f"{where}[{i}]")]
    fits = value in shape if isinstance(shape, tuple) else shape(value) if _text(value) or _plain(shape) else False
    return [] if fits else [f"{where}: {value!r} is not allowed"]


def _plain(predicate) -> bool:
    """Whether it takes values of any type; a pattern takes texts only."""
    return not hasattr(predicate, "__self__") or not isinstance(predicate.__self__, re.Pattern)


def _of_job(manifest, job) -> list[str]:
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    names = [container["name"] for container in pod["containers"]]
    lines = []
    # The longest name of a pod, with the five characters that Kubernetes adds, is that of a host as well.
    last = f"{manifest['metadata']['name']}-{job['name']}-{job.get('replicas', 1) - 1}-{spec['completions'] - 1}-abcde"
    if not _LABEL.fullmatch(last):
        lines.append(f"the name of a pod, {last}, is longer than 63 characters")
    if spec["parallelism"] != spec["completions"]:
        lines.append("parallelism and completions differ: hosts of a run start together")
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    if rules and pod["restartPolicy"] != "Never":
        lines.append("podFailurePolicy needs restartPolicy: Never")
    for rule in rules:
        values = rule["onExitCodes"]["values"]
        if values != sorted(set(values)) or (rule["onExitCodes"]["operator"] == "In" and 0 in values):
            lines.append(f"exit codes {values} must rise, and 0 is no failure")
        if rule["onExitCodes"].get("containerName", names[0]) not in names:
            lines.append(f"there is no container {rule['onExitCodes']['containerName']}")
        if rule["action"] == "FailIndex" and "backoffLimitPerIndex" not in spec:
            lines.append("FailIndex needs backoffLimitPerIndex")
    return lines + _of_tpus(spec, pod)


def _of_tpus(spec, pod) -> list[str]:
    kind = pod["nodeSelector"].get("cloud.google.com/gke-tpu-accelerator")
    topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology", "")
    if kind not in _TPUS:
        return [f"there is no TPU {kind}"]
    dimensions, of_a_host = _TPUS[kind]
    if not re.fullmatch(r"\d+(x\d+)*", topology) or topology.count("x") != dimensions - 1:
        return [f"topology {topology} of {kind} must have {dimensions} sides"]
    chips = math.prod(map(int, topology.split("x")))
    here = sum(container["resources"]["limits"]["google.com/tpu"] for container in pod["containers"])
    # A topology of one host is a slice for each pod; of several, all pods of the job are its hosts.
    hosts = 1 if here == chips else spec["parallelism"]
    if here not in of_a_host or here * hosts != chips:
        return [f"{spec['parallelism']} hosts of {here} chips are no {topology} of {kind}"]
    return []
