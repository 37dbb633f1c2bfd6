"""Prints, or applies, the JobSet of a training on TPU slices of a GKE cluster.

    python launch/gke/jobset.py --name=mor-360m --image=IMAGE --accelerator=tpu-v5-lite-podslice \
        --topology=16x16 --slices=2 --dry_run -- --config=... --workdir=gs://...

Needs the JobSet controller in the cluster and a node pool of that accelerator and topology. A
slice is one Job whose pods are the hosts of the slice. Each process finds the others by itself.
"""

import argparse
import json
import math
import re
import subprocess
import sys

# Kubernetes' names of TPUs -> dimensions of their topologies.
ACCELERATORS = {
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
}

# TPU runtime, JAX's coordinator, the coordinator between slices.
PORTS = (8471, 8482, 8080)

# Codes of launch/train.py after which a new start makes sense; 137, 139 and the like: crashed or
# killed.
RESTARTED = (75, 76, 134, 135, 136, 137, 139, 143)

TEMPLATE = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  namespace: {namespace}
  annotations:
    # Each slice has a node pool of its own.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # All slices start again together, unless the training says that it would be in vain.
    maxRestarts: {restarts}
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: {slices}
    template:
      spec:
        parallelism: {hosts}
        completions: {hosts}
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: NotIn
              values: {restarted}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: {grace}
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: {accelerator}
              cloud.google.com/gke-tpu-topology: {topology}
            containers:
            - name: train
              image: {image}
              command: {command}
              ports: {ports}
              securityContext: {{privileged: {privileged}}}
              resources:
                requests: {{google.com/tpu: {chips}}}
                limits: {{google.com/tpu: {chips}}}
"""


def main(arguments: list[str]) -> int:
    """Prints the JobSet with --dry_run, else hands it to kubectl; its exit code, 2 on bad flags."""
    try:
        flags = parse(arguments)
        text = jobset(flags)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags, with those of the training in `training`. Raises `ValueError`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, training = arguments[:at], arguments[at + 1 :]
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--image", required=True, help="built from docker/tpu.Dockerfile")
    parser.add_argument("--accelerator", required=True, choices=ACCELERATORS)
    parser.add_argument("--topology", required=True, help="of one slice, such as 16x16")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--chips_per_host", type=int, default=4, help="of the machine type")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--restarts", type=int, default=10, help="of all slices together")
    parser.add_argument("--grace", type=int, default=120, help="seconds to save in when taken away")
    parser.add_argument("--privileged", action="store_true", help="for nodes before GKE 1.28")
    parser.add_argument("--dry_run", action="store_true", help="print it, and apply nothing")
    flags = parser.parse_args(own)
    flags.training = training
    return flags


def jobset(flags: argparse.Namespace) -> str:
    """The JobSet as YAML. Raises `ValueError` on flags that do not fit."""
    sizes = flags.topology.split("x")
    wanted = ACCELERATORS[flags.accelerator]
    ok = len(sizes) == wanted and all(re.fullmatch("[1-9][0-9]*", size) for size in sizes)
    example = "x".join(["4"] * wanted)
    _check(ok, "topology", flags.topology, f"{flags.accelerator} has {wanted} dimensions", example)
    chips = math.prod(map(int, sizes))
    rule = f"must divide the {chips} chips of a slice"
    ok = flags.chips_per_host > 0 and chips % flags.chips_per_host == 0
    _check(ok, "chips_per_host", flags.chips_per_host, rule, "4")
    _check(flags.slices > 0, "slices", flags.slices, "must be positive", "1")
    _check(flags.restarts >= 0, "restarts", flags.restarts, "must not be negative", "10")
    _check(flags.grace > 0, "grace", flags.grace, "must be a number of seconds", "120")
    name = "[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
    rule = "must be up to 40 lower case letters, digits and -"
    for flag in ("name", "namespace"):
        value = getattr(flags, flag)
        _check(bool(re.fullmatch(name, value)), flag, value, rule, "mor-360m")
    for needed in ("--config=", "--workdir="):
        if not any(word.startswith(needed) for word in flags.training):
            raise ValueError(f"nothing like {needed}... after --")
    command = ["python", "launch/train.py", "--distributed=auto", *flags.training]
    values = vars(flags) | {"image": json.dumps(flags.image), "command": json.dumps(command)}
    ports = json.dumps([{"containerPort": port} for port in PORTS])
    hosts, per_host = chips // flags.chips_per_host, flags.chips_per_host
    facts = {"hosts": hosts, "chips": per_host, "ports": ports, "restarted": list(RESTARTED)}
    facts["privileged"] = json.dumps(flags.privileged)
    return TEMPLATE.format(**values | facts)


def _check(ok: bool, flag: str, value: object, rule: str, example: str) -> None:
    if not ok:
        raise ValueError(f"--{flag}={value}: {rule}. Try --{flag}={example}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
