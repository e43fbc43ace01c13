"""A schema of the fields that our manifests use, and of no others: a field that is misspelt or misplaced is unknown.

Written for this project after the types of KubeRay v1.6.2 (API ray.io/v1: RayClusterSpec, RayJobSpec and what they
hold) and Kubernetes v1.32 (core/v1, apps/v1, batch/v1).
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}


def fields(_required: str = "", **known: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": known, "required": _required.split(), "additionalProperties": False}


def each(of: Schema) -> Schema:
    """A list with at least one entry."""
    return {"type": "array", "items": of, "minItems": 1}


def one_of(*values: str) -> Schema:
    """One of some texts."""
    return {"enum": list(values)}


METADATA = fields("name", name=NAME, labels=TEXTS)
POD_SECURITY = fields(
    "runAsNonRoot runAsUser seccompProfile",
    runAsNonRoot=FLAG, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT,
    seccompProfile=fields("type", type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
)  # fmt: skip
SECURITY = fields(
    allowPrivilegeEscalation=FLAG, runAsNonRoot=FLAG, readOnlyRootFilesystem=FLAG, capabilities=fields(drop=each(TEXT))
)
RESOURCES = fields("requests limits", requests=QUANTITIES, limits=QUANTITIES)
SECRET_KEY = fields("name key", name=NAME, key=TEXT)
VARIABLE = fields("name", name=TEXT, value=TEXT, valueFrom=fields("secretKeyRef", secretKeyRef=SECRET_KEY))
PORT = {"type": ["integer", "string"]}
PROBE = fields(
    "httpGet",
    httpGet=fields("path port", path=TEXT, port=PORT, scheme=one_of("HTTP", "HTTPS")),
    periodSeconds=COUNT,
)
CONTAINER = fields(
    "name image securityContext resources",
    name=NAME, image=TEXT, command=each(TEXT), securityContext=SECURITY, resources=RESOURCES,
    ports=each(fields("containerPort", containerPort=COUNT, name=NAME)),
    env=each(VARIABLE),
    volumeMounts=each(fields("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
    livenessProbe=PROBE, readinessProbe=PROBE,
)  # fmt: skip
VOLUME = fields(
    "name",
    name=NAME,
    persistentVolumeClaim=fields("claimName", claimName=NAME),
    emptyDir=fields(sizeLimit=QUANTITY),
    secret=fields("secretName", secretName=NAME, defaultMode=COUNT),
    configMap=fields("name", name=NAME),
)
POD = fields(
    "containers securityContext",
    containers=each(CONTAINER), securityContext=POD_SECURITY, volumes=each(VOLUME),
    automountServiceAccountToken=FLAG, terminationGracePeriodSeconds=COUNT, nodeSelector=TEXTS,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    tolerations=each(
        fields("key operator", key=TEXT, operator=one_of("Exists", "Equal"), effect=one_of("NoSchedule", "NoExecute"))
    ),
)  # fmt: skip
TEMPLATE = fields("spec", metadata=fields(labels=TEXTS), spec=POD)

RAY_CLUSTER = fields(
    "headGroupSpec rayVersion",
    rayVersion=TEXT,
    authOptions=fields(mode=one_of("disabled", "token")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        version=one_of("v1", "v2"), idleTimeoutSeconds=COUNT, securityContext=SECURITY, resources=RESOURCES,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    ),
    headGroupSpec=fields(
        "rayStartParams template",
        rayStartParams=TEXTS, template=TEMPLATE, serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    ),
    workerGroupSpecs=each(
        fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS,
            template=TEMPLATE,
        )
    ),
)  # fmt: skip
RAY_JOB = fields(
    "entrypoint",
    entrypoint=TEXT, clusterSelector=TEXTS, submitterPodTemplate=TEMPLATE,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
)  # fmt: skip
CRON_JOB = fields(
    "schedule jobTemplate",
    schedule={"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
    concurrencyPolicy=one_of("Allow", "Forbid", "Replace"),
    startingDeadlineSeconds=COUNT, successfulJobsHistoryLimit=COUNT, failedJobsHistoryLimit=COUNT,
    jobTemplate=fields("spec", spec=fields("template", backoffLimit=COUNT, template=TEMPLATE)),
)  # fmt: skip
DEPLOYMENT = fields(
    "selector template", replicas=COUNT, selector=fields("matchLabels", matchLabels=TEXTS), template=TEMPLATE
)
SERVICE = fields("ports", selector=TEXTS, ports=each(fields("port", name=NAME, port=COUNT, targetPort=PORT)))


def _resource(version: str, kind: str, **known: Schema) -> Schema:
    names = f"apiVersion kind metadata {' '.join(known)}"
    return fields(names, apiVersion={"const": version}, kind={"const": kind}, metadata=METADATA, **known)


KINDS: dict[str, Schema] = {
    "RayCluster": _resource("ray.io/v1", "RayCluster", spec=RAY_CLUSTER),
    "RayJob": _resource("ray.io/v1", "RayJob", spec=RAY_JOB),
    "CronJob": _resource("batch/v1", "CronJob", spec=CRON_JOB),
    "Deployment": _resource("apps/v1", "Deployment", spec=DEPLOYMENT),
    "Service": _resource("v1", "Service", spec=SERVICE),
    "ConfigMap": _resource("v1", "ConfigMap", data=TEXTS),
}
